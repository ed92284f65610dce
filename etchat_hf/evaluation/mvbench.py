"""MVBench: 20 multiple-choice tasks on short videos.

Li et al., "MVBench: A Comprehensive Multi-modal Video Understanding Benchmark", CVPR 2024.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .metrics import mean
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

_FIRST_LETTER = re.compile(r"(?:best option:\s*)?\(?([a-z])")


def _read_first_letter(answer: str) -> int | None:
    match = _FIRST_LETTER.match(answer.lower().strip())
    return ord(match[1]) - ord("a") if match else None


def _right_option(row: dict) -> int:
    options, right = require(row, "candidates", list), require(row, "answer", str)
    if right not in options:
        raise AnnotationError(f"field 'answer' {right!r:.60} is none of the candidates {options!r:.100}")
    return options.index(right)


@dataclass
class Choice:
    """One scored answer: its row, the row's name, the chosen and the right option; None where none was chosen."""

    row: dict
    name: str
    chosen: int | None
    right: int


def score_mvbench(rows: Sequence[dict], names: Sequence[str] | None = None) -> tuple[list[Choice], Problems]:
    """Scores MVBench answers one by one; arguments and errors as `evaluate_mvbench`."""
    names = default_names(rows) if names is None else names
    check_rows(rows, names)
    problems = Problems()
    note_doubles(rows, names, ("task", "video", "question", "start", "end"), problems)

    def score(row: dict, name: str) -> Choice:
        require(row, "task", str)
        right = _right_option(row)
        return Choice(row, name, _read_first_letter(get_answer(row, name, problems)), right)

    return score_each(rows, names, score, problems), problems


def summarize_mvbench(choices: Sequence[Choice], problems: Problems) -> dict:
    """Summarizes scored answers; returns what `evaluate_mvbench` does."""
    groups: dict[str, list[Choice]] = {}
    for choice in choices:
        groups.setdefault(choice.row["task"], []).append(choice)
    by_task = {
        task: {
            "Total": len(part),
            "Failed": sum(choice.chosen is None for choice in part),
            "Acc": round(mean([float(choice.chosen == choice.right) for choice in part]), 5),
        }
        for task, part in sorted(groups.items())
    }
    problems = problems.copy()
    for task, figures in by_task.items():
        if figures["Failed"] == figures["Total"]:
            problems.note("not one answer could be read", task)
    return {
        "by_task": by_task,
        "overall": {"Avg": mean([figures["Acc"] for figures in by_task.values()])},
        "problems": dict(problems),
    }


def evaluate_mvbench(rows: Sequence[dict], names: Sequence[str] | None = None) -> dict:
    """Computes the accuracy on MVBench (Li et al., CVPR 2024).

    Args:
        rows: `{"task", "video", "question", "candidates": [text, ..], "answer": the right candidate, "a": answer}`.
            An answer is right if its first letter is, after an optional `best option:` and `(`; one that does not
            begin with a letter has failed and is wrong.
        names: How to name each row in messages; by default its position.

    Returns:
        `by_task` `{task: {"Total", "Failed", "Acc"}}`, `overall` `{"Avg"}`, the mean over the tasks, in [0, 1];
        `problems` `{kind: [rows]}`, of which those of the kind "broken annotation" are named with field and value, and
        not scored.

    Raises:
        ValueError: If there is nothing to score, naming the first row's problem.
    """
    return summarize_mvbench(*score_mvbench(rows, names))
