"""Charades-STA: finding the moment that a sentence describes.

Data and metric: Gao et al., "TALL: Temporal Activity Localization via Language Query", ICCV 2017.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .answers import flatten_spans, is_number
from .metrics import mean, pairwise_iou
from .predictions import AnnotationError, Problems, check_rows, default_names, note_doubles, require, score_each

THRESHOLDS = (0.3, 0.5, 0.7)


def _read_prediction(row: dict, name: str, problems: Problems) -> list[float] | None:
    """Returns the predicted span as it comes, or None unless it is exactly two matched frames."""
    if "pred" not in row:
        problems.note("missing answer", name)
        return None
    prediction = row["pred"]
    if prediction is None:
        return None
    if not isinstance(prediction, list | tuple) or not all(map(is_number, prediction)):
        problems.note("answer is not numbers", f"{name}: {prediction!r:.60}")
        return None
    return list(prediction) if len(prediction) == 2 else None


def _read_target(row: dict) -> list[float]:
    value = require(row, "span", list)
    try:
        spans = flatten_spans(value)
    except ValueError as error:
        raise AnnotationError(f"field 'span' is {value!r:.100}: {error}") from error
    if len(spans) != 1:
        raise AnnotationError(f"field 'span' should be one span, got {value!r:.100}")
    return list(spans[0])


@dataclass
class Moment:
    """One scored prediction: its row, the row's name, the true and the predicted span (seconds; None if it failed)."""

    row: dict
    name: str
    target: list[float]
    predicted: list[float] | None
    iou: float


def score_charades(rows: Sequence[dict], names: Sequence[str] | None = None) -> tuple[list[Moment], Problems]:
    """Scores Charades-STA predictions one by one; arguments and errors as `evaluate_charades`."""
    names = default_names(rows) if names is None else names
    check_rows(rows, names)
    problems = Problems()
    note_doubles(rows, names, ("vid", "query", "span"), problems)

    def score(row: dict, name: str) -> Moment:
        target, predicted = _read_target(row), _read_prediction(row, name, problems)
        # float32 decides ties with a threshold, as in the published figures: 7 / 10 falls just below 0.7.
        iou = float(pairwise_iou([predicted], [target], np.float32)[0, 0]) if predicted else 0.0
        return Moment(row, name, target, predicted, iou)

    return score_each(rows, names, score, problems), problems


def summarize_charades(moments: Sequence[Moment], problems: Problems) -> dict:
    """Summarizes scored predictions; returns what `evaluate_charades` does."""
    failed = sum(moment.predicted is None for moment in moments)
    problems = problems.copy()
    if failed == len(moments):
        problems.note("no answer holds exactly two times", f"all {failed} rows")
    recall = {f"R1@{t}": mean([float(moment.iou >= t) for moment in moments]) for t in THRESHOLDS}
    return {
        **recall,
        "mIoU": mean([moment.iou for moment in moments]),
        "failed": failed,
        "total": len(moments),
        "problems": dict(problems),
    }


def evaluate_charades(rows: Sequence[dict], names: Sequence[str] | None = None) -> dict:
    """Computes recall at one and mean IoU on Charades-STA (Gao et al., ICCV 2017).

    Args:
        rows: `{"vid", "query", "span": [start, end], "pred": matched times or None, ..}`, seconds. A prediction
            that is not exactly two times has failed, a reversed one overlaps nothing; both count with IoU 0.
        names: How to name each row in messages; by default its position.

    Returns:
        `R1@0.3`, `R1@0.5`, `R1@0.7` and `mIoU` in [0, 1]; `failed`, `total`; `problems` `{kind: [rows]}`, of which
        those of the kind "broken annotation" are named with field and value, and not scored.

    Raises:
        ValueError: If there is nothing to score, naming the first row's problem.
    """
    return summarize_charades(*score_charades(rows, names))
