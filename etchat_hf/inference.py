"""One video, one question, one answer with seconds: what `etchat ask` does, for Python."""

import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import AutoConfig
from transformers.utils import logging

from .modeling_etchat import ETChatForConditionalGeneration
from .processing_etchat import VID_TOKEN, EncodedClip, ETChatProcessor

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHOWN_KEYS = 3
WINDOW_KEYS = ("answer", "timestamps", "confidences", "spans")
LIST_KEYS = ("timestamps", "confidences", "frames")
# Tokens of the context that frames leave free by default: 256 for the prompt's text, 256 for the answer.
TEXT_ROOM = 512


def load(model: str | Path, dtype: str = "auto", device: str | None = None):
    """
    Loads a converted checkpoint, strictly.

    Args:
        model (`str` or `Path`): its folder or Hub id.
        dtype (`str`, *optional*, defaults to `"auto"`): `"float32"`, `"float16"`, `"bfloat16"`, or `"auto"`: as
            stored, but float32 for a float16 checkpoint on a CPU, which has no fast half-precision kernels.
        device (`str`, *optional*): as for `torch.device`; default: a GPU where there is one.

    Returns:
        `tuple`: the [`ETChatForConditionalGeneration`], in evaluation mode, and the [`ETChatProcessor`].

    Raises:
        FileNotFoundError: if the folder or its config.json does not exist.
        ValueError: if it is no converted checkpoint, or its tensors are not exactly the model's.
    """
    check_is_converted(model)
    device = _find_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be auto or one of {', '.join(DTYPES)}.")
    try:
        with _quiet():
            network, info = ETChatForConditionalGeneration.from_pretrained(
                model, dtype=DTYPES.get(dtype, dtype), output_loading_info=True, ignore_mismatched_sizes=True
            )
        processor = ETChatProcessor.from_pretrained(model)
    except (SafetensorError, RuntimeError, StrictDataclassError) as error:
        raise ValueError(f"{model} cannot be loaded: {error}") from error
    check_complete(model, info)
    if dtype == "auto" and device.type == "cpu" and network.dtype == torch.float16:
        network = network.float()
    return network.to(device).eval(), processor


def _find_device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what torch raises differs by backend
        raise ValueError(f"device {name!r} is not there: {str(error).splitlines()[0]}") from error
    return device


