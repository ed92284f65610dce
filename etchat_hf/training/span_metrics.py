"""Temporal IoU of answers, as a pure function of spans."""

from collections.abc import Sequence

from ..evaluation.metrics import mean, pairwise_iou

Spans = Sequence[Sequence[float]]


def sample_iou(predicted: Spans, truth: Spans) -> float:
    """
    Mean IoU of spans paired in order; one that is missing or too many counts as 0.

    Args:
        predicted, truth (sequences of `(start, end)`): seconds.
    """
    ious = [float(pairwise_iou([a], [b])[0, 0]) for a, b in zip(predicted, truth, strict=False)]
    return sum(ious) / max(len(predicted), len(truth), 1)


def score_spans(predicted: Sequence[Spans], truth: Sequence[Spans]) -> dict[str, float]:
    """
    Scores answers that hold spans.

    Args:
        predicted, truth: per sample its spans `(start, end)`, seconds.

    Returns:
        `dict` with `mIoU`, and `R@0.5` and `R@0.7`, the share of samples of at least that IoU.

    Raises:
        ValueError: if the two differ in length.
    """
    ious = [sample_iou(a, b) for a, b in zip(predicted, truth, strict=True)]
    return {"mIoU": mean(ious)} | {f"R@{t}": mean([float(iou >= t) for iou in ious]) for t in (0.5, 0.7)}
