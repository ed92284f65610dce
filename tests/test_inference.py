"""One encoding for many questions: chats, windows, encoded clips."""

import copy
import re
import warnings

import pytest
import torch

from etchat_hf import inference
from etchat_hf.inference import Chat, ask, ask_windows, frame_budget, load, merge_spans
from etchat_hf.toy import bundled_checkpoint
from etchat_hf.verification import write_clip


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


@pytest.fixture(scope="module")
def toy():
    return load(bundled_checkpoint())


@pytest.fixture(scope="module")
def dense_clip(tmp_path_factory):
    """12 s at 25 fps: 300 frames, more than the toy's context has room for."""
    path = tmp_path_factory.mktemp("dense") / "clip.mp4"
    write_clip(path, fps=25, size=64)
    return path


QUESTIONS = [
    ("When does the red square appear?", []),
    ("What happens at <vid>?", [5.0]),
    ("When is it there? " + "word " * 60, []),
    ("What happens between <vid> and <vid>?", [2.0, 6.0]),
    ("And after <vid>?", [7.0]),
]


def prompt_of(processor, clip, turns: list, reinsert_clips: bool):
    """Of a conversation that has had only these turns (question, its times, answer or None, its times)."""
    messages, times = [], []
    for question, src, answer, answered in turns:
        shown = [] if messages else [{"type": "video", "video": clip}]
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": question}]})
        messages += [{"role": "assistant", "content": answer}] if answer is not None else []
        times += [*src, *answered]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    return processor.apply_chat_template(messages, src=times, reinsert_clips=reinsert_clips, **options)


def turns_warned_of(caught: list) -> list[str]:
    return re.findall(r"reads: turns? ([\d to]+) of it", " ".join(str(warning.message) for warning in caught))


@pytest.mark.parametrize(("fps", "reinsert_clip"), [(8, True), (25, True), (8, False), (25, False)])
def test_a_long_chat_answers_as_one_that_had_its_last_turns_only(toy, dense_clip, fps, reinsert_clip, monkeypatch):
    model, processor = toy
    clip = processor.encode(dense_clip, model, fps=fps, max_frames=frame_budget(model, processor))
    monkeypatch.setattr(type(model.model.vision_tower), "forward", None)  # nothing is encoded again
    chat, turns, out = Chat(model, processor, clip, reinsert_clip=reinsert_clip), [], 0
    for question, src in QUESTIONS * 2:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            answer = chat.ask(question, src, max_new_tokens=8)
        asked, before = (question, src, None, []), out
        while (
            len((inputs := prompt_of(processor, clip, [*turns[out:], asked], reinsert_clip))["input_ids"][0]) > 512 - 8
        ):
            out += 1
        outputs = model.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        (expected,) = processor.post_process(outputs)
        turns.append((question, src, expected.pop("raw_text"), expected["timestamps"]))
        assert expected.pop("text") == answer["answer"] and expected.items() <= answer.items()
        assert chat.left_out == out and len(chat.messages) == 2 * (len(turns) - out)
        assert chat.times == [time for turn in turns[out:] for time in (*turn[1], *turn[3])]
        new = {0: [], 1: [f"{out}"]}.get(out - before, [f"{before + 1} to {out}"])
        assert turns_warned_of(caught) == new
    assert out > 0


def test_a_question_that_does_not_fit_alone_leaves_the_chat_as_it_was(toy, dense_clip):
    chat = Chat(*toy, dense_clip, fps=20)
    chat.ask("What happens at <vid>?", [5.0], max_new_tokens=4)
    before = list(chat.messages), list(chat.times)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no turn is left out
        with pytest.raises(ValueError, match="240 of them frames; .* 512: lower --fps, set --max-frames, or sh"):
            chat.ask("word " * 140)
        with pytest.raises(ValueError, match="240 of them frames; .* the question is too long; shorten it") as refusal:
            chat.ask("word " * 600)
    assert "--window" not in str(refusal.value)
    assert (chat.messages, chat.times, chat.left_out) == (*before, 0)
    with pytest.warns(UserWarning, match="turn 1 of it is left out"):
        chat.ask("And then?", max_new_tokens=4)


@pytest.mark.filterwarnings("ignore:The conversation no longer fits")
def test_turns_make_room_for_an_answer(toy, dense_clip):
    """Else the answers of a long conversation would end wherever the context does."""
    chat, turns = Chat(*toy, dense_clip, fps=8), []
    for _ in range(3):
        answer = chat.ask("What is there?", max_new_tokens=4)
        turns.append(("What is there?", [], chat.messages[-1]["content"], answer["timestamps"]))
    inputs = prompt_of(chat.processor, chat.clip, [*turns, ("What is there?", [], None, [])], True)
    free = 512 - inputs["input_ids"].shape[1]
    assert 0 < free < 128
    for max_new_tokens, left_out in ((free, 0), (free + 1, 1), (2048, 1)):
        same = copy.copy(chat)
        same.ask("What is there?", max_new_tokens=max_new_tokens)
        assert (same.left_out, chat.left_out) == (left_out, 0)


def test_a_window_that_does_not_fit_tells_what_its_frames_take(toy, dense_clip):
    with pytest.raises(ValueError, match="250 of them frames; the model reads at most 512: lower --window or --fps"):
        ask_windows(*toy, dense_clip, "word " * 140, window=10.0, fps=25)


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
