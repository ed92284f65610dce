"""The parts of bulk inference that need no model: what rows ask, who answers them, and what a kill leaves behind."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import RepetitionPenaltyLogitsProcessor

from etchat_hf.clip_encoder import DecodedClip
from etchat_hf.evaluation import clips as clips_module
from etchat_hf.evaluation.clips import find_video, read_ahead, sample_video
from etchat_hf.evaluation.decoding import RowBudgets, RowRepetitionPenalty, RowSampler
from etchat_hf.evaluation.journal import Journal, check_same_run, read_journals, write_run
from etchat_hf.evaluation.plan import leave_out_answered, plan_groups, share_groups
from etchat_hf.evaluation.predictions import load_predictions
from etchat_hf.evaluation.tasks import CHARADES, ETBENCH, MVBENCH, Answer
from etchat_hf.video_processing_etchat import ETChatVideoProcessor

sys.path.insert(0, str(Path(__file__).parents[1]))
from video_files import numbered_picture, read_number, write_video  # noqa: E402


def test_etbench_choice_tasks_are_begun_and_penalised():
    row = {"task": "rar", "video": "a/b.mp4", "q": "At <vid>?", "src": [1.5], "duration": 9, "idx": 3}
    request = ETBENCH.request(row)
    assert (request.videos, request.src, request.duration) == (("a/b.mp4",), (1.5,), 9)
    assert (request.answer_start, request.repetition_penalty) == ("Best Option: (", 1.2)
    request = ETBENCH.request({**row, "task": "tem"})
    assert (request.answer_start, request.repetition_penalty) == ("", 1.0)
    assert list(ETBENCH.fill(row, Answer("A)")).items()) == [*row.items(), ("a", "A)")]


def test_etbench_text_edition_keeps_src_beside_its_spelled_out_times():
    assert ETBENCH.request({"task": "rar", "video": "v", "q": "At 1.5 s?", "src": [1.5]}).src == ()


@pytest.mark.parametrize(
    "broken, message",
    [
        ({"q": None}, "^field 'q' should be str, got None"),
        ({"video": 3}, "^field 'video' should be str, got 3"),
        ({"src": ["x"], "q": "<vid>"}, "'src'"),
        ({"task": []}, "'task'"),
        ({"q": "half \ud800"}, "no Unicode text at character 5"),
    ],
)
def test_broken_rows_are_named(broken, message):
    with pytest.raises(ValueError, match=message):
        ETBENCH.request({"task": "tvg", "video": "v.mp4", "q": "When?", **broken})


def test_charades_lines(tmp_path):
    path = tmp_path / "charades_sta_test.txt"
    path.write_text("3MSZA 24.3 30.4##a person turns a light on.\n\nAB12 0 7##He sits. Then stands\n")
    rows = CHARADES.read(path)
    assert rows[0] == {"vid": "3MSZA", "query": "a person turns a light on", "span": [24.3, 30.4]}
    request = CHARADES.request(rows[0])
    assert request.question == "Localize the video moment according to the query 'a person turns a light on'."
    assert request.videos[0] == "3MSZA.mp4"
    assert CHARADES.fill(rows[1], Answer("7 to 2", (7.0, 2.0)))["pred"] == [7.0, 2.0]
    assert CHARADES.fill(rows[1], Answer(""))["pred"] is None
    path.write_text("3MSZA 24.3##no end\n")
    with pytest.raises(ValueError, match="line 1"):
        CHARADES.read(path)


def test_mvbench_file_of_one_task(tmp_path):
    (tmp_path / "moving_count.json").write_text(json.dumps([{"video": "x.mp4"}, {"video": "y.mp4", "task": "own"}]))
    assert [row["task"] for row in MVBENCH.read(tmp_path / "moving_count.json")] == ["moving_count", "own"]


def test_mvbench_folder_of_tasks(tmp_path):
    row = {
        "video": "x.mp4",
        "question": "What?",
        "candidates": ["cat", "dog"],
        "answer": "dog",
        "start": 1,
        "end": 4.5,
    }
    for task in ("moving_count", "state_change"):
        (tmp_path / f"{task}.json").write_text(json.dumps([row]))
    rows = MVBENCH.read(tmp_path)
    filled = [list(MVBENCH.fill(asked, Answer("A")).items()) for asked in rows]
    assert filled == [[*row.items(), ("task", task), ("a", "A")] for task in ("moving_count", "state_change")]
    request = MVBENCH.request(rows[0])
    assert request.question == "What?\n(A) cat\n(B) dog"
    assert request.answer_start == "Best Option: ("
    assert request.videos == ("x.mp4", "clevrer/video_validation/x.mp4")
    assert request.segment == (1, 4.5)
    assert MVBENCH.request({**row, "start": None, "end": None}).segment is None
    for broken in ({"start": 9}, {"start": None}, {"end": None}, {"end": "5"}):
        with pytest.raises(ValueError, match="^fields 'start' and 'end' should be seconds, got "):
            MVBENCH.request({**row, **broken})


@pytest.mark.parametrize("name", ["../secret.mp4", "a/../../b.mp4", "/etc/passwd", "C:\\x.mp4", "..\\x.mp4", ""])
def test_annotations_cannot_leave_the_folder_of_videos(tmp_path, name):
    with pytest.raises(ValueError, match="not a path inside"):
        find_video(tmp_path, [name])


def test_first_existing_video_is_found(tmp_path):
    (tmp_path / "v.mkv").touch()
    assert find_video(tmp_path, ["v.mp4", "v.mkv"]) == tmp_path / "v.mkv"
    with pytest.raises(FileNotFoundError, match="w.mp4"):
        find_video(tmp_path, ["w.mp4"])


def pixels(video_processor, clip):
    (frames,) = video_processor.iter_pixels(clip, len(clip.frame_times))
    return frames


def test_segment_is_sampled_like_a_video_of_its_own(tmp_path):
    path = write_video(tmp_path / "v.mp4", num_frames=60, fps=10)
    reader = ETChatVideoProcessor(size=48, image_mean=[0] * 3, image_std=[1] * 3, fps=2)
    clip = sample_video(reader, path, segment=(2.0, 3.95))
    assert clip.frame_times == pytest.approx([0, 0.5, 1, 1.5]) and clip.duration == pytest.approx(2)
    shown = (pixels(reader, clip) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    # The square crop of 64 x 48 pictures cuts the outer bars off: compare with whole frames, cropped alike.
    whole = pixels(reader, sample_video(reader, path, fps=10))
    crop = (whole[[20, 25, 30, 35]] * 255).round().byte().permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(shown, crop)
    with pytest.raises(ValueError, match="no frame between"):
        sample_video(reader, path, segment=(7.0, 8.0))


def test_folder_of_frames_is_a_clip_at_three_per_second(tmp_path):
    for k in range(9):
        Image.fromarray(numbered_picture(k, 64, 64)).save(tmp_path / f"{k:05d}.png")
    reader = ETChatVideoProcessor(size=64, image_mean=[0] * 3, image_std=[1] * 3)
    clip = sample_video(reader, tmp_path)
    pictures = (pixels(reader, clip) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert [read_number(picture) for picture in pictures] == [0, 3, 6]
    assert clip.frame_times == pytest.approx([0, 1, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading_ahead_is_ordered_and_bounded(tmp_path, dtype):
    def read(key):
        (tmp_path / f"{key}").touch()
        if key == 2:
            raise ValueError("broken\nfile")
        return DecodedClip(torch.full((1, 3, 4, 4), key, dtype=dtype), [0.0], [key], {}, None)

    clips = read_ahead(read, range(20), ahead=4, num_workers=2)
    for key, clip in zip(range(20), clips, strict=True):
        assert len(list(tmp_path.iterdir())) <= key + 6
        if key == 2:
            assert clip == "broken file"
        else:
            assert clip.frame_indices == [key]
            assert torch.equal(clip.pixel_values, torch.full((1, 3, 4, 4), key, dtype=dtype))


def test_what_is_no_fault_of_the_video_stops_reading_ahead():
    def read(key):
        raise TypeError("a mistake in the code")

    with pytest.raises(TypeError, match="a mistake in the code"):
        list(read_ahead(read, range(3), ahead=2, num_workers=1))


def test_a_process_that_dies_takes_only_its_own_clip_along():
    def read(key):
        if key == 3:
            os.kill(os.getpid(), signal.SIGSEGV)
        return f"clip {key}"

    clips = list(read_ahead(read, range(8), ahead=4, num_workers=1))
    dead = "the process that decoded it died; was there too little memory?"
    assert clips == [dead if key == 3 else f"clip {key}" for key in range(8)]


def test_processes_that_read_ahead_end_well():
    loader = clips_module._load(str, range(4), ahead=2, num_workers=2)
    processes = loader._workers
    assert len(list(loader)) == 4
    assert [process.exitcode for process in processes] == [0, 0]


READING = """
import multiprocessing, os, signal, sys
from etchat_hf.evaluation.clips import read_ahead

