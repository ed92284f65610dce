"""What a user with real weights runs first: is this checkpoint whole, and does it answer?"""

import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from .inference import ask, load

QUESTION = "When does the red square appear?"
CLIP_SECONDS, APPEARS, DISAPPEARS = 12, 4, 8


def verify(model: str | Path, dtype: str = "auto", device: str | None = None) -> Iterator[str]:
    """
    Loads a converted checkpoint strictly, builds a prompt and asks a fixed question about a generated clip.

    Args:
        model, dtype, device: see [`load`].

    Yields:
        `str`: a line of the report at a time.

    Raises:
        FileNotFoundError, ValueError: see [`load`]; the first thing that is wrong ends the report.
    """
    network, processor = load(model, dtype, device)
    config = network.config
    tensors = list(network.state_dict().values())
    parameters = sum(tensor.numel() for tensor in tensors)
    yield f"load: ok, {len(tensors)} tensors, none missing; {parameters:,} numbers, {network.dtype}, {network.device}"
    yield (
        f"model: {config.text_config.model_type}, {config.projector_type} projector, "
        f"{config.vision_config.num_hidden_layers} vision blocks, matching {_on(config.use_matching)}, "
        f"bi_attention {_on(config.bi_attention)}, {config.fps:g} fps"
    )
    yield f"tokens: <vid> {processor.match_token_id}, <image> {processor.image_token_id}"
    if config.use_matching and processor.match_token_id != config.match_token_id:
        raise ValueError(
            f"{model}: the tokenizer's <vid> is {processor.match_token_id}, config.json's is {config.match_token_id}."
        )
    prompt = processor.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True)
    yield f"prompt: {prompt!r}"
    yield f"prompt ids: {processor.tokenizer(prompt).input_ids}"
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mp4"
        write_clip(clip)
        answer = ask(network, processor, clip, QUESTION, max_new_tokens=64)
    yield f"clip: {CLIP_SECONDS} s, {answer['num_frames']} frames, a red square from {APPEARS} to {DISAPPEARS} s"
    yield f"question: {QUESTION}"
    yield f"answer: {answer['answer']!r}"
    yield f"timestamps: {[round(seconds, 2) for seconds in answer['timestamps']]} s"


def write_clip(path: str | Path, fps: int = 25, size: int = 224):
    """
    Writes the clip of [`verify`]: H.264, `CLIP_SECONDS` long, grey, a red square from `APPEARS` to `DISAPPEARS`.

    Args:
        fps (`int`): frames per second.
        size (`int`): width and height, in pixels.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for index in range(CLIP_SECONDS * fps):
            picture = np.full((size, size, 3), 128, dtype=np.uint8)
            if APPEARS <= index / fps < DISAPPEARS:
                picture[size // 4 : size // 2, size // 4 : size // 2] = (220, 30, 30)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _on(flag: bool) -> str:
    return "on" if flag else "off"
