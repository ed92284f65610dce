"""E.T. Bench: 12 tasks on timestamps in videos.

Liu et al., "E.T. Bench: Towards Open-Ended Event-Level Video-Language Understanding", NeurIPS 2024 (datasets and
benchmarks track). Referring: RAR, ECA, RVQ. Grounding: TVG, EPM, TAL, EVS, VHD. Dense captioning: DVC, SLC. Complex:
TEM, GVQ. A row is an annotation `{"task", "source", "video", "idx", "tgt"?, "p"?, "o"?, "g"?, ..}` with the model's
answer added as `a`; all times are seconds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .answers import Span, flatten_spans, read_captions, read_letter, read_number, read_spans
from .captions import score_captions
from .metrics import THRESHOLDS, f1, mean, pairwise_iou
from .predictions import Problems, check_rows, default_names, get_answer, note_doubles, require
from .similarity import EncoderUnavailableError, Similarity, get_similarity

# Importance maps of EVS have one cell per second.
MAP_SECONDS = 1000

GROUPS = {
    "acc_ref": ("rar", "eca", "rvq"),
    "f1_gnd": ("tvg", "epm", "tal", "evs", "vhd"),
    "f1_cap": ("dvc", "slc"),
    "rec_com": ("tem", "gvq"),
}


@dataclass
class Outcome:
    """What one answer is worth.

    Attributes:
        values: Figures of this answer, each in [0, 1].
        failed: Whether the answer could not be read.
        predicted: Spans the answer names, seconds.
        target: Annotated spans, seconds.
        captions: Texts that belong to `predicted` (DVC, SLC).
        references: Texts that belong to `target` (DVC, SLC).
        iou: Overlap of each predicted with each annotated span, shape (P, G); None where a task has no such overlap.
    """

    values: dict[str, float]
    failed: bool = False
    predicted: list[Span] = field(default_factory=list)
    target: list[Span] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    iou: np.ndarray | None = None
    task: str = ""
    source: str = ""
    video: str = ""
    name: str = ""
    question: str = ""
    answer: str = ""


@dataclass
class Sample:
    """A row to be scored: annotation, answer text, its name for messages, and the similarity for unclear choices."""

    row: dict
    answer: str
    name: str
    similarity: Similarity

    @property
    def target(self) -> list[Span]:
        value = require(self.row, self.name, "tgt", list)
        try:
            return flatten_spans(value)
        except ValueError as error:
            raise ValueError(f"{self.name}: field 'tgt' is {value!r:.100}: {error}") from error

    @property
    def options(self) -> list[str]:
        options = require(self.row, self.name, "o", list)
        if not options or not all(isinstance(option, str) for option in options):
            raise ValueError(f"{self.name}: field 'o' should be a list of texts, got {options!r:.100}")
        return options

    @property
    def right_option(self) -> int:
        right = require(self.row, self.name, "p", int)
        if not 0 <= right < len(self.options):
            raise ValueError(f"{self.name}: field 'p' is {right}, but there are {len(self.options)} options")
        return right


def _per_threshold(prefix: str, summary: str, scores: Sequence[float]) -> dict[str, float]:
    at = {f"{prefix}@{threshold}": score for threshold, score in zip(THRESHOLDS, scores, strict=True)}
    return {**at, summary: mean(scores)}


def _hits(iou: float) -> list[float]:
    return [float(iou >= threshold) for threshold in THRESHOLDS]


def _localize(sample: Sample, prefix: str, summary: str) -> Outcome:
    """Scores the first span found against the best of the annotated ones."""
    target, predicted = sample.target, read_spans(sample.answer)
    overlaps = pairwise_iou(predicted[:1], target) if predicted else None
    iou = float(overlaps.max()) if predicted else 0.0
    values = {"mIoU": iou, **_per_threshold(prefix, summary, _hits(iou))}
    return Outcome(values, failed=not predicted, predicted=predicted, target=target, iou=overlaps)


def _score_grounding(sample: Sample) -> Outcome:
    if len(sample.target) != 1:
        raise ValueError(f"{sample.name}: field 'tgt' should be one span, got {sample.row['tgt']!r:.100}")
    return _localize(sample, "F1", "F1")


def _score_matching(sample: Sample) -> Outcome:
    return _localize(sample, "R", "mRec")


def _score_actions(sample: Sample) -> Outcome:
    """Scores TAL: a span is right if any span of the other side overlaps it enough."""
    target, predicted = sample.target, read_spans(sample.answer)
    if not predicted:
        return Outcome(_per_threshold("F1", "F1", [0.0] * len(THRESHOLDS)), failed=True, target=target)
    iou = pairwise_iou(predicted, target)
    precision, recall = iou.max(axis=1), iou.max(axis=0)
    scores = [f1(float(np.mean(precision >= t)), float(np.mean(recall >= t))) for t in THRESHOLDS]
    return Outcome(_per_threshold("F1", "F1", scores), predicted=predicted, target=target, iou=iou)


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
        return Outcome({"F1": 0.0}, failed=True, target=target)
    chosen, wanted = _second_map(predicted), _second_map(target)
    both = int((chosen & wanted).sum())
    score = f1(both / max(int(chosen.sum()), 1), both / max(int(wanted.sum()), 1))
    return Outcome({"F1": score}, predicted=predicted, target=target)


def _score_highlight(sample: Sample) -> Outcome:
    """Scores VHD: the first number must lie in an annotated span, of whichever annotator."""
    target, moment = sample.target, read_number(sample.answer)
    if moment is None:
        return Outcome({"F1": 0.0}, failed=True, target=target)
    hit = any(start <= moment <= end for start, end in target)
    return Outcome({"F1": float(hit)}, predicted=[(moment, moment)], target=target)


def _most_similar(sample: Sample) -> int:
    labelled = [f"({chr(ord('A') + i)}) {option}" for i, option in enumerate(sample.options)]
    try:
        return int(np.argmax(sample.similarity(sample.answer, labelled)))
    except EncoderUnavailableError as error:
        raise EncoderUnavailableError(
            f"{sample.name}: answer {sample.answer!r:.60} names no option, and {error}; try similarity 'jaccard'"
        ) from error


def _score_choice(sample: Sample) -> Outcome:
    """Scores RAR, ECA, RVQ: an answer that names no letter is Failed, even if the most similar option is right."""
    right = sample.right_option
    if not sample.answer.strip():
        return Outcome({"Acc": 0.0}, failed=True)
    letter = read_letter(sample.answer)
    chosen = letter if letter is not None and letter < len(sample.options) else _most_similar(sample)
    return Outcome({"Acc": float(chosen == right)}, failed=letter is None)


def _score_grounded_choice(sample: Sample) -> Outcome:
    """Scores GVQ: the right option and its moment; a moment counts only with the right option."""
    right, target = sample.right_option, sample.target
    wrong = {"mIoU": 0.0, **_per_threshold("R", "mRec", [0.0] * len(THRESHOLDS)), "Acc": 0.0}
    if not sample.answer.strip():
        return Outcome(wrong, failed=True, target=target)
    letter = read_letter(sample.answer, anywhere=False)
    chosen = letter if letter is not None and letter < len(sample.options) else _most_similar(sample)
    if chosen != right:
        return Outcome(wrong, target=target, predicted=read_spans(sample.answer))
    outcome = _score_matching(sample)
    outcome.values["Acc"] = 1.0
    return outcome


def _score_events(sample: Sample) -> Outcome:
    """Scores one video of DVC, SLC by precision and recall of its events; F1 is taken over the data set."""
    target, references = sample.target, require(sample.row, sample.name, "g", list)
    if len(references) != len(target) or not all(isinstance(text, str) for text in references):
        raise ValueError(f"{sample.name}: field 'g' should be {len(target)} texts, got {references!r:.100}")
    events = read_captions(sample.answer)
    if not events:
        return Outcome({}, failed=True, target=target, references=references)
    predicted, captions = [span for span, _ in events], [caption for _, caption in events]
    iou = pairwise_iou(predicted, target)
    precision = {f"P@{t}": float(np.mean(_overlaps(iou, t).any(axis=1))) for t in THRESHOLDS}
    recall = {f"R@{t}": float(np.mean(_overlaps(iou, t).any(axis=0))) for t in THRESHOLDS}
    return Outcome(
        {**precision, **recall},
        predicted=predicted,
        target=target,
        captions=captions,
        references=references,
        iou=iou,
    )


def _overlaps(iou: np.ndarray, threshold: float) -> np.ndarray:
    """Which overlaps exceed a threshold, strictly: the margin keeps rounding from making a hit of a tie."""
    return iou > threshold + 1e-9


@dataclass(frozen=True)
class Task:
    """How a task is scored, and which of its figures stands for it in the tables."""

    score: Callable[[Sample], Outcome]
    headline: str


TASKS = {
    "rar": Task(_score_choice, "Acc"),
    "eca": Task(_score_choice, "Acc"),
    "rvq": Task(_score_choice, "Acc"),
    "tvg": Task(_score_grounding, "F1"),
    "epm": Task(_score_grounding, "F1"),
    "tal": Task(_score_actions, "F1"),
    "evs": Task(_score_summary, "F1"),
    "vhd": Task(_score_highlight, "F1"),
    "dvc": Task(_score_events, "F1"),
    "slc": Task(_score_events, "F1"),
    "tem": Task(_score_matching, "mRec"),
    "gvq": Task(_score_grounded_choice, "mRec"),
}


@dataclass
class Scores:
    """Outcomes of all rows, what was wrong with them, and the similarity they were scored with."""

    outcomes: list[Outcome]
    problems: Problems
    similarity: Similarity


def _match_subset(
    rows: Sequence[dict], names: Sequence[str], subset: Sequence[int | dict], problems: Problems
) -> tuple[list[dict], list[str]]:
    """Keeps the rows that a subset names; annotations without a prediction are kept as unanswered."""
    wanted: dict[object, dict | None] = {}
    for entry in subset:
        if isinstance(entry, dict):
            wanted[require(entry, "subset", "task", str), require(entry, "subset", "idx", int)] = entry
        elif isinstance(entry, int) and not isinstance(entry, bool):
            wanted[entry] = None
        else:
            raise ValueError(f"subset: expected an idx or an annotation with task and idx, got {entry!r:.100}")
    kept, kept_names, strangers, found = [], [], [], set()
    for row, name in zip(rows, names, strict=True):
        task, idx = require(row, name, "task", str), require(row, name, "idx", int)
        keys = [key for key in ((task, idx), idx) if key in wanted]
        if not keys:
            continue
        found.update(keys)
        annotation = wanted[keys[0]] or {}
        differing = [key for key in annotation if key != "a" and row.get(key) != annotation[key]]
        strangers += [f"{name}: {key} is {row.get(key)!r:.60}, not {annotation[key]!r:.60}" for key in differing[:1]]
        kept.append(row)
        kept_names.append(name)
    if strangers:
        raise ValueError(f"{len(strangers)} predictions do not belong to their annotations, first {strangers[0]}")
    for key in (key for key in wanted if key not in found):
        problems.note("no prediction", f"task {key[0]} idx {key[1]}" if isinstance(key, tuple) else f"idx {key}")
    missing = [entry for key, entry in wanted.items() if key not in found and entry is not None]
    kept += [{key: value for key, value in entry.items() if key != "a"} for entry in missing]
    kept_names += [f"annotation of task {entry['task']} idx {entry['idx']}" for entry in missing]
    return kept, kept_names


def score_etbench(
    rows: Sequence[dict],
    similarity: str | Similarity = "sentence-transformers",
    subset: Sequence[int | dict] | None = None,
    names: Sequence[str] | None = None,
) -> Scores:
    """Scores E.T. Bench answers one by one; arguments and errors as `evaluate_etbench`."""
    names = default_names(rows) if names is None else names
    check_rows(rows, names)
    problems = Problems()
    if subset is not None:
        rows, names = _match_subset(rows, names, subset, problems)
        check_rows(rows, names)
    note_doubles(rows, names, ("task", "source", "idx", "video"), problems)
    compare, outcomes = get_similarity(similarity), []
    for row, name in zip(rows, names, strict=True):
        task = require(row, name, "task", str)
        if task not in TASKS:
            problems.note("unknown task", f"{name}: {task!r:.60}")
            continue
        answer = get_answer(row, name, problems)
        outcome = TASKS[task].score(Sample(row, answer, name, compare))
        outcome.task, outcome.name, outcome.answer = task, name, answer
        outcome.source, outcome.video = require(row, name, "source", str), require(row, name, "video", str)
        outcome.question = str(row.get("q", ""))
        outcomes.append(outcome)
    if not outcomes:
        raise ValueError(f"none of the {len(rows)} rows is of an E.T. Bench task ({', '.join(TASKS)})")
    return Scores(outcomes, problems, compare)


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 5) for key, value in values.items()}


def _summarize_answers(task: str, outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Averages the figures of the answers; a failed answer counts as 0, but in EVS it is left out."""
    counted = [outcome for outcome in outcomes if not (task == "evs" and outcome.failed)]
    return {key: mean([outcome.values[key] for outcome in counted]) for key in outcomes[0].values}


