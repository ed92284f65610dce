"""What the toy model answers about unseen videos, and how good that is."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ..evaluation.answers import read_letter
from ..evaluation.metrics import mean, pairwise_iou
from ..modeling_etchat import ETChatForConditionalGeneration
from ..processing_etchat import ETChatProcessor
from .annotations import SPAN_TASKS

BATCH_SIZE = 16


@torch.no_grad()
def answer_rows(
    model: str | Path, rows: list[dict], videos: Path, track: Callable[[Iterable, str], Iterable]
) -> list[dict]:
    """
    Answers the questions of annotation rows.

    Args:
        model (`str` or `Path`): folder of a toy model.
        rows (`list` of `dict`): annotations in the format of training data.
        videos (`Path`): folder of their videos.
        track (`Callable`): shows the progress of an iterable; gets it and a description.

    Returns:
        `list` of `dict`: what [`ETChatProcessor.post_process`] returns for each.
    """
    network = ETChatForConditionalGeneration.from_pretrained(model).eval()
    processor = ETChatProcessor.from_pretrained(model)
    answers = []
    for start in track(range(0, len(rows), BATCH_SIZE), "unseen videos"):
        part = rows[start : start + BATCH_SIZE]
        inputs = processor.apply_chat_template(
            [_messages(row, videos) for row in part],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            src=[row.get("src") for row in part],
        )
        outputs = network.generate(**inputs, max_new_tokens=80, return_dict_in_generate=True)
        answers += processor.post_process(outputs)
    return answers


def _messages(row: dict, videos: Path) -> list[dict]:
    question = row["conversations"][0]["value"].removeprefix("<image>\n")
    clip = {"type": "video", "path": str(videos / row["video"])}
    return [{"role": "user", "content": [clip, {"type": "text", "text": question}]}]


def score_rows(rows: list[dict], answers: list[dict]) -> dict:
    """
    Scores answers.

    Args:
        rows (`list` of `dict`): annotations.
        answers (`list` of `dict`): see [`answer_rows`].

    Returns:
        `dict` with `mIoU` and `R@0.7` over the questions of the span tasks, and `tasks`: for each task how many
        questions, and the mean IoU, or the share that is right: the moment within a second, or the letter.
    """
    pairs = {}
    for row, answer in zip(rows, answers, strict=True):
        pairs.setdefault(row["task"], []).append((row, answer))
    ious = [_iou(*pair) for task in SPAN_TASKS for pair in pairs.get(task, [])]
    return {
        "mIoU": mean(ious),
        "R@0.7": mean([float(iou >= 0.7) for iou in ious]),
        "tasks": {task: (len(part), _score_task(task, part)) for task, part in pairs.items()},
    }


def _iou(row: dict, answer: dict) -> float:
    """
    The mean IoU of an answer's spans with the annotated ones, paired in order; one that is missing or too many counts
    as 0. Stricter than E.T. Bench, which asks whether a span matches any.
    """
    truth = list(zip(row["tgt"][::2], row["tgt"][1::2], strict=True))
    found = zip(answer["spans"], truth, strict=False)
    return sum(float(pairwise_iou([a], [b])[0, 0]) for a, b in found) / max(len(answer["spans"]), len(truth))


def _score_task(task: str, pairs: list[tuple[dict, dict]]) -> float:
    if task in SPAN_TASKS:
        return mean([_iou(*pair) for pair in pairs])
    is_right = _is_right_letter if task == "rar" else _is_right_moment
    return mean([float(is_right(row, answer)) for row, answer in pairs])


def _is_right_letter(row: dict, answer: dict) -> bool:
    return read_letter(answer["text"]) == read_letter(row["conversations"][1]["value"])


def _is_right_moment(row: dict, answer: dict) -> bool:
    times = answer["timestamps"]
    return len(times) == 1 and abs(times[0] - row["tgt"][0]) <= 1