def read(key):
    print("reads", flush=True)
    return "x" * 1_000_000

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    clips = read_ahead(read, range(20), ahead=8, num_workers=2)
    next(clips)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_no_reader_outlives_a_killed_process(tmp_path, method):
    (tmp_path / "reading.py").write_text(READING)
    command = [sys.executable, tmp_path / "reading.py", method]
    # Ends when nobody holds the output any longer, or with TimeoutExpired
    killed = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL and "reads" in killed.stdout


def test_nothing_to_read_ahead():
    assert list(read_ahead(None, [], ahead=8, num_workers=2)) == []


@pytest.mark.parametrize("num_processes", [1, 2, 3, 7])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_every_row_is_shared_out_once_and_evenly(num_processes, batch_size):
    rng = np.random.default_rng(0)
    videos = rng.integers(0, 60, 200).tolist()
    groups = plan_groups(videos, [float(video) for video in videos], batch_size)
    shares = share_groups(groups, num_processes)
    rows = [[row for group in share for batch in group for row in batch] for share in shares]
    assert sorted(sum(rows, [])) == list(range(200))
    assert max(map(len, rows)) - min(map(len, rows)) <= max(batch_size, max(Counter(videos).values()))
    homes = [{videos[row] for row in part} for part in rows]
    assert sum(map(len, homes)) == len(set(videos))  # no video is read twice
    assert all(len(batch) <= batch_size for group in groups for batch in group)


