"""What one answer of E.T. Bench is worth: the rules of the 12 tasks (Liu et al., NeurIPS 2024). Times are seconds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .answers import Span, flatten_spans, read_captions, read_letter, read_number, read_spans
from .metrics import THRESHOLDS, f1, mean, pairwise_iou
from .predictions import AnnotationError, require
from .similarity import EncoderUnavailableError, Similarity

# Importance maps of EVS have one cell per second.
MAP_SECONDS = 1000


@dataclass
class Sample:
    """A row to be scored: annotation, answer text, its name for messages, and the similarity for unclear choices.

    Its properties raise AnnotationError where the annotation lacks what they are read from.
    """

    row: dict
    answer: str
    name: str
    similarity: Similarity

    @property
    def target(self) -> list[Span]:
        value = require(self.row, "tgt", list)
        try:
            return flatten_spans(value)
        except ValueError as error:
            raise AnnotationError(f"field 'tgt' is {value!r:.100}: {error}") from error

    @property
    def options(self) -> list[str]:
        options = require(self.row, "o", list)
        if not options or not all(isinstance(option, str) for option in options):
            raise AnnotationError(f"field 'o' should be a list of texts, got {options!r:.100}")
        return options

    @property
    def right_option(self) -> int:
        right = require(self.row, "p", int)
        if not 0 <= right < len(self.options):
            raise AnnotationError(f"field 'p' is {right}, but there are {len(self.options)} options")
        return right


@dataclass
class Outcome:
    """What one answer is worth.

    Attributes:
        sample: The row.
        values: Figures of this answer, each in [0, 1].
        failed: Whether the answer could not be read.
        predicted: P spans that the answer names, seconds.
        target: G annotated spans, seconds.
        captions: Texts that belong to `predicted` (DVC, SLC).
        references: Texts that belong to `target` (DVC, SLC).
        iou: Overlap of each predicted with each annotated span, shape (P, G); None where a task has no such overlap.
    """

    sample: Sample
    values: dict[str, float]
    failed: bool = False
    predicted: list[Span] = field(default_factory=list)
    target: list[Span] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    iou: np.ndarray | None = None


def per_threshold(prefix: str, summary: str, scores: Sequence[float]) -> dict[str, float]:
    at = {f"{prefix}@{threshold}": score for threshold, score in zip(THRESHOLDS, scores, strict=True)}
    return {**at, summary: mean(scores)}


def _hits(iou: float) -> list[float]:
    return [float(iou >= threshold) for threshold in THRESHOLDS]


def _localize(sample: Sample, prefix: str, summary: str) -> Outcome:
    """Scores the first span found against the best of the annotated ones."""
    target, predicted = sample.target, read_spans(sample.answer)
    overlaps = pairwise_iou(predicted[:1], target) if predicted else None
    iou = float(overlaps.max()) if predicted else 0.0
    values = {"mIoU": iou, **per_threshold(prefix, summary, _hits(iou))}
    return Outcome(sample, values, failed=not predicted, predicted=predicted, target=target, iou=overlaps)


def _score_grounding(sample: Sample) -> Outcome:
    if len(sample.target) != 1:
        raise AnnotationError(f"field 'tgt' should be one span, got {sample.row['tgt']!r:.100}")
    return _localize(sample, "F1", "F1")


def _score_matching(sample: Sample) -> Outcome:
    return _localize(sample, "R", "mRec")


def _score_actions(sample: Sample) -> Outcome:
    """Scores TAL: a span is right if any span of the other side overlaps it enough."""
    target, predicted = sample.target, read_spans(sample.answer)
    if not predicted:
        return Outcome(sample, per_threshold("F1", "F1", [0.0] * len(THRESHOLDS)), failed=True, target=target)
    iou = pairwise_iou(predicted, target)
    precision, recall = iou.max(axis=1), iou.max(axis=0)
    scores = [f1(float(np.mean(precision >= t)), float(np.mean(recall >= t))) for t in THRESHOLDS]
    return Outcome(sample, per_threshold("F1", "F1", scores), predicted=predicted, target=target, iou=iou)


def _second_map(spans: Sequence[Span]) -> np.ndarray:
    seconds = np.zeros(MAP_SECONDS, dtype=bool)
    for start, end in spans:
        # Python's round, halves to even, as the published figures have it.
        seconds[max(round(start), 0) : max(round(end), 0)] = True
    return seconds


def _score_summary(sample: Sample) -> Outcome:
    """Scores EVS: F1 of the seconds chosen for the summary."""
    target, predicted = sample.target, read_spans(sample.answer)
    if not predicted:
        return Outcome(sample, {"F1": 0.0}, failed=True, target=target)
    chosen, wanted = _second_map(predicted), _second_map(target)
    both = int((chosen & wanted).sum())
    score = f1(both / max(int(chosen.sum()), 1), both / max(int(wanted.sum()), 1))
    return Outcome(sample, {"F1": score}, predicted=predicted, target=target)


def _score_highlight(sample: Sample) -> Outcome:
    """Scores VHD: the first number must lie in an annotated span, of whichever annotator."""
    target, moment = sample.target, read_number(sample.answer)
    if moment is None:
        return Outcome(sample, {"F1": 0.0}, failed=True, target=target)
    hit = any(start <= moment <= end for start, end in target)
    return Outcome(sample, {"F1": float(hit)}, predicted=[(moment, moment)], target=target)


def _most_similar(sample: Sample) -> int:
    labelled = [f"({chr(ord('A') + i)}) {option}" for i, option in enumerate(sample.options)]
    try:
        return int(np.argmax(sample.similarity(sample.answer, labelled)))
    except EncoderUnavailableError as error:
        raise EncoderUnavailableError(
            f"{sample.name}: answer {sample.answer!r:.60} names no option, and {error}; give "
            "similarity 'jaccard' (--similarity jaccard)"
        ) from error


def _score_choice(sample: Sample) -> Outcome:
    """Scores RAR, ECA, RVQ: an answer that names no letter is Failed, even if the most similar option is right."""
    right = sample.right_option
    if not sample.answer.strip():
        return Outcome(sample, {"Acc": 0.0}, failed=True)
    letter = read_letter(sample.answer)
    chosen = letter if letter is not None and letter < len(sample.options) else _most_similar(sample)
    return Outcome(sample, {"Acc": float(chosen == right)}, failed=letter is None)


def _score_grounded_choice(sample: Sample) -> Outcome:
    """Scores GVQ: the right option and its moment; a moment counts only with the right option."""
    right, target = sample.right_option, sample.target
    wrong = {"mIoU": 0.0, **per_threshold("R", "mRec", [0.0] * len(THRESHOLDS)), "Acc": 0.0}
    if not sample.answer.strip():
        return Outcome(sample, wrong, failed=True, target=target)
    letter = read_letter(sample.answer, anywhere=False)
    chosen = letter if letter is not None and letter < len(sample.options) else _most_similar(sample)
    if chosen != right:
        return Outcome(sample, wrong, target=target, predicted=read_spans(sample.answer))
    outcome = _score_matching(sample)
    outcome.values["Acc"] = 1.0
    return outcome


def _score_events(sample: Sample) -> Outcome:
    """Scores one video of DVC, SLC by precision and recall of its events; F1 is taken over the data set."""
    target, references = sample.target, require(sample.row, "g", list)
    if len(references) != len(target) or not all(isinstance(text, str) for text in references):
        raise AnnotationError(f"field 'g' should be {len(target)} texts, got {references!r:.100}")
    events = read_captions(sample.answer)
    if not events:
        return Outcome(sample, {}, failed=True, target=target, references=references)
    predicted, captions = [span for span, _ in events], [caption for _, caption in events]
    iou = pairwise_iou(predicted, target)
    precision = {f"P@{t}": float(np.mean(is_match(iou, t).any(axis=1))) for t in THRESHOLDS}
    recall = {f"R@{t}": float(np.mean(is_match(iou, t).any(axis=0))) for t in THRESHOLDS}
    return Outcome(
        sample,
        {**precision, **recall},
        predicted=predicted,
        target=target,
        captions=captions,
        references=references,
        iou=iou,
    )


def is_match(iou: np.ndarray, threshold: float) -> np.ndarray:
    """Which overlaps exceed a threshold, strictly: the margin keeps rounding from making a hit of a tie."""
    return iou > threshold + 1e-9


@dataclass(frozen=True)
class Task:
    """What a task is called, how it is scored, and which of its figures stands for it in the tables."""

    title: str
    score: Callable[[Sample], Outcome]
    headline: str


TASKS = {
    "rar": Task("referred action recognition", _score_choice, "Acc"),
    "eca": Task("event-caption alignment", _score_choice, "Acc"),
    "rvq": Task("referred video question answering", _score_choice, "Acc"),
    "tvg": Task("temporal video grounding", _score_grounding, "F1"),
    "epm": Task("episodic memory", _score_grounding, "F1"),
    "tal": Task("temporal action localization", _score_actions, "F1"),
    "evs": Task("extractive video summarization", _score_summary, "F1"),
    "vhd": Task("video highlight detection", _score_highlight, "F1"),
    "dvc": Task("dense video captioning", _score_events, "F1"),
    "slc": Task("step localization and captioning", _score_events, "F1"),
    "tem": Task("temporal event matching", _score_matching, "mRec"),
    "gvq": Task("grounded video question answering", _score_grounded_choice, "mRec"),
}
