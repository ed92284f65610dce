"""One encoding for many questions: chats, windows, encoded clips."""

import pytest
import torch

from etchat_hf import inference
from etchat_hf.inference import Chat, ask, ask_windows, load, merge_spans


@pytest.fixture(scope="module")
def loaded(converted):
    return load(converted)


@pytest.fixture(scope="module")
def timely(eager_vid):
    return load(eager_vid)


def test_an_encoded_clip_gives_the_answers_of_its_file(loaded, clip, monkeypatch):
    model, processor = loaded
    questions = ("When does it appear?", "What happens?")
    expected = [ask(model, processor, clip, question, max_new_tokens=8) for question in questions]
    encoded = processor.encode(clip, model)
    monkeypatch.setattr(type(model.model.vision_tower), "forward", None)  # nothing is encoded again
    assert [ask(model, processor, encoded, question, max_new_tokens=8) for question in questions] == expected


def test_encoded_and_other_clips_do_not_mix(loaded, clip):
    model, processor = loaded
    clips = [processor.encode(clip, model), str(clip)]
    with pytest.raises(ValueError, match="1 of 2 clips are encoded"):
        processor("<image><image>", videos=clips, qformer_text=["a", "b"])


def test_a_chat_shows_its_clip_in_every_turn(loaded, clip):
    model, processor = loaded
    chat = Chat(model, processor, clip)
    first = chat.ask("When?", max_new_tokens=4)
    assert first == ask(model, processor, clip, "When?", max_new_tokens=4) and "raw_text" not in first
    again = chat.ask("Where?", max_new_tokens=4)
    frames = {"type": "video", "path": str(clip)}
    messages = [
        {"role": "user", "content": [frames, {"type": "text", "text": "When?"}]},
        chat.messages[1],
        {"role": "user", "content": [frames, {"type": "text", "text": "Where?"}]},
    ]
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    outputs = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert processor.post_process(outputs)[0]["text"] == again["answer"]
    kept = Chat(model, processor, clip, reinsert_clip=False)
    assert kept.ask("When?", max_new_tokens=4) == first
    assert kept.ask("Where?", max_new_tokens=4)["num_frames"] == 12


def test_a_chat_remembers_the_times_of_its_answers(timely, clip):
    chat = Chat(*timely, clip)
    first = chat.ask("When?", max_new_tokens=2)
    assert len(first["timestamps"]) == 2 and chat.messages[1]["content"].count("<vid>") == 2
    chat.ask("And after <vid>?", [3.0], max_new_tokens=1)
    assert chat.times[:3] == [*first["timestamps"], 3.0] and len(chat.times) == 4


def test_a_turn_that_fails_leaves_the_chat_as_it_was(loaded, clip):
    chat = Chat(*loaded, clip)
    chat.ask("When?", max_new_tokens=2)
    before = list(chat.messages)
    with pytest.raises(ValueError, match="<vid>"):
        chat.ask("After <vid>?")
    assert chat.messages == before


def test_windows_answer_with_the_times_of_the_whole(timely, clip):
    model, processor = timely
    answer = ask_windows(model, processor, clip, "When?", window=5.0, overlap=1.0, max_new_tokens=2)
    assert [(part["start"], part["end"]) for part in answer["windows"]] == [(0.0, 5.0), (4.0, 9.0), (8.0, 12.0)]
    for part in answer["windows"]:
        assert all(part["start"] <= seconds < part["end"] for seconds in part["timestamps"])
    assert answer["timestamps"] == [float(frame) for frame in answer["frames"]]
    encoded = processor.encode(clip, model)
    alone = ask(model, processor, encoded.window(4.0, 9.0), "When?", max_new_tokens=2)
    assert answer["windows"][1]["timestamps"] == [4.0 + seconds for seconds in alone["timestamps"]]
    assert answer["answer"].splitlines()[1].startswith("[4 - 9 s] ")


@pytest.mark.parametrize(("window", "overlap"), [(0.0, 0.0), (5.0, 5.0), (5.0, -1.0), (-2.0, 0.0)])
def test_impossible_windows_are_refused(loaded, clip, window, overlap):
    with pytest.raises(ValueError, match="longer than its overlap"):
        ask_windows(*loaded, clip, "When?", window, overlap)


def test_spans_are_merged():
    assert merge_spans([[8.0, 9.0], [1.0, 3.0], [4.0, 2.0]]) == [[1.0, 4.0], [8.0, 9.0]]
    assert merge_spans([]) == []


def test_prompts_beyond_the_context_are_refused(loaded, clip):
    model, processor = loaded
    with pytest.raises(ValueError, match="reads at most 512"):
        ask(model, processor, clip, "word " * 600)


def test_float16_becomes_float32_on_a_cpu(converted, tmp_path):
    folder = tmp_path / "half"
    model, processor = load(converted, dtype="float16")
    assert model.dtype == torch.float16
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    assert inference.load(folder, device="cpu")[0].dtype == torch.float32
