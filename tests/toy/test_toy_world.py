"""The toy world is what it says, the same each time, and in the format of the real data."""

import json
import random

import numpy as np
import pytest

from etchat_hf.toy.annotations import SPAN_TASKS, TASKS, ask_all
from etchat_hf.toy.evaluate import score_rows
from etchat_hf.toy.generate import generate
from etchat_hf.toy.tiny_model import build_model, build_processor
from etchat_hf.toy.world import COLORS, SIZE, VIDEO_FPS, draw_scene, write_video
from etchat_hf.video_decoding_etchat import open_video


def is_visible(frame: np.ndarray, color: str) -> bool:
    distance = np.abs(frame.astype(int) - COLORS[color]).max(-1)
    return (distance < 40).sum() > 50


@pytest.mark.parametrize("seed", range(12))
def test_a_video_shows_every_colour_exactly_when_it_should(seed, tmp_path):
    scene = draw_scene(seed)
    write_video(scene, tmp_path / "video.mp4")
    reader = open_video(tmp_path / "video.mp4")
    assert reader.num_frames == scene.duration * VIDEO_FPS and (reader.height, reader.width) == (SIZE, SIZE)
    indices = range(0, reader.num_frames, VIDEO_FPS)
    for second, frame in enumerate(reader.read(list(indices))):
        for color in COLORS:
            expected = any(e.color == color and e.start <= second <= e.end for e in scene.events)
            assert is_visible(frame, color) == expected, (second, color, scene)


def test_scenes_are_sound_and_seeded():
    for seed in range(300):
        scene = draw_scene(seed)
        assert scene == draw_scene(seed)
        for event in scene.events:
            assert 0 <= event.start < event.end < scene.duration or event.start <= event.end == scene.duration - 1
        for lane in (0, 1):
            spans = [(event.start, event.end) for event in scene.events if event.lane == lane]
            assert all(a[1] < b[0] for a, b in zip(spans, spans[1:], strict=False)), scene


def test_every_task_is_asked_with_as_many_times_as_vids():
    rng, seen = random.Random(0), set()
    for seed in range(60):
        for asked in ask_all(draw_scene(seed), rng):
            seen.add(asked["task"])
            assert asked["question"].count("<vid>") == len(asked.get("src", []))
            assert asked["answer"].count("<vid>") == len(asked.get("tgt", []))
    assert seen == set(TASKS) and set(SPAN_TASKS) < seen


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    for name in ("first", "second"):
        generate(tmp_path / name, seed=3, num_train=2, num_unseen=1, track=lambda values, description: values)
    files = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*") if path.is_file())
    assert len(files) == 3 + 2 + 4  # videos, images, annotations
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file


def test_unseen_scenes_are_none_of_training(tmp_path):
    generate(tmp_path, seed=0, num_train=4, num_unseen=4, track=lambda values, description: values)
    videos = {
        name: {row["video"] for row in json.loads((tmp_path / f"{name}.json").read_text())}
        for name in ("stage3", "unseen")
    }
    assert not videos["stage3"] & videos["unseen"] and len(videos["unseen"]) == 4


def test_the_tokenizers_know_every_word_and_read_any_text():
    processor = build_processor()
    assert processor.tokenizer.decode(processor.tokenizer("When is the red square visible? é\n").input_ids) == (
        "When is the red square visible? é\n"
    )
    assert len(processor.tokenizer("When is the yellow cross visible?").input_ids) == 7
    assert processor.qformer_tokenizer.tokenize("When is the blue ring visible?")[3:5] == ["blue", "ring"]
    assert processor.qformer_tokenizer.unk_token not in processor.qformer_tokenizer.tokenize("Something else?")
    model = build_model(processor)
    assert sum(parameter.numel() for parameter in model.parameters()) < 900_000


def test_scores():
    rows = [
        {"task": "tvg", "tgt": [2, 6], "conversations": [{}, {"value": ""}]},
        {"task": "tal", "tgt": [0, 1, 3, 4], "conversations": [{}, {"value": ""}]},
        {"task": "vhd", "tgt": [5], "conversations": [{}, {"value": ""}]},
        {"task": "rar", "conversations": [{}, {"value": "red square (B)."}]},
    ]
    answers = [
        {"spans": [[2, 6]], "timestamps": [2, 6], "text": "2 - 6."},
        {"spans": [[0, 1]], "timestamps": [0, 1], "text": "0 - 1."},
        {"spans": [], "timestamps": [6], "text": "6."},
        {"spans": [], "timestamps": [], "text": "red square (C)."},
    ]
    scores = score_rows(rows, answers)
    assert scores["mIoU"] == 0.75 and scores["R@0.7"] == 0.5
    assert scores["tasks"] == {"tvg": (1, 1.0), "tal": (1, 0.5), "vhd": (1, 1.0), "rar": (1, 0.0)}


@pytest.mark.parametrize(
    ("spans", "iou"), [([], 0.0), ([[0, 4]], 0.5), ([[0, 4], [5, 9]], 1.0), ([[0, 4], [5, 9], [0, 4]], 2 / 3),
                       ([[5, 9], [0, 4]], 0.0), ([[4, 0], [5, 9]], 0.5)]
)  # fmt: skip
def test_spans_are_paired_in_order(spans, iou):
    row = {"task": "tal", "tgt": [0, 4, 5, 9]}
    assert score_rows([row], [{"spans": spans}])["mIoU"] == pytest.approx(iou)
