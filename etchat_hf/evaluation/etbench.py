"""E.T. Bench: 12 tasks on timestamps in videos.

Liu et al., "E.T. Bench: Towards Open-Ended Event-Level Video-Language Understanding", NeurIPS 2024 (datasets and
benchmarks track). Referring: RAR, ECA, RVQ. Grounding: TVG, EPM, TAL, EVS, VHD. Dense captioning: DVC, SLC. Complex:
TEM, GVQ. A row is an annotation `{"task", "source", "video", "idx", "tgt"?, "p"?, "o"?, "g"?, ..}` with the model's
answer added as `a`; all times are seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np

from .captions import score_captions
from .etbench_tasks import TASKS, Outcome, Sample, is_match, per_threshold
from .metrics import THRESHOLDS, f1, mean
from .predictions import (
    AnnotationError,
    Problems,
    check_rows,
    default_names,
    get_answer,
    note_doubles,
    require,
    score_each,
)
from .similarity import Similarity, get_similarity

CAPTION_TASKS = ("dvc", "slc")
# The leaderboard's groups, each of figures of `overall`.
GROUPS = {
    "acc_ref": ("RAR", "ECA", "RVQ"),
    "f1_gnd": ("TVG", "EPM", "TAL", "EVS", "VHD"),
    "f1_cap": ("DVC", "SLC"),
    "sim_cap": ("DVC_Sim", "SLC_Sim"),
    "rec_com": ("TEM", "GVQ"),
}


class UnknownTaskError(AnnotationError):
    """A row is of none of the benchmark's tasks."""

    kind = "unknown task"


@dataclass
class Scores:
    """Outcomes of all rows, what was wrong with them, and the similarity they were scored with."""

    outcomes: list[Outcome]
    problems: Problems
    similarity: Similarity


def read_subset(entries: Sequence[int | dict], name: str = "subset") -> dict[int | tuple[str, int], dict]:
    """Reads which samples a score is restricted to.

    Args:
        entries: `idx` of samples, or their annotations.
        name: What to call the subset in messages.

    Returns:
        The annotation, empty where only the `idx` is given, by `idx` or by `(task, idx)`.

    Raises:
        ValueError: If an entry is neither.
    """
    if not isinstance(entries, list | tuple) or not entries:
        raise ValueError(f"{name}: expected an array of idx or annotations, got {entries!r:.60}")
    wanted: dict[int | tuple[str, int], dict] = {}
    for i, entry in enumerate(entries):
        if isinstance(entry, dict):
            try:
                wanted[require(entry, "task", str), require(entry, "idx", int)] = entry
            except AnnotationError as error:
                raise ValueError(f"{name} entry {i}: {error}") from error
        elif isinstance(entry, Integral) and not isinstance(entry, bool):
            wanted[entry] = {}
        else:
            raise ValueError(f"{name} entry {i}: expected an idx or an annotation, got {entry!r:.60}")
    return wanted


def _restrict(
    rows: Sequence[dict], names: Sequence[str], wanted: dict[int | tuple[str, int], dict], problems: Problems
) -> tuple[list[dict], list[str]]:
    """Keeps the rows of a subset; its annotations without a prediction are added, as unanswered."""
    kept, strangers, found = [], [], set()

    def find(row: dict, name: str) -> tuple[dict, str, list]:
        task, idx = require(row, "task", str), require(row, "idx", int)
        return row, name, [key for key in ((task, idx), idx) if key in wanted]

    for row, name, keys in score_each(rows, names, find, problems):
        if keys:
            found.update(keys)
            kept.append((row, name))
            strangers += [f"{name}: {difference}" for difference in _differences(row, wanted[keys[0]])[:1]]
    if strangers:
        raise ValueError(f"{len(strangers)} predictions do not belong to their annotations, first {strangers[0]}")
    for key, annotation in wanted.items():
        if key not in found:
            label = f"task {key[0]} idx {key[1]}" if annotation else f"idx {key}"
            problems.note("no prediction", label)
            if annotation:
                kept.append(({**annotation, "a": None}, f"annotation of {label}"))
    return [row for row, _ in kept], [name for _, name in kept]


