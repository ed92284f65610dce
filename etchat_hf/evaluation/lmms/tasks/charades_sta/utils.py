"""What the YAML file of Charades-STA names. Scores are those of `evaluate_charades`."""

import json
import re

from datasets import Dataset

from .... import evaluate_charades
from ....tasks import CHARADES, Answer
from ..docs import dataset_kwargs, make_docs, setting, show_video

ANNOTATIONS, VIDEOS = "CHARADES_STA_ANNOTATIONS", "CHARADES_STA_VIDEOS"
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def __getattr__(name: str) -> dict:
    # Read when the task is loaded, so that this module can be imported without the data set.
    if name == "DATASET_KWARGS":
        return dataset_kwargs(ANNOTATIONS, VIDEOS, splits=["test"])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def process_docs(dataset: Dataset) -> Dataset:
    """The lines of the annotation file as docs."""
    return make_docs(CHARADES, CHARADES.read(setting(ANNOTATIONS)))


def doc_to_visual(doc: dict) -> list[str]:
    """The path of the doc's video."""
    return show_video(doc, VIDEOS)


def process_results(doc: dict, results: list[str]) -> dict[str, dict]:
    """The annotation with its answer, once for each metric.

    The harness passes on text only, so the times are the numbers of the answer as they come, rounded to 0.1 s where
    `etchat infer` has the matched frames' own.
    """
    times = [float(number) for number in NUMBER.findall(results[0])]
    row = CHARADES.fill(json.loads(doc["annotation"]), Answer(results[0], times))
    return dict.fromkeys(("R1@0.3", "R1@0.5", "R1@0.7", "mIoU", "failed"), row)


def recall_at_03(rows: list[dict]) -> float:
    """Share of answers with IoU of at least 0.3."""
    return evaluate_charades(rows)["R1@0.3"]


def recall_at_05(rows: list[dict]) -> float:
    """Share of answers with IoU of at least 0.5."""
    return evaluate_charades(rows)["R1@0.5"]


def recall_at_07(rows: list[dict]) -> float:
    """Share of answers with IoU of at least 0.7."""
    return evaluate_charades(rows)["R1@0.7"]


def mean_iou(rows: list[dict]) -> float:
    """Mean IoU."""
    return evaluate_charades(rows)["mIoU"]


def failed(rows: list[dict]) -> int:
    """How many answers were not two times."""
    return evaluate_charades(rows)["failed"]