def _caption_scores(answered: Sequence[Outcome], similarity: Similarity) -> tuple[dict[str, float], dict[str, str]]:
    """Averages caption metrics over the events of a video, the videos, and the thresholds.

    An event that matches several annotated ones counts once with each, one that matches none counts once as 0.
    """
    loosest = [np.argwhere(_overlaps(outcome.iou, THRESHOLDS[0])).tolist() for outcome in answered]
    place = {cell: i for i, cell in enumerate((v, p, g) for v, cells in enumerate(loosest) for p, g in cells)}
    pairs = [(answered[v].captions[p], answered[v].references[g]) for v, p, g in place]
    scores, absent = score_captions(pairs, similarity)

    def video_score(v: int, metric: str, threshold: float) -> float:
        matches = _overlaps(answered[v].iou, threshold)
        found = [scores[metric][place[v, p, g]] for p, g in np.argwhere(matches).tolist()]
        return mean(found + [0.0] * int((~matches.any(axis=1)).sum()))

    means = {
        metric: mean([mean([video_score(v, metric, t) for v in range(len(answered))]) for t in THRESHOLDS])
        for metric in scores
    }
    return means, absent


def _summarize_events(outcomes: Sequence[Outcome], similarity: Similarity) -> tuple[dict[str, float], dict[str, str]]:
    """Takes F1 of the data set's mean precision and recall, scaled by the share of answered videos."""
    # A video answered twice keeps its last answer.
    answered = list({outcome.video: outcome for outcome in outcomes if not outcome.failed}.values())
    share = sum(not outcome.failed for outcome in outcomes) / len(outcomes)
    scores = [
        share * f1(mean([o.values[f"P@{t}"] for o in answered]), mean([o.values[f"R@{t}"] for o in answered]))
        for t in THRESHOLDS
    ]
    texts, absent = _caption_scores(answered, similarity)
    return {**_per_threshold("F1", "F1", scores), **{key: share * score for key, score in texts.items()}}, absent


