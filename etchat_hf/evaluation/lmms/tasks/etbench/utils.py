"""What the YAML files of E.T. Bench name. Scores are those of `evaluate_etbench`."""

import json
import math
import os
from functools import cache, lru_cache
from pathlib import Path

from datasets import Dataset
from loguru import logger

from .... import evaluate_etbench
from ....etbench import CAPTION_TASKS
from ....etbench_tasks import TASKS
from ....similarity import Similarity, get_similarity
from ....tasks import ETBENCH, Answer
from ..docs import dataset_kwargs, make_docs, setting, show_video

ANNOTATIONS, VIDEOS, SIMILARITY = "ETBENCH_ANNOTATIONS", "ETBENCH_VIDEOS", "ETBENCH_SIMILARITY"


def __getattr__(name: str) -> dict:
    # Read when a task is loaded, so that this module can be imported without the data set.
    if name == "DATASET_KWARGS":
        return dataset_kwargs(ANNOTATIONS, VIDEOS, splits=list(TASKS))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def process_docs(dataset: Dataset) -> Dataset:
    """The annotations of one task; the split says which.

    Raises:
        ValueError: If there are none, or one is broken.
    """
    path, task = setting(ANNOTATIONS), str(dataset.split)
    rows = [row for row in _read(path, path.stat().st_mtime_ns) if row.get("task") == task]
    if not rows:
        message = f"{path} holds no row of task {task!r}; leave etbench_{task} and its groups out of --tasks"
        logger.error(message)  # the harness tries again, and then ends with an error that does not name its cause
        raise ValueError(message)
    return make_docs(ETBENCH, rows)


@lru_cache(maxsize=1)
def _read(path: Path, modified: int) -> list[dict]:
    # Kept from one task to the next, so that a warning is given once. `modified` tells a file that was changed.
    rows = ETBENCH.read(path)
    unknown = [row.get("task") for row in rows if row.get("task") not in [*TASKS]]
    if unknown:
        tasks = ", ".join(sorted({f"{task!r:.60}" for task in unknown}))
        logger.warning(f"{path}: {len(unknown)} rows are of unknown tasks, and not asked: {tasks}")
    return rows


def doc_to_visual(doc: dict) -> list[str]:
    """The path of the doc's video."""
    return show_video(doc, VIDEOS)


def process_results(doc: dict, results: list[str]) -> dict[str, dict]:
    """The annotation with its answer, once for each metric: they are figures of the whole data set."""
    row = ETBENCH.fill(json.loads(doc["annotation"]), Answer(results[0]))
    metrics = [TASKS[row["task"]].headline, "Failed"]
    if row["task"] in CAPTION_TASKS:
        metrics.append("Sim")
    return dict.fromkeys(metrics, row)


def headline(rows: list[dict]) -> float:
    """The figure that stands for the task in the published tables: Acc, F1 or mRec, mean over its sources."""
    return _evaluate(rows)["overall"][rows[0]["task"].upper()]


def caption_similarity(rows: list[dict]) -> float:
    """Sentence similarity of matched captions; not a number where the sentence encoder is missing."""
    scores = _evaluate(rows)
    key = f"{rows[0]['task'].upper()}_Sim"
    if key not in scores["overall"]:
        logger.warning(f"{key} is absent: {scores['absent']}")
    return scores["overall"].get(key, math.nan)


def failed(rows: list[dict]) -> int:
    """How many answers could not be read; says what else was wrong with them."""
    scores = _evaluate(rows)
    for kind, names in scores["problems"].items():
        logger.warning(f"{rows[0]['task']}: {kind}: {len(names)}, first {names[0]}")
    return sum(source["Failed"] for source in scores["by_source"][rows[0]["task"]].values())


def _evaluate(rows: list[dict]) -> dict:
    return _evaluate_text(json.dumps(rows), os.environ.get(SIMILARITY, "sentence-transformers"))


@lru_cache(maxsize=1)
def _evaluate_text(rows: str, similarity: str) -> dict:
    # A task's metrics are asked for one after the other, each with a list of its own of the same rows.
    return evaluate_etbench(json.loads(rows), similarity=_similarity(similarity))


@cache
def _similarity(name: str) -> Similarity:
    # Kept: it holds a sentence encoder that all tasks share.
    return get_similarity(name)
