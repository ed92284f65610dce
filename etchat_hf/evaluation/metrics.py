"""Temporal intersection over union, and the thresholds that the benchmarks share."""

from collections.abc import Sequence

import numpy as np

THRESHOLDS = (0.1, 0.3, 0.5, 0.7)

Span = tuple[float, float]


def pairwise_iou(first: Sequence, second: Sequence, dtype: type = np.float64) -> np.ndarray:
    """Computes the temporal IoU of every span of one list with every span of another.

    Args:
        first: A spans `(start, end)`, seconds, shape (A, 2).
        second: B spans, shape (B, 2).
        dtype: Precision of the arithmetic; ties with a threshold fall differently in float32.

    Returns:
        IoU in [0, 1], shape (A, B). A reversed or empty span overlaps nothing.
    """
    # What a float cannot hold becomes infinite, and its IoU 0.
    with np.errstate(over="ignore", invalid="ignore"):
        a = np.asarray(first, dtype=dtype)[:, None]
        b = np.asarray(second, dtype=dtype)[None]
        overlap = np.minimum(a[..., 1], b[..., 1]) - np.maximum(a[..., 0], b[..., 0])
        overlap = overlap.clip(min=0)
        union = (a[..., 1] - a[..., 0]) + (b[..., 1] - b[..., 0]) - overlap
        return np.divide(overlap, union, out=np.zeros_like(overlap), where=(union > 0) & np.isfinite(union))


def f1(precision: float, recall: float) -> float:
    """Returns the harmonic mean of precision and recall, 0 where both are 0."""
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def mean(values: Sequence[float]) -> float:
    """Returns the mean, 0 of nothing."""
    return sum(values) / len(values) if values else 0.0