def _overall(by_source: dict) -> dict[str, float]:
    present = [task for task in TASKS if task in by_source]
    overall = {t.upper(): mean([source[TASKS[t].headline] for source in by_source[t].values()]) for t in present}
    for task in GROUPS["f1_cap"]:
        sources = by_source.get(task, {}).values()
        if sources and all("SentSim" in source for source in sources):
            overall[f"{task.upper()}_Sim"] = mean([source["SentSim"] for source in sources])
    return overall


def _merged(overall: dict[str, float]) -> dict[str, float]:
    """Averages the groups of which every task is there: a mean over fewer tasks would not compare."""
    members = {group: [task.upper() for task in tasks] for group, tasks in GROUPS.items()}
    members["sim_cap"] = [f"{task.upper()}_Sim" for task in GROUPS["f1_cap"]]
    return {
        group: mean([overall[key] for key in keys])
        for group, keys in members.items()
        if all(key in overall for key in keys)
    }


def summarize_etbench(scores: Scores) -> dict:
    """Summarizes scored answers; returns what `evaluate_etbench` does."""
    groups: dict[str, dict[str, list[Outcome]]] = {}
    for outcome in scores.outcomes:
        groups.setdefault(outcome.task, {}).setdefault(outcome.source, []).append(outcome)
    problems = Problems({kind: list(rows) for kind, rows in scores.problems.items()})
    by_source: dict[str, dict] = {}
    absent: dict[str, dict[str, str]] = {}
    for task in (task for task in TASKS if task in groups):
        for source, outcomes in groups[task].items():
            if task in GROUPS["f1_cap"]:
                values, missing = _summarize_events(outcomes, scores.similarity)
                absent.update({f"{task}/{source}": missing} if missing else {})
            else:
                values = _summarize_answers(task, outcomes)
            failed = sum(outcome.failed for outcome in outcomes)
            if failed == len(outcomes):
                problems.note("not one answer could be read", f"{task}/{source}")
            by_source.setdefault(task, {})[source] = {"Total": len(outcomes), "Failed": failed, **_rounded(values)}
    overall = _overall(by_source)
    return {
        "by_source": by_source,
        "overall": overall,
        "merged": _merged(overall),
        "absent": absent,
        "problems": dict(problems),
    }


