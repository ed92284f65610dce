import json
import re

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer

from etchat_hf import ETChatGenerateOutput, ETChatProcessor, ETChatVideoProcessor, VidMatch
from etchat_hf.chat_templates import CONV_TYPES, load_chat_template
from etchat_hf.conversion.tokens import load_qformer_tokenizer


@pytest.fixture(scope="module")
def processor(converted) -> ETChatProcessor:
    return ETChatProcessor.from_pretrained(converted)


@pytest.fixture(scope="module")
def image():
    return PIL.Image.fromarray(np.full((40, 60, 3), 90, dtype=np.uint8))


def user(*parts):
    return {"role": "user", "content": list(parts)}


def text(words):
    return {"type": "text", "text": words}


def test_golden_prompts(golden):
    """Every conversation type: strings, ids, and the placeholder with the same ids around it."""
    qformer_tokenizer = load_qformer_tokenizer(str(golden / "bert"), None)
    roles = {"human": "user", "gpt": "assistant"}
    for spec in json.loads((golden / "prompts" / "prompts.json").read_text()):
        folder = golden / "prompts" / "tokenizers" / spec.get("tokenizer", spec["conv_type"])
        tokenizer = AutoTokenizer.from_pretrained(folder)
        template = load_chat_template(spec["conv_type"])
        processor = ETChatProcessor(ETChatVideoProcessor(size=28), tokenizer, qformer_tokenizer, template)
        chat = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in spec["conversations"]]
        prompt = processor.apply_chat_template(chat)
        ids = [-200 if token == processor.image_token_id else token for token in tokenizer(prompt).input_ids]
        assert ids == spec["input_ids"], (spec["conv_type"], spec["case"])


@pytest.mark.parametrize("conv_type", [name for name in CONV_TYPES if name not in ("plain", "gemma2")])
def test_a_system_message_replaces_the_default(conv_type, processor):
    chat = [{"role": "system", "content": "Be brief."}, user(text("Hello"))]
    prompt = processor.apply_chat_template(chat, chat_template=load_chat_template(conv_type))
    assert "Be brief." in prompt and "assistant." not in prompt


def test_unknown_conversation_types_are_refused():
    with pytest.raises(ValueError, match="'phi4'"):
        load_chat_template("phi4")


def test_messages_become_inputs(processor, clip):
    chat = [user({"type": "video", "path": str(clip)}, text("When does the red square appear?"))]
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert inputs["pixel_values"].shape == (12, 3, 28, 28) and inputs["pixel_values"].dtype == torch.float32
    assert inputs["frame_times"] == [[float(second) for second in range(12)]]
    assert inputs["placeholder_clips"] == [[0]]
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 12
    words = processor.qformer_tokenizer("When does the red square appear?").input_ids
    assert inputs["qformer_input_ids"].tolist() == [words]
    assert "vid_times" not in inputs and "frame_indices" not in inputs


def test_sampling_options_reach_the_video_processor(processor, clip):
    chat = [user({"type": "video", "video": str(clip)}, text("What?"))]
    for options, count in [({"fps": 2}, 24), ({"num_frames": 5}, 5), ({"max_frames": 4}, 4)]:
        inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_metadata=True, **options)
        assert len(inputs["frame_times"][0]) == len(inputs["frame_indices"][0]) == count


def test_placeholders_of_one_turn_share_its_question(processor, image):
    chat = [
        user(text("First."), {"type": "image", "image": image}),
        {"role": "assistant", "content": "Yes."},
        user({"type": "image", "image": image}, {"type": "image", "image": image.rotate(90)}, text("Second?")),
    ]
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True)
    texts = processor.qformer_tokenizer.batch_decode(inputs["qformer_input_ids"], skip_special_tokens=True)
    assert [words.replace(" ", "") for words in texts] == ["first.", "second?", "second?"]
    assert inputs["placeholder_clips"] == [[0, 0, 1]], "the same image object is encoded once"
    prompt = processor.apply_chat_template(chat)
    assert "First.\n<image><|end|>" in prompt and "<image>\n<image>\nSecond?" in prompt


def test_a_clip_is_shared_over_a_batch(processor, clip):
    chats = [[user({"type": "video", "path": str(clip)}, text(question))] for question in ("When?", "Where is it?")]
    inputs = processor.apply_chat_template(chats, tokenize=True, return_dict=True)
    assert inputs["pixel_values"].shape[0] == 12 and inputs["placeholder_clips"] == [[0], [0]]
    assert inputs["input_ids"].shape[0] == 2 and inputs["attention_mask"].sum(1).unique().numel() == 2


