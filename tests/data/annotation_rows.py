"""Rows in the original's annotation format, the processor of a tiny checkpoint, and `etchat` in this process."""

import contextlib
import io
import json
from pathlib import Path
from typing import NamedTuple

from transformers import AutoTokenizer

from etchat_hf.chat_templates import load_chat_template
from etchat_hf.cli import main
from etchat_hf.conversion.tokens import load_qformer_tokenizer
from etchat_hf.processing_etchat import ETChatProcessor
from etchat_hf.video_processing_etchat import ETChatVideoProcessor

GOLDEN = Path(__file__).parents[1] / "golden"


def make_processor(conv_type: str = "phi3") -> ETChatProcessor:
    return ETChatProcessor(
        ETChatVideoProcessor(size=28, decoder="pyav"),
        AutoTokenizer.from_pretrained(GOLDEN / "phi3_stage3" / "original"),
        load_qformer_tokenizer(str(GOLDEN / "bert"), rows=None),
        chat_template=load_chat_template(conv_type),
    )


def turns(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def video_row(number: int, seconds: int = 4, **fields) -> dict:
    return {
        "id": f"v{number}",
        "video": f"clips/{number % 3}.mp4",
        "duration": float(seconds),
        "tgt": [1, 2.5],
        "conversations": turns(f"<image>\nWhen does event {number} happen?", "From <vid> to <vid> seconds."),
    } | fields


def image_row(number: int) -> dict:
    return {"id": number, "image": "red.png", "conversations": turns("What is this?", "A red square.")}


def text_row(number: int) -> dict:
    return {"id": number, "conversations": turns(f"What is {number}?", "A number.")}


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


class Result(NamedTuple):
    """`output`: standard output and error, as they came."""

    exit_code: int
    output: str


def run(*arguments) -> Result:
    """`etchat ARGUMENTS`."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            return Result(stop.code, output.getvalue())