def evaluate_etbench(
    rows: Sequence[dict],
    similarity: str | Similarity = "sentence-transformers",
    subset: Sequence[int | dict] | None = None,
    names: Sequence[str] | None = None,
) -> dict:
    """Computes the E.T. Bench metrics (Liu et al., NeurIPS 2024).

    Args:
        rows: Annotations with the model's answer added as `a`; times in seconds.
        similarity: What decides which option an answer without a letter means: `"sentence-transformers"` (public
            all-MiniLM-L6-v2, loaded only when needed), `"jaccard"` (overlap of words, needs nothing installed), or a
            function `(text, options) -> scores`.
        subset: Restricts the score to these samples, given by `idx` or by annotation. An annotation without a
            prediction counts as unanswered.
        names: How to name each row in messages; by default its position.

    Returns:
        Figures in [0, 1], but CIDEr in [0, 10]:
        - `by_source`: `{task: {source: {"Total", "Failed", ..}}}`, rounded to 5 decimals
        - `overall`: per task the mean over its sources
        - `merged`: the leaderboard's groups, each only if all its tasks are there
        - `absent`: `{"task/source": {caption metric: why it could not be computed}}`
        - `problems`: `{kind: [rows]}`, rows of unknown task (not scored), doubled (counted each), unanswered, ..

    Raises:
        ValueError: If there is nothing to score, an annotation is broken, a prediction does not belong to its
            annotation, or an answer needs the sentence encoder and it is missing; naming row, field and value.
    """
    return summarize_etbench(score_etbench(rows, similarity, subset, names))
