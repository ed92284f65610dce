import json
from pathlib import Path

import numpy as np
import pytest
import torch
from annotation_rows import image_row, make_processor, text_row, turns, video_row
from video_files import write_video

from etchat_hf.data import ETChatDataCollator, SampleEncoder

GOLDEN_LABELS = json.loads(Path(__file__).with_name("golden_labels.json").read_text())
NEWLINE_BEFORE_ANSWER = 13


def rng():
    return np.random.default_rng(0)


def clip_of(kind: str, num_frames: int, folder: Path):
    """A file with that many sampled frames."""
    if kind == "video":
        return str(write_video(folder / f"{num_frames}.mp4", num_frames=num_frames, fps=1))
    return torch.zeros(3, 40, 40, dtype=torch.uint8)


def unexpanded(ids: list[int], image_token: int) -> list[int]:
    """One -200 for each run of frames."""
    return [
        -200 if token == image_token else token
        for i, token in enumerate(ids)
        if token != image_token or i == 0 or ids[i - 1] != image_token
    ]


@pytest.mark.parametrize("case", GOLDEN_LABELS)
def test_golden_ids_and_labels(case, tmp_path):
    golden = GOLDEN_LABELS[case]
    processor = make_processor(golden["conv_type"])
    encoder = SampleEncoder(processor)
    for item in golden["items"]:
        row = {key: item[key] for key in ("conversations", "src", "tgt") if item.get(key)}
        clip = None
        if item["kind"] != "text":
            row[item["kind"]] = "a file"
            clip = clip_of(item["kind"], item["nframes"], tmp_path)
        sample = encoder(row, clip, rng())
        ids, labels = sample["input_ids"].tolist(), sample["labels"].tolist()
        is_frame = [token == processor.image_token_id for token in ids]
        assert unexpanded(ids, processor.image_token_id) == item["input_ids"]
        answers = [label for label in labels if label != -100]
        expected = [label for label in item["labels"] if label != -100]
        if len(item["conversations"]) == 4:  # the original's second turn holds the newline before the answer
            expected.remove(NEWLINE_BEFORE_ANSWER)
        assert answers == expected
        assert all(label in (-100, token) for label, token in zip(labels, ids, strict=True))
        assert not any(frame and label != -100 for frame, label in zip(is_frame, labels, strict=True))
        texts = processor.qformer_tokenizer(item["query"], padding=True).input_ids
        if clip is not None:
            assert sum(is_frame) == item["nframes"] * len(item["query"])
            assert sample["qformer_input_ids"].tolist() == texts
            assert sample["placeholder_clips"] == [0] * len(texts)
            assert len(sample["pixel_values"]) == item["nframes"]
        assert sample["vid_times"] == [float(t) for t in (item.get("src") or []) + (item.get("tgt") or [])]


def test_missing_placeholders_go_before_or_after_at_random(processor):
    encoder = SampleEncoder(processor)
    row = video_row(0) | {"conversations": turns("Where?", "There.", "When?", "Now."), "tgt": []}
    clip = np.zeros((2, 30, 30, 3), np.uint8)
    encoder.processor = Recorder(processor)
    seen = set()
    for seed in range(20):
        try:
            encoder(row, clip, np.random.default_rng(seed))
        except Recorded as recorded:
            seen.add(str(recorded))
        with pytest.raises(Recorded) as again:
            encoder(row, clip, np.random.default_rng(seed))
        assert str(again.value) in seen
    first, second = ("<image>\nWhere?", "Where?\n<image>"), ("<image>\nWhen?", "When?\n<image>")
    assert seen == {f"{a}|{b}" for a in first for b in second}


class Recorded(Exception):
    pass


class Recorder:
    def __init__(self, processor):
        self.processor = processor

    def apply_chat_template(self, messages, **kwargs):
        prompt = self.processor.apply_chat_template(messages)
        users = [part.split("<|end|>")[0] for part in prompt.split("<|user|>\n")[1:]]
        raise Recorded("|".join(users))


