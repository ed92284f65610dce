"""`etchat evaluate`: scores prediction files; parsing and printing only."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .charades import score_charades, summarize_charades
from .etbench import read_subset, score_etbench, summarize_etbench
from .mvbench import score_mvbench, summarize_mvbench
from .page import Page, charades_page, etbench_page, mvbench_page, render
from .predictions import load_predictions, read_failures, read_json, write_atomic
from .tables import charades_table, etbench_tables, list_absent, mvbench_table

app = typer.Typer(name="evaluate", help="Score prediction files.", no_args_is_help=True)

Predictions = Annotated[list[Path], typer.Argument(metavar="PRED", help="Prediction files, or folders of them.")]
Output = Annotated[Path | None, typer.Option(help="Write the figures there as JSON.")]
Html = Annotated[Path | None, typer.Option(help="Write a page with plots there.")]


@app.command()
def etbench(
    predictions: Predictions,
    similarity: Annotated[
        str,
        typer.Option(
            metavar="sentence-transformers|jaccard", help="Decides what an answer without an option's letter means."
        ),
    ] = "sentence-transformers",
    output: Output = None,
    subset: Annotated[
        Path | None, typer.Option(help="JSON array of idx or annotations to restrict the score to.")
    ] = None,
    html: Html = None,
) -> None:
    """Score E.T. Bench answers: 12 tasks, by source, beside the published figures."""
    _check_targets(output, html)
    rows, names = load_predictions(predictions)
    chosen = read_json(subset) if subset else None
    if subset:
        read_subset(chosen, str(subset))
    scores = score_etbench(rows, similarity, chosen, names)
    if subset:
        typer.echo(f"{len(scores.outcomes):,} samples of {subset}, from {len(rows):,} predictions", err=True)
    result = summarize_etbench(scores)
    result["problems"] |= read_failures(predictions)
    _print(etbench_tables(result), result)
    _write(result, output, html, lambda: etbench_page(scores, result))


@app.command()
def charades(predictions: Predictions, output: Output = None, html: Html = None) -> None:
    """Score Charades-STA predictions beside the published figures."""
    _check_targets(output, html)
    rows, names = load_predictions(predictions)
    moments, problems = score_charades(rows, names)
    result = summarize_charades(moments, problems)
    result["problems"] |= read_failures(predictions)
    _print([charades_table(result)], result)
    _write(result, output, html, lambda: charades_page(moments, result))


@app.command()
def mvbench(predictions: Predictions, output: Output = None, html: Html = None) -> None:
    """Score MVBench answers."""
    _check_targets(output, html)
    rows, names = load_predictions(predictions)
    choices, problems = score_mvbench(rows, names)
    result = summarize_mvbench(choices, problems)
    result["problems"] |= read_failures(predictions)
    _print([mvbench_table(result)], result)
    _write(result, output, html, lambda: mvbench_page(choices, result))


def _check_targets(*paths: Path | None) -> None:
    """Refuses what cannot be written to before it is scored, which can take minutes."""
    for path in paths:
        if path is not None and path.is_dir():
            raise IsADirectoryError(f"{path}: this is a folder; give a file")


def _write(result: dict, output: Path | None, html: Path | None, make_page: Callable[[], Page]) -> None:
    if output:
        write_atomic(output, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if html:
        write_atomic(html, render(make_page()))


def _print(tables: list[Table], result: dict) -> None:
    for table in tables:
        Console().print(table, "")
    for kind, names in result["problems"].items():
        shown = "; ".join(names[:3]) + (" .." if len(names) > 3 else "")
        typer.echo(f"warning: {len(names)} x {kind}: {shown}", err=True)
    for line in list_absent(result.get("absent", {})):
        typer.echo(line, err=True)