@pytest.mark.parametrize(
    "videos", [["a", "b", "c"], [["a", "b"], ["c"]], [["a", "b"], "c"]], ids=["flat", "nested", "mixed"]
)
def test_clips_may_be_flat_or_by_prompt(processor, image, videos):
    pictures = {name: image.rotate(angle) for name, angle in zip("abc", (0, 90, 180), strict=True)}
    clips = [[pictures[n] for n in v] if isinstance(v, list) else pictures[v] for v in videos]
    inputs = processor(["<image><image>\nx", "<image>\ny"], videos=clips, qformer_text=["x", "x", "y"])
    assert inputs["placeholder_clips"] == [[0, 1], [2]]


def test_frames_without_a_list_around_them_are_one_clip(processor):
    frames = [PIL.Image.fromarray(np.full((30, 30, 3), value, np.uint8)) for value in (10, 20, 30)]
    options = {"qformer_text": "x", "video_metadata": [{"frame_times": [0.0, 0.5, 2.0]}]}
    inputs = processor("<image>\nx", videos=frames, **options)
    assert inputs["frame_times"] == [[0.0, 0.5, 2.0]]


def test_src_becomes_vid_times(processor, clip):
    chat = [user({"type": "video", "path": str(clip)}, text("What is between <vid> and <vid> ?"))]
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, src=[1.25, 3])
    assert inputs["vid_times"] == [[1.25, 3]]
    assert int((inputs["input_ids"] == processor.match_token_id).sum()) == 2


def test_casting_leaves_times_exact(processor, clip):
    chat = [user({"type": "video", "path": str(clip)}, text("After <vid> ?"))]
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, src=[1 / 3]).to(torch.bfloat16)
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert inputs["vid_times"] == [[1 / 3]] and inputs["frame_times"][0][11] == 11.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": "<image>\nx", "qformer_text": "x"}, r"1 <image> placeholders, but got 0 clips"),
        ({"text": "<image>\nx", "videos": ["I"]}, r"1 <image> placeholders, but got 0 qformer_texts"),
        ({"text": "x", "videos": ["I"]}, r"0 <image> placeholders, but got 1 clips"),
        ({"text": "<image><image>", "videos": ["I"], "qformer_text": ["x", "y"]}, "got 1 clips"),
        ({"text": "<image>", "videos": ["I"], "qformer_text": ["x", "y"]}, "must be a text"),
        ({"text": ["<image>", "<image>"], "videos": ["I"], "qformer_text": ["x", "y"]}, r"got \[1, 0\] clips"),
        ({"text": ["<image>", "<image>"], "videos": ["I", "I"], "qformer_text": "x"}, "give a list of qformer_texts"),
        ({"text": "<image>", "videos": ["I"], "qformer_text": 5}, "must be a text"),
        ({"text": "<image> <vid>", "videos": ["I"], "qformer_text": "x"}, r"1 <vid>, but src gives 0"),
        ({"text": "<image>", "videos": ["I"], "qformer_text": "x", "src": [1.0]}, r"0 <vid>, but src gives 1"),
        ({"text": "<image> <vid>", "videos": ["I"], "qformer_text": "x", "src": [-1.0]}, "src holds -1.0 s"),
        ({"text": "<image> <vid>", "videos": ["I"], "qformer_text": "x", "src": [2.0]}, "lasts from 0 to 0.00 s"),
        ({"text": "<vid>", "src": [2.0]}, "no clip"),
        ({"text": ["<vid>", "x"], "src": [[2.0]]}, "times for 1 prompts"),
    ],
)
def test_counts_and_times_are_checked(processor, image, arguments, message):
    if "videos" in arguments:
        arguments = arguments | {"videos": [image] * len(arguments["videos"])}
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([user({"type": "video"}, text("x"))], "exactly one of"),
        ([user({"type": "video", "path": "a", "url": "b"}, text("x"))], "exactly one of"),
        ([user({"type": "audio", "path": "a"})], "audio"),
        ([user(text("x")), {"role": "assistant", "content": [{"type": "image", "image": 1}]}], "only users"),
        ([user(text("x")), user(text("y"))], "alternate"),
    ],
)
def test_messages_are_checked(processor, chat, message):
    with pytest.raises(Exception, match=message):
        processor.apply_chat_template(chat, tokenize=True, return_dict=True)


def test_assistant_masks_cover_answers_and_their_end(processor, clip):
    chat = [
        user({"type": "video", "path": str(clip)}, text("When?")),
        {"role": "assistant", "content": "At <vid> seconds."},
        user(text("Sure?")),
        {"role": "assistant", "content": "Yes."},
    ]
    inputs = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, src=[3.0]
    )
    kept = inputs["input_ids"][0][inputs["assistant_masks"][0].bool()]
    assert processor.tokenizer.decode(kept).replace(" ", "") == "At<vid>seconds.<|end|>Yes.<|end|>"