def check_is_converted(model: str | Path):
    """
    Raises:
        FileNotFoundError: if a folder is meant, but it or its config.json does not exist.
        ValueError: if the configuration is not that of a converted checkpoint.
    """
    folder = Path(model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{model} holds no config.json; give a folder that `etchat convert` wrote.")
    if not folder.exists() and not _is_hub_id(str(model)):
        raise FileNotFoundError(f"{model} does not exist, and is not a Hub id of the form user/name.")
    if folder.is_file():
        raise ValueError(f"{model} is a file; give the folder of a converted checkpoint, or a Hub id.")
    config, _ = AutoConfig.for_model("etchat").get_config_dict(model)
    model_type = config.get("model_type", "")
    if model_type.startswith("etchat_"):
        raise ValueError(
            f"{model} is an original checkpoint ({model_type}); convert it first: etchat convert {model} DST"
        )
    if model_type != "etchat":
        raise ValueError(f"{model} has model_type {model_type!r} in its config.json; expected 'etchat'.")


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def check_complete(model: str | Path, info: dict):
    """
    Raises:
        ValueError: if `from_pretrained`'s loading info names a tensor that is missing, surplus or misshapen.
    """
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(str(key) for key in info[kind]):
            more = f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else ""
            raise ValueError(f"{model} has {kind.replace('_', ' ')}: {', '.join(keys[:SHOWN_KEYS])}{more}.")


def ask(
    model: ETChatForConditionalGeneration,
    processor: ETChatProcessor,
    video,
    question: str,
    src: list[float] | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    max_new_tokens: int = 2048,
) -> dict:
    """
    Asks one question about one clip, greedily and so reproducibly.

    Args:
        video: a clip, such as the path of a video; or an [`EncodedClip`], to ask several questions about it;
            [`ClipEncoder`] also keeps these on disk.
        question (`str`): the question, with `<vid>` where a time of `src` belongs.
        src (`list` of `float`, *optional*): seconds of each `<vid>` of the question, in order.
        fps (`float`, *optional*): frames sampled per second; default: as the model was trained.
        max_frames (`int`, *optional*): budget that lowers the rate for longer videos, with a warning; default: what
            fits the model's context beside some text.
        max_new_tokens (`int`, *optional*, defaults to 2048): longest answer.

    Returns:
        `dict`: `answer` (each `<vid>` replaced by its seconds, rounded to 0.1); `timestamps` (seconds), `confidences`
        and `frames` (index among the sampled frames) of each `<vid>`; `spans` (`[start, end]` in seconds); `duration`
        of the video (seconds), `fps` at which it was sampled, `num_frames`, `frame_indices` (sampled frames of the
        file) and `frame_times` (their seconds since the first).

    Raises:
        FileNotFoundError, ValueError: if the video cannot be read, or question, times and model do not go together.
    """
    return Chat(model, processor, video, fps=fps, max_frames=max_frames).ask(question, src, max_new_tokens)


def ask_each(
    model: ETChatForConditionalGeneration,
    processor: ETChatProcessor,
    video,
    questions: Sequence[str],
    src: list[float] | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    max_new_tokens: int = 2048,
) -> Iterator[dict]:
    """
    Asks questions about one clip, which is encoded once; none knows of the others.

    Args:
        questions (`list` of `str`): the questions.
        src (`list` of `float`, *optional*): seconds of each `<vid>` of all questions, in order.
        others: see [`ask`].

    Yields:
        `dict`: of each question in turn what [`ask`] returns.

    Raises:
        FileNotFoundError, ValueError: as [`ask`].
    """
    times = share_times(questions, src)
    clip = Chat(model, processor, video, fps, max_frames).clip
    for question, mine in zip(questions, times, strict=True):
        yield Chat(model, processor, clip, fps).ask(question, mine, max_new_tokens)


def share_times(questions: Sequence[str], src: list[float] | None) -> list[list[float]]:
    """The times of each question: as many as it holds `<vid>`; ValueError unless that uses up `src`."""
    counts, times = [question.count(VID_TOKEN) for question in questions], list(src or [])
    if sum(counts) != len(times):
        raise ValueError(
            f"The questions hold {sum(counts)} {VID_TOKEN}, but src gives {len(times)} times; give one each."
        )
    rest = iter(times)
    return [list(islice(rest, count)) for count in counts]


def ask_windows(
    model: ETChatForConditionalGeneration,
    processor: ETChatProcessor,
    video,
    question: str,
    window: float,
    overlap: float = 0.0,
    fps: float | None = None,
    max_new_tokens: int = 2048,
) -> dict:
    """
    Asks one question about a long video, window by window in one batch; times are those of the whole video.

    Args:
        window, overlap (`float`): length of a window and what it shares with the next, in seconds.
        others: see [`ask`].

    Returns:
        `dict`: as [`ask`]; `answer` has a line per window. `spans` that overlap, as where two windows saw the same
        event, are merged. `windows` holds each window's `start`, `end`, `answer`, `timestamps`,
        `confidences` and `spans`.

    Raises:
        FileNotFoundError, ValueError: as [`ask`]; also if a window is not longer than its overlap.
    """
    check_windows(window, overlap)
    clip = _encoded(model, processor, video, fps, max_frames=sys.maxsize)  # each window is its own prompt
    starts = np.arange(0.0, max(clip.metadata["duration"] - overlap, 1e-9), window - overlap).tolist()
    parts = [(start, clip.window(start, start + window)) for start in starts]
    parts = [(start, part) for start, part in parts if part.frame_times]
    inputs = processor.apply_chat_template(
        [[_user(question, part)] for _, part in parts],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )
    outputs = _generate(model, inputs, max_new_tokens, "lower --window or --fps")
    first = [clip.frame_indices.index(part.frame_indices[0]) for _, part in parts]
    outputs.matches = [
        [replace(match, seconds=clip.frame_times[at + match.frame]) for match in matches]
        for at, matches in zip(first, outputs.matches, strict=True)
    ]
    answers = processor.post_process(outputs)
    for at, answer in zip(first, answers, strict=True):
        answer["answer"], answer["frames"] = answer.pop("text"), [at + frame for frame in answer["frames"]]
    windows = [
        {"start": start, "end": start + part.metadata["duration"], **{key: answer[key] for key in WINDOW_KEYS}}
        for (start, part), answer in zip(parts, answers, strict=True)
    ]
    return {
        "answer": "\n".join(f"[{part['start']:g} - {part['end']:g} s] {part['answer']}" for part in windows),
        **{key: [value for answer in answers for value in answer[key]] for key in LIST_KEYS},
        "spans": merge_spans([span for part in windows for span in part["spans"]]),
        "windows": windows,
        **_sampling(clip, fps, processor),
    }


def check_windows(window: float, overlap: float):
    """ValueError unless windows of so many seconds, which share `overlap` of them, can follow each other."""
    if not 0 <= overlap < window:
        raise ValueError(f"window is {window} s and overlap {overlap} s; a window must be longer than its overlap.")


def merge_spans(spans: list[list[float]]) -> list[list[float]]:
    """The union of `[start, end]` spans in seconds, in order; a reversed one counts as if its ends were swapped."""
    merged = []
    for start, end in sorted(sorted(span) for span in spans):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return merged


class Chat:
    """
    A conversation about one clip, whose frames are encoded once.

    It goes on for as long as one turn fits the model's context: where a question and an answer of `max_new_tokens`,
    but at most 256 or a quarter of the context, would not fit behind all others, the oldest turns are left out for
    good, with a warning.

    Args:
        model, processor: see [`load`].
        video: see [`ask`].
        fps, max_frames: see [`ask`].
        reinsert_clip (`bool`, *optional*, defaults to `True`): whether every turn shows the clip again, compressed for
            its own question, as the model was trained; else later turns keep the frames as they are, compressed for
            the oldest question that is not left out.

    Attributes:
        messages (`list` of `dict`): the conversation that the next turn will follow, with its clip.
        times (`list` of `float`): seconds of each `<vid>` in it, in order.
        left_out (`int`): how many turns have been left out.
    """

    def __init__(self, model, processor, video, fps=None, max_frames=None, reinsert_clip: bool = True):
        self.model, self.processor, self.reinsert_clip = model, processor, reinsert_clip
        if max_frames is None:
            max_frames = frame_budget(model, processor)
        self.clip = _encoded(model, processor, video, fps, max_frames)
        self.fps = fps
        self.messages, self.times, self.left_out = [], [], 0

    def ask(self, question: str, src: list[float] | None = None, max_new_tokens: int = 2048) -> dict:
        """One turn: arguments, result and errors as [`ask`]'s. One that raises leaves the conversation as it was."""
        if src and not self.model.config.use_matching:
            raise ValueError("src gives times, but this model was trained without <vid> matching.")
        if (count := question.count(VID_TOKEN)) != len(src or []):
            raise ValueError(f"The question holds {count} <vid>, but src gives {len(src or [])} times; give one each.")
        asked = [*self.messages, _user(question, None if self.messages else self.clip)]
        messages, times, inputs = self._newest_that_fit(asked, [*self.times, *(src or [])], max_new_tokens)
        outputs = _generate(self.model, inputs, max_new_tokens, "lower --fps, set --max-frames")
        (answer,) = self.processor.post_process(outputs)
        answer = {"answer": answer.pop("text"), **answer}
        left_out = self.left_out + (len(asked) - len(messages)) // 2
        if left_out > self.left_out:
            self._warn_of_turns(self.left_out + 1, left_out)
        self.messages = [*messages, {"role": "assistant", "content": answer.pop("raw_text")}]
        self.times = [*times, *answer["timestamps"]]
        self.left_out = left_out
        return answer | _sampling(self.clip, self.fps, self.processor)

    def _newest_that_fit(self, messages: list[dict], times: list[float], max_new_tokens: int):
        """The messages, without the oldest turns where need be, the times of their `<vid>`, and their prompt."""
        limit = _context(self.model)
        room = limit - min(max_new_tokens, (limit - frames_that_fit(limit)) // 2)
        inputs = self._prompt(messages, times)
        while inputs["input_ids"].shape[1] > room and len(messages) > 1:
            times = times[sum(_text(message).count(VID_TOKEN) for message in messages[:2]) :]
            messages = [_user(_text(messages[2]), self.clip), *messages[3:]]
            inputs = self._prompt(messages, times)
        return messages, times, inputs

    def _prompt(self, messages: list[dict], times: list[float]):
        with _quiet():
            return self.processor.apply_chat_template(
                messages,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                src=times,
                reinsert_clips=self.reinsert_clip,
            )

    def _warn_of_turns(self, first: int, last: int) -> None:
        turns = f"turn {first} of it is" if first == last else f"turns {first} to {last} of it are"
        text = f"The conversation no longer fits the {_context(self.model)} tokens that the model reads"
        warnings.warn(f"{text}: {turns} left out from now on", stacklevel=3)


def frames_that_fit(context: int) -> int:
    """How many frames a question may be about, for a language model that reads `context` tokens."""
    return context - min(TEXT_ROOM, context // 2)


def frame_budget(model, processor) -> int:
    """How many frames a clip has at most by default: what the processor says, and what fits the model's context."""
    room = frames_that_fit(_context(model))
    return min(room, processor.video_processor.max_frames or room)


def _context(model) -> int:
    return model.config.text_config.max_position_embeddings


def _encoded(model, processor, video, fps: float | None, max_frames: int | None) -> EncodedClip:
    if isinstance(video, EncodedClip):
        return video
    return processor.encode(video, model, fps=fps, max_frames=max_frames)


def _user(question: str, clip: EncodedClip | None) -> dict:
    shown = [{"type": "video", "video": clip}] if clip is not None else []
    return {"role": "user", "content": [*shown, {"type": "text", "text": question}]}


def _text(message: dict) -> str:
    content = message["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def _generate(model, inputs, max_new_tokens: int, fewer_frames: str):
    """Answers; ValueError, which names the way to `fewer_frames`, if a prompt leaves no room for a token of them."""
    prompt_length, limit = inputs["input_ids"].shape[1], _context(model)
    if prompt_length >= limit:
        frames = int((inputs["input_ids"] == model.config.image_token_id).sum(dim=1).max())
        too_long = "the question is too long; shorten it"
        advice = too_long if prompt_length - frames >= limit else f"{fewer_frames}, or shorten the question"
        raise ValueError(
            f"The prompt takes {prompt_length} tokens, {frames} of them frames; the model reads at most {limit}: "
            f"{advice}."
        )
    return model.generate(
        **inputs.to(model.device),
        max_new_tokens=min(max_new_tokens, limit - prompt_length),
        do_sample=False,
        return_dict_in_generate=True,
    )


def _sampling(clip: EncodedClip, fps: float | None, processor) -> dict:
    times = clip.frame_times
    return {
        "duration": clip.metadata["duration"],
        "fps": (len(times) - 1) / times[-1] if len(times) > 1 else fps or processor.video_processor.fps,
        "num_frames": len(times),
        "frame_indices": clip.frame_indices,
        "frame_times": times,
    }


class _quiet:
    """
    Silences transformers' loading report, as `check_complete` raises where that one only warns; and its remark on long
    prompts, which are shortened or refused before the model sees them.
    """

    def __enter__(self):
        self.level = logging.get_verbosity()
        logging.set_verbosity_error()

    def __exit__(self, *_):
        logging.set_verbosity(self.level)