def test_times_follow_the_order_of_occurrence(processor):
    row = video_row(0) | {
        "src": [0.5, 3],
        "tgt": [1, 99.5],
        "conversations": turns("After <vid>?", "At <vid> .", "After <vid>?", "At <vid> ."),
    }
    sample = SampleEncoder(processor)(row, torch.zeros(3, 30, 30, dtype=torch.uint8), rng())
    assert sample["vid_times"] == [0.5, 1.0, 3.0, 99.5]


def test_cut_keeps_vid_labels_and_times_together(processor):
    row = video_row(0)
    whole = SampleEncoder(processor)(row, torch.zeros(3, 30, 30, dtype=torch.uint8), rng())
    vids = (whole["input_ids"] == processor.match_token_id).nonzero().flatten().tolist()
    length = vids[1]  # the second <vid> is the first token to go
    cut = SampleEncoder(processor, max_length=length)(row, torch.zeros(3, 30, 30, dtype=torch.uint8), rng())
    assert cut["was_cut"] and not whole["was_cut"]
    assert cut["vid_times"] == [1.0]
    assert torch.equal(cut["labels"], whole["labels"][:length])
    with pytest.raises(ValueError, match="no answer is left"):
        SampleEncoder(processor, max_length=vids[0] - 10)(row, torch.zeros(3, 30, 30, dtype=torch.uint8), rng())


def test_frames_that_do_not_fit_are_an_error(processor, tmp_path):
    clip = clip_of("video", 60, tmp_path)
    with pytest.raises(ValueError, match="frames and question alone fill"):
        SampleEncoder(processor, max_length=50)(video_row(0), clip, rng())


@pytest.mark.parametrize("use_time_tag", [False, True])
def test_later_turns_whose_frames_do_not_fit_are_cut_whole(processor, tmp_path, use_time_tag):
    processor.use_time_tag = use_time_tag
    clip = clip_of("video", 20, tmp_path)
    first = ("<image>\nWhen?", "From <vid> to <vid> seconds.")
    row = video_row(0, tgt=[1, 2, 3, 4], conversations=turns(*first, *first))
    whole = SampleEncoder(processor)(row, clip, rng())
    frames = (whole["input_ids"] == processor.image_token_id).nonzero().flatten()
    for max_length in (frames[20], frames[25], frames[39]):
        cut = SampleEncoder(processor, max_length=int(max_length))(row, clip, rng())
        assert len(cut["input_ids"]) == frames[20] and cut["was_cut"]
        assert (cut["input_ids"] == processor.image_token_id).sum() == 20 == len(cut["pixel_values"])
        assert cut["placeholder_clips"] == [0] and cut["vid_times"] == [1, 2]
        assert len(cut["qformer_input_ids"]) == (20 if use_time_tag else 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conversations": []}, "no conversations"),
        ({"conversations": None}, "no conversations"),
        ({"conversations": "hello"}, "conversations is 'hello'; it must be a list of turns"),
        ({"tgt": [1, True]}, "tgt holds True"),
        ({"tgt": [1, 10**400]}, "tgt holds 1000"),
        ({"conversations": [{"from": "human", "value": "<image>\nWhen?"}]}, "no question with an answer"),
        ({"conversations": [{"from": "robot", "value": "Hello"}]}, "unknown role 'robot'"),
        ({"conversations": 5}, "conversations is 5; it must be a list of turns"),
        ({"conversations": [{"from": ["human"], "value": "Hello"}]}, r"unknown role \['human'\]"),
        ({"conversations": [{"from": "human", "value": 3}]}, "must be a text"),
        ({"conversations": turns("When\ud800?", "Now.")}, "holds half of a surrogate pair"),
        ({"conversations": turns("When?", "Now.")[:1] * 2}, "must alternate"),
        ({"tgt": [1.0]}, "answers hold 2 <vid>, but tgt has 1"),
        ({"src": [1.0]}, "questions hold 0 <vid>, but src has 1"),
        ({"tgt": [-1, 2]}, "-1"),
        ({"tgt": [1, "2"]}, "'2'"),
        ({"tgt": [1, float("nan")]}, "nan"),
        ({"tgt": [3, 2]}, "3.0 - 2.0 s ends before it starts"),
        ({"tgt": 4}, "must be a list"),
        ({"image": "a.png"}, "image and a video"),
        ({"conversations": turns("When?", "<image> From <vid> to <vid>.")}, "an answer holds the placeholder"),
        ({"video": None}, "without image or video holds the placeholder"),
        ({"video": None, "conversations": turns("When?", "From <vid> to <vid>.")}, "no video"),
        ({"conversations": turns("see <image> here", "From <vid> to <vid>.")}, "line of its own"),
    ],
)
def test_malformed_rows_say_what_is_wrong(processor, changes, message):
    row = video_row(0) | changes
    clip = torch.zeros(3, 30, 30, dtype=torch.uint8) if row["video"] else None
    with pytest.raises(ValueError, match=message):
        SampleEncoder(processor)(row, clip, rng())