def _differences(row: dict, annotation: dict) -> list[str]:
    differing = [key for key in annotation if key != "a" and _listed(row.get(key)) != _listed(annotation[key])]
    return [f"{key} is {row.get(key)!r:.60}, not {annotation[key]!r:.60}" for key in differing]


def _listed(value: object) -> object:
    return [_listed(part) for part in value] if isinstance(value, list | tuple) else value


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
        number = len(rows)
        rows, names = _restrict(rows, names, read_subset(subset), problems)
        if not rows:
            raise ValueError(f"the subset holds the idx of none of the {number} predictions")
    note_doubles(rows, names, ("task", "source", "idx", "video", "q"), problems)
    compare = get_similarity(similarity)

    def score(row: dict, name: str) -> Outcome:
        task = require(row, "task", str)
        if task not in TASKS:
            raise UnknownTaskError(f"{task!r:.60}")
        for key in ("source", "video"):
            require(row, key, str)
        noted = Problems()
        outcome = TASKS[task].score(Sample(row, get_answer(row, name, noted), name, compare))
        for kind, names_of_kind in noted.items():  # of rows that count
            problems.setdefault(kind, []).extend(names_of_kind)
        return outcome

    return Scores(score_each(rows, names, score, problems), problems, compare)


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
    loosest = [np.argwhere(is_match(outcome.iou, THRESHOLDS[0])).tolist() for outcome in answered]
    place = {cell: i for i, cell in enumerate((v, p, g) for v, cells in enumerate(loosest) for p, g in cells)}
    pairs = [(answered[v].captions[p], answered[v].references[g]) for v, p, g in place]
    scores, absent = score_captions(pairs, similarity)

    def video_score(v: int, metric: str, threshold: float) -> float:
        matches = is_match(answered[v].iou, threshold)
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
    answered = list({outcome.sample.row["video"]: outcome for outcome in outcomes if not outcome.failed}.values())
    share = sum(not outcome.failed for outcome in outcomes) / len(outcomes)
    scores = [
        share * f1(mean([o.values[f"P@{t}"] for o in answered]), mean([o.values[f"R@{t}"] for o in answered]))
        for t in THRESHOLDS
    ]
    texts, absent = _caption_scores(answered, similarity)
    return {**per_threshold("F1", "F1", scores), **{key: share * score for key, score in texts.items()}}, absent


def _overall(by_source: dict) -> dict[str, float]:
    present = [task for task in TASKS if task in by_source]
    overall = {t.upper(): mean([source[TASKS[t].headline] for source in by_source[t].values()]) for t in present}
    for task in CAPTION_TASKS:
        sources = by_source.get(task, {}).values()
        if sources and all("SentSim" in source for source in sources):
            overall[f"{task.upper()}_Sim"] = mean([source["SentSim"] for source in sources])
    return overall


def merge_groups(overall: dict[str, float]) -> dict[str, float]:
    """Averages the groups of which every figure is there: a mean over fewer tasks would not compare."""
    return {
        group: mean([overall[key] for key in keys])
        for group, keys in GROUPS.items()
        if all(key in overall for key in keys)
    }


def summarize_etbench(scores: Scores) -> dict:
    """Summarizes scored answers; returns what `evaluate_etbench` does."""
    groups: dict[str, dict[str, list[Outcome]]] = {}
    for outcome in scores.outcomes:
        row = outcome.sample.row
        groups.setdefault(row["task"], {}).setdefault(row["source"], []).append(outcome)
    problems = scores.problems.copy()
    by_source: dict[str, dict] = {}
    absent: dict[str, dict[str, str]] = {}
    for task in (task for task in TASKS if task in groups):
        for source, outcomes in groups[task].items():
            if task in CAPTION_TASKS:
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
        "merged": merge_groups(overall),
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
        rows: Annotations with the model's answer added as `a`; times in seconds, in lists or tuples.
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
        - `problems`: `{kind: [rows]}`, rows of unknown task or with a broken annotation, named with field and value
          (not scored); doubled (counted each), unanswered, ..

    Raises:
        ValueError: If there is nothing to score, a prediction does not belong to its annotation, or an answer needs
            the sentence encoder and it is missing (`EncoderUnavailableError`); naming row, field and value.
    """
    return summarize_etbench(score_etbench(rows, similarity, subset, names))
