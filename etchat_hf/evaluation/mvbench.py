"""MVBench: 20 multiple-choice tasks on short videos.

Li et al., "MVBench: A Comprehensive Multi-modal Video Understanding Benchmark", CVPR 2024.
"""

import re
from collections.abc import Sequence

from .metrics import mean
from .predictions import Problems, check_rows, default_names, get_answer, note_doubles, require

_FIRST_LETTER = re.compile(r"(?:best option:\s*)?\(?([a-z])")


def _read_first_letter(answer: str) -> int | None:
    match = _FIRST_LETTER.match(answer.lower().strip())
    return ord(match[1]) - ord("a") if match else None


def _right_option(row: dict, name: str) -> int:
    options, right = require(row, name, "candidates", list), require(row, name, "answer", str)
    if right not in options:
        raise ValueError(f"{name}: field 'answer' {right!r:.60} is none of the candidates {options!r:.100}")
    return options.index(right)


def evaluate_mvbench(rows: Sequence[dict], names: Sequence[str] | None = None) -> dict:
    """Computes the accuracy on MVBench (Li et al., CVPR 2024).

    Args:
        rows: `{"task", "video", "question", "candidates": [text, ..], "answer": the right candidate, "a": answer}`.
            An answer is right if its first letter is, after an optional `best option:` and `(`; one that does not
            begin with a letter has failed and is wrong.
        names: How to name each row in messages; by default its position.

    Returns:
        `by_task` `{task: {"Total", "Failed", "Acc"}}`, `overall` `{"Avg"}`, the mean over the tasks, in [0, 1];
        `problems` `{kind: [rows]}`.

    Raises:
        ValueError: If there is nothing to score or an annotation is broken, naming row, field and value.
    """
    names = default_names(rows) if names is None else names
    check_rows(rows, names)
    problems = Problems()
    note_doubles(rows, names, ("task", "video", "question", "start", "end"), problems)
    groups: dict[str, list[tuple[int | None, int]]] = {}
    for row, name in zip(rows, names, strict=True):
        right = _right_option(row, name)
        letter = _read_first_letter(get_answer(row, name, problems))
        groups.setdefault(require(row, name, "task", str), []).append((letter, right))
    by_task = {
        task: {
            "Total": len(pairs),
            "Failed": sum(letter is None for letter, _ in pairs),
            "Acc": round(mean([float(letter == right) for letter, right in pairs]), 5),
        }
        for task, pairs in sorted(groups.items())
    }
    for task, figures in by_task.items():
        if figures["Failed"] == figures["Total"]:
            problems.note("not one answer could be read", task)
    return {
        "by_task": by_task,
        "overall": {"Avg": mean([figures["Acc"] for figures in by_task.values()])},
        "problems": dict(problems),
    }
