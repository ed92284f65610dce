"""One video, one question, one answer with seconds: what `etchat ask` does, for Python."""

from pathlib import Path

import torch
from transformers import AutoConfig
from transformers.utils import logging

from .modeling_etchat import ETChatForConditionalGeneration
from .processing_etchat import ETChatProcessor

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHOWN_KEYS = 3


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
    with _quiet():
        network, info = ETChatForConditionalGeneration.from_pretrained(
            model, dtype=DTYPES.get(dtype, dtype), output_loading_info=True
        )
    check_complete(model, info)
    if dtype == "auto" and device.type == "cpu" and network.dtype == torch.float16:
        network = network.float()
    return network.to(device).eval(), ETChatProcessor.from_pretrained(model)


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
    if not folder.exists() and (folder.is_absolute() or str(model).count("/") != 1):
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
    video: str | Path,
    question: str,
    src: list[float] | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    max_new_tokens: int = 2048,
) -> dict:
    """
    Asks one question about one video, greedily and so reproducibly.

    Args:
        video (`str` or `Path`): video or image file.
        question (`str`): the question, with `<vid>` where a time of `src` belongs.
        src (`list` of `float`, *optional*): seconds of each `<vid>` of the question, in order.
        fps (`float`, *optional*): frames sampled per second; default: as the model was trained.
        max_frames (`int`, *optional*): budget that lowers the rate for longer videos.
        max_new_tokens (`int`, *optional*, defaults to 2048): longest answer.

    Returns:
        `dict`: `answer` (each `<vid>` replaced by its seconds, rounded to 0.1); `timestamps` (seconds), `confidences`
        and `frames` (index among the sampled frames) of each `<vid>`; `spans` (`[start, end]` in seconds); `duration`
        of the video (seconds), `fps` at which it was sampled, `num_frames`, `frame_indices` (sampled frames of the
        file) and `frame_times` (their seconds since the first).

    Raises:
        FileNotFoundError, ValueError: if the video cannot be read, or question, times and model do not go together.
    """
    if src and not model.config.use_matching:
        raise ValueError("--src gives times, but this model was trained without <vid> matching.")
    content = [{"type": "video", "path": str(video)}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        src=src,
        return_metadata=True,
        fps=fps,
        max_frames=max_frames,
    )
    (metadata,), (indices,), (times,) = (
        inputs.pop("video_metadata"),
        inputs.pop("frame_indices"),
        inputs["frame_times"],
    )
    room = _check_context(model, inputs["input_ids"].shape[1], len(times))
    outputs = model.generate(
        **inputs.to(model.device),
        max_new_tokens=min(max_new_tokens, room),
        do_sample=False,
        return_dict_in_generate=True,
    )
    (answer,) = processor.post_process(outputs)
    rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else fps or processor.video_processor.fps
    return {
        "answer": answer.pop("text"),
        **answer,
        "duration": metadata["duration"],
        "fps": rate,
        "num_frames": len(times),
        "frame_indices": indices,
        "frame_times": times,
    }


def _check_context(model, prompt_length: int, num_frames: int) -> int:
    limit = model.config.text_config.max_position_embeddings
    if prompt_length >= limit:
        raise ValueError(
            f"The prompt takes {prompt_length} tokens, {num_frames} of them frames; the model reads at most {limit}: "
            "lower --fps or set --max-frames."
        )
    return limit - prompt_length


class _quiet:
    """Silences transformers' loading report: `check_complete` raises where that one only warns."""

    def __enter__(self):
        self.level = logging.get_verbosity()
        logging.set_verbosity_error()

    def __exit__(self, *_):
        logging.set_verbosity(self.level)