def test_without_matching_vid_is_an_error_and_no_times_are_made(processor):
    encoder = SampleEncoder(processor, use_matching=False)
    with pytest.raises(ValueError, match="matching is off"):
        encoder(video_row(0), torch.zeros(3, 30, 30, dtype=torch.uint8), rng())
    assert "vid_times" not in encoder(text_row(0), None, rng())


def test_an_answer_before_the_first_question_is_left_out(processor):
    row = text_row(0)
    extra = row | {"conversations": [{"from": "gpt", "value": "Hello!"}, *row["conversations"]]}
    encoder = SampleEncoder(processor)
    assert torch.equal(encoder(extra, None, rng())["input_ids"], encoder(row, None, rng())["input_ids"])


def test_collator_merges_as_the_processor_would(processor, media):
    encoder, collator = SampleEncoder(processor), ETChatDataCollator(processor)
    clips = [str(media / "clips" / "0.mp4"), None, str(media / "red.png")]
    rows = [video_row(0), text_row(1), image_row(2)]
    batch = collator([encoder(row, clip, rng()) for row, clip in zip(rows, clips, strict=True)])
    messages = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "video", "path": clips[0]},
                    {"type": "text", "text": "When does event 0 happen?"},
                ],
            },
            {"role": "assistant", "content": "From <vid> to <vid> seconds."},
        ],
        [{"role": "user", "content": "What is 1?"}, {"role": "assistant", "content": "A number."}],
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": "What is this?"}, {"type": "image", "path": clips[2]}],
            },
            {"role": "assistant", "content": "A red square."},
        ],
    ]
    if rng().random() < 0.5:
        messages[2][0]["content"].reverse()
    expected = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, src=[[1, 2.5], [], []], padding_side="right",
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    masks = expected.pop("assistant_masks")
    assert batch.keys() == {*expected, "labels"}
    real = expected["attention_mask"].bool()
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    assert torch.equal(batch["input_ids"][real], expected["input_ids"][real])
    assert torch.equal(batch["labels"], torch.where(masks.bool(), expected["input_ids"], -100))
    for key in ("pixel_values", "qformer_input_ids", "qformer_attention_mask"):
        assert torch.equal(batch[key], expected[key]), key
    for key in ("frame_times", "placeholder_clips", "vid_times"):
        assert batch[key] == expected[key], key


def test_a_batch_without_clips_has_no_clip_inputs(processor):
    encoder = SampleEncoder(processor)
    batch = ETChatDataCollator(processor, pad_to_multiple_of=8)([encoder(text_row(i), None, rng()) for i in (1, 2000)])
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].shape[1] % 8 == 0
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
