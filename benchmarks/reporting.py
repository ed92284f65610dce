"""What a benchmark says: one line per claim for people, and a JSON line for `benchmarks/run.py`."""

import json
import os
import statistics
import sys
from pathlib import Path

RESULTS_VARIABLE = "ETCHAT_BENCH_RESULTS"


def report(
    claim: str, values: list[float], limit: float, at_most: bool = True, unit: str = "x", reason: str | None = None
) -> bool:
    """
    Prints `claim: median M (min A, max B; limit L)`, and records it if RESULTS_VARIABLE names a file. What was
    measured once is shown as one figure.

    Args:
        claim (`str`): what is promised, in one line.
        values (`list` of `float`): one per repeat; their median decides.
        limit (`float`): what the median must not pass.
        at_most (`bool`): whether `limit` is an upper limit, or else a lower one.
        unit (`str`): of values and limit.
        reason (`str`, *optional*): why the limit cannot be met, Markdown; shown only where it is not met.

    Returns:
        `bool`: whether the claim holds.
    """
    median = statistics.median(values)
    held = median <= limit if at_most else median >= limit
    low, high = min(values), max(values)
    side = "limit" if at_most else "at least"
    spread = f"min {low:.3g}, max {high:.3g}" if len(values) > 1 else "once"
    figures = f"median {median:.3g} {unit} ({spread}; {side} {limit:g})"
    print(f"{claim}: {figures.replace('  ', ' ')}{'' if held else ' MISSED'}", flush=True)
    if reason and not held:
        print(reason, flush=True)
    _record(
        claim=claim,
        median=median,
        min=low,
        max=high,
        repeats=len(values),
        limit=limit,
        at_most=at_most,
        unit=unit,
        held=held,
        reason=reason,
    )
    return held


def not_run(claim: str, reason: str) -> None:
    """Says, and records, that a claim was not measured, and why not."""
    print(f"{claim}: not run, {reason}", flush=True)
    _record(claim=claim, not_run=reason)


def note(markdown: str) -> None:
    """Prints, and records for RESULTS.md, what belongs beside the figures: a table, a profile, a plot."""
    print(markdown, flush=True)
    _record(note=markdown)


def _record(**entry) -> None:
    path = os.environ.get(RESULTS_VARIABLE)
    if path is None:
        return
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"script": Path(sys.argv[0]).name} | entry) + "\n")