def test_time_tags_tell_each_frame_its_time(converted, clip):
    processor = ETChatProcessor.from_pretrained(converted)
    processor.use_time_tag = True
    chat = [user({"type": "video", "path": str(clip)}, text("When?"))]
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, fps=2)
    expected = processor.qformer_tokenizer([f"Current time: {t / 2}s. When?" for t in range(24)], padding=True)
    assert inputs["qformer_input_ids"].tolist() == expected.input_ids


def test_long_questions_lose_their_beginning(processor, image):
    words = " ".join(f"{number}" for number in range(400))
    inputs = processor("<image>\nx", videos=[image], qformer_text=words)
    ids = inputs["qformer_input_ids"][0].tolist()
    tokens = processor.qformer_tokenizer.convert_ids_to_tokens(ids)
    assert len(ids) == 256 and tokens[0] == "[CLS]" and tokens[-1] == "[SEP]"
    assert "".join(tokens[-4:-1]).replace("##", "").endswith("399")


def test_round_trip(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    for again in (ETChatProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert again.chat_template == processor.chat_template
        assert (again.match_token_id, again.image_token_id) == (processor.match_token_id, processor.image_token_id)
        assert len(again.tokenizer) == len(processor.tokenizer), "tokens are registered once"
        assert again.video_processor.to_dict() == processor.video_processor.to_dict()
        assert again.qformer_tokenizer.truncation_side == "left"


def answer(processor, words: str, frames: list[int], step: float = 1.0) -> dict:
    ids = processor.tokenizer(words, add_special_tokens=False).input_ids
    columns = [column for column, token in enumerate(ids) if token == processor.match_token_id]
    spread = torch.full((20,), 0.02)
    matches = [VidMatch(column, frame, frame * step, spread) for column, frame in zip(columns, frames, strict=True)]
    outputs = ETChatGenerateOutput(sequences=torch.tensor([ids]), matches=[matches], prompt_length=0)
    return processor.post_process(outputs)[0]


@pytest.mark.parametrize(
    ("words", "frames", "expected", "spans"),
    [
        ("from <vid> to <vid> seconds.", [3, 7], "from 3 to 7 seconds", [[3.0, 7.0]]),
        ("<vid> - <vid>, <vid> - <vid>", [1, 2, 4, 3], "1 - 2, 4 - 3", [[1.0, 2.0], [4.0, 3.0]]),
        ("between <vid> and <vid>", [1, 2], "between 1 and 2", [[1.0, 2.0]]),
        ("at <vid> and <vid>", [1, 2], "at 1 and 2", []),
        ("at <vid>", [5], "at 5", []),
        ("no time", [], "no time", []),
    ],
)
def test_answers_are_read(processor, words, frames, expected, spans):
    result = answer(processor, words + "<|end|>", frames)
    assert re.sub(r"[ .]", "", result["text"]) == re.sub(r"[ .]", "", expected)
    assert result["spans"] == spans and result["frames"] == frames
    assert result["timestamps"] == [float(frame) for frame in frames]
    assert result["confidences"] == pytest.approx([0.02] * len(frames))


def test_a_generated_placeholder_is_not_part_of_the_answer(processor):
    """The original's tokenizer has no such token: it decodes to nothing."""
    result = answer(processor, "At<image> <vid><image>", [2])
    assert "<image>" not in result["text"] and "<image>" not in result["raw_text"]


def test_arguments_may_be_grouped_and_none_is_swallowed(processor, clip):
    inputs = processor("<image>\nx", videos=str(clip), qformer_text="x", videos_kwargs={"fps": 2})
    assert len(inputs["frame_times"][0]) == 24
    every = processor("<image>\nx", videos=str(clip), qformer_text="x", do_sample_frames=False)
    assert len(every["frame_times"][0]) == 120
    for wrong in ({"fsp": 2}, {"images": [1]}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            processor("<image>\nx", videos=str(clip), qformer_text="x", **wrong)


def test_seconds_are_rounded_in_the_text_only(processor):
    result = answer(processor, "<vid> <vid>", [3, 5], step=0.7)
    assert result["text"].split() == ["2.1", "3.5"]
    assert result["timestamps"] == [3 * 0.7, 5 * 0.7]
    assert answer(processor, "<vid>", [1], step=2.96)["text"] == "3"


def test_ids_alone_are_no_answer(processor):
    with pytest.raises(TypeError, match="return_dict_in_generate=True"):
        processor.post_process(torch.tensor([[1, 2, 3]]))