def test_one_video_with_all_questions_occupies_every_process():
    shares = share_groups(plan_groups(["v"] * 40, [0.0] * 40, 4), 3)
    assert [sum(len(batch) for group in share for batch in group) for share in shares] == [16, 12, 12]
    assert [len(share) for share in shares] == [1, 1, 1]


def test_pending_rows_keep_their_company():
    groups = plan_groups(list("aabbccdd"), [0.0] * 8, 4)
    assert leave_out_answered(groups, {5}) == [[[4, 5, 6, 7]]]


def test_journal_keeps_reasons_that_are_no_unicode_text(tmp_path):
    record = {"row": 0, "error": "no \ud800.mp4 in videos"}
    Journal(tmp_path).append([record])
    assert read_journals(tmp_path) == [record]


def test_journal_survives_a_torn_line(tmp_path):
    for process, rows in enumerate([(0, 1), (2,)]):
        journal = Journal(tmp_path, process)
        for row in rows:
            journal.append([{"row": row, "text": "Zürich", "timestamps": []}])
    path = sorted(tmp_path.glob("*-0.jsonl"))[0]
    complete = path.read_bytes()
    torn = json.dumps({"row": 9, "text": "Zürich"}, ensure_ascii=False).encode()
    for cut in (torn, torn[: torn.index(b"\xc3") + 1]):  # all but the newline; within a character
        path.write_bytes(complete + cut)
        assert sorted(record["row"] for record in read_journals(tmp_path)) == [0, 1, 2]
    path.write_bytes(b'{"row": 7\n' + complete)
    with pytest.raises(ValueError, match="line 1 is broken"):
        read_journals(tmp_path)


def test_answers_of_another_run_are_refused(tmp_path):
    check_same_run(tmp_path, {"model": "a", "seed": None})
    Journal(tmp_path).append([{"row": 0, "text": "", "timestamps": []}])
    with pytest.raises(ValueError, match="run.json is missing"):
        check_same_run(tmp_path, {"model": "a", "seed": None})
    write_run(tmp_path, {"model": "a", "seed": None})
    check_same_run(tmp_path, {"model": "a", "seed": None})
    with pytest.raises(ValueError, match="not the same model"):
        check_same_run(tmp_path, {"model": "b", "seed": None})


def test_scorer_reads_only_predictions(tmp_path):
    (tmp_path / "predictions.json").write_text('[{"a": "x"}]')
    (tmp_path / "failures.json").write_text('[{"row": 0, "reason": "missing"}]')
    (tmp_path / "progress").mkdir()
    (tmp_path / "progress" / "run.json").write_text("{}")
    assert load_predictions([tmp_path])[0] == [{"a": "x"}]


def test_penalty_counts_words_only():
    torch.manual_seed(0)
    scores, vid, image = torch.randn(2, 50), 7, 60  # the placeholder's id may lie beyond the vocabulary
    prompt = torch.tensor([[0, 0, image, 5, vid, 9], [3, image, image, 5, 6, 7]])
    counted = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 0, 0, 1, 1, 1]]).bool()
    ids = torch.cat([prompt, torch.tensor([[11, vid], [12, 13]])], dim=1)
    found = RowRepetitionPenalty([1.2, 1.0], counted, vid)(ids, scores)
    expected = RepetitionPenaltyLogitsProcessor(1.2)(torch.tensor([[5, 9, 11]]), scores[:1].clone())
    torch.testing.assert_close(found[:1], expected)
    assert torch.equal(found[1], scores[1])


def test_sampling_follows_the_distribution_and_only_the_rows_seed():
    scores, temperature = torch.tensor([[1.0, 0.8, 0.5, -1.0]]), 0.2
    sampler = RowSampler([(0, 5)], temperature)
    draws = torch.tensor([sampler(None, scores).argmax().item() for _ in range(4000)])
    frequency = torch.bincount(draws, minlength=4) / len(draws)
    torch.testing.assert_close(frequency, (scores[0] / temperature).softmax(-1), atol=0.03, rtol=0)
    together, alone = RowSampler([(0, 4), (0, 5)], temperature), RowSampler([(0, 5)], temperature)
    for _ in range(3):
        assert torch.equal(together(None, scores.expand(2, -1))[1:], alone(None, scores))


def test_each_row_ends_at_its_own_budget():
    ends = RowBudgets([1, 3], prompt_length=4, device=torch.device("cpu"))
    assert [ends(torch.zeros(2, length), None).tolist() for length in (4, 5, 7)] == [
        [False, False],
        [True, False],
        [True, True],
    ]
