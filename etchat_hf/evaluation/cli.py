"""`etchat evaluate`: scores prediction files; parsing and printing only."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from . import report
from .charades import score_charades, summarize_charades
from .etbench import score_etbench, summarize_etbench
from .mvbench import evaluate_mvbench
from .predictions import load_predictions, read_failures, read_json, write_atomic

app = typer.Typer(name="evaluate", help="Score prediction files.", no_args_is_help=True)


Predictions = Annotated[list[Path], typer.Argument(metavar="PRED...", help="Prediction files, or folders of them.")]
Output = Annotated[Path | None, typer.Option(help="Write the figures there as JSON.")]
Html = Annotated[Path | None, typer.Option(help="Write a page with plots there.")]


@contextmanager
def _user_errors() -> Iterator[None]:
    """Turns bad input into one line on stderr and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error


def _finish(
    predictions: list[Path], result: dict, output: Path | None, html: Path | None, page: Callable[[], str]
) -> None:
    result["problems"] |= read_failures(predictions)
    for kind, names in result["problems"].items():
        shown = "; ".join(names[:3]) + (" .." if len(names) > 3 else "")
        typer.echo(f"warning: {len(names)} x {kind}: {shown}", err=True)
    for place, metrics in result.get("absent", {}).items():
        for metric, reason in metrics.items():
            typer.echo(f"absent: {metric} of {place}: {reason}", err=True)
    if output:
        write_atomic(output, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if html:
        write_atomic(html, page())


@app.command()
def etbench(
    predictions: Predictions,
    similarity: Annotated[
        Literal["sentence-transformers", "jaccard"],
        typer.Option(help="Decides what an answer without an option's letter means."),
    ] = "sentence-transformers",
    output: Output = None,
    subset: Annotated[Path | None, typer.Option(help="JSON array of idx or annotations to restrict to.")] = None,
    html: Html = None,
) -> None:
    """Score E.T. Bench answers: 12 tasks, by source, beside the published figures."""
    with _user_errors():
        rows, names = load_predictions(predictions)
        chosen = read_json(subset) if subset else None
        if subset and not isinstance(chosen, list):
            raise ValueError(f"{subset}: expected a JSON array, got {type(chosen).__name__}")
        scores = score_etbench(rows, similarity, chosen, names)
        result = summarize_etbench(scores)
        for table in report.etbench_tables(result):
            Console().print(table)
        bars = report.etbench_bars(result)
        _finish(
            predictions,
            result,
            output,
            html,
            lambda: report.render_page(
                "E.T. Bench", bars, report.PUBLISHED_ETBENCH, report.etbench_cases(scores), result
            ),
        )


@app.command()
def charades(predictions: Predictions, output: Output = None, html: Html = None) -> None:
    """Score Charades-STA predictions beside the published figures."""
    with _user_errors():
        rows, names = load_predictions(predictions)
        ious, spans, problems = score_charades(rows, names)
        result = summarize_charades(ious, spans, problems)
        Console().print(report.charades_table(result))
        bars = {key: result[key] for key in report.PUBLISHED_CHARADES}
        _finish(
            predictions,
            result,
            output,
            html,
            lambda: report.render_page(
                "Charades-STA",
                bars,
                report.PUBLISHED_CHARADES,
                report.charades_cases(rows, ious, spans, names),
                result,
            ),
        )


@app.command()
def mvbench(predictions: Predictions, output: Output = None, html: Html = None) -> None:
    """Score MVBench answers."""
    with _user_errors():
        rows, names = load_predictions(predictions)
        result = evaluate_mvbench(rows, names)
        Console().print(report.mvbench_table(result))
        bars = {task: figures["Acc"] for task, figures in result["by_task"].items()}
        _finish(predictions, result, output, html, lambda: report.render_page("MVBench", bars, {}, [], result))
