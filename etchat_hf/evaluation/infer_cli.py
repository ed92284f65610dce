"""`etchat infer`: answers benchmarks over many videos; parsing and printing only."""

from pathlib import Path
from typing import Annotated

import typer

from .tasks import BENCHMARKS, Benchmark

app = typer.Typer(
    name="infer",
    help="Answer a benchmark's questions; under `accelerate launch` on any number of processes and nodes.",
    no_args_is_help=True,
)
SHOWN_FAILURES = 5
VIDEOS_HELP = (
    "Folder of the videos. A run that goes on knows them by their paths in the annotations only: it keeps its answers "
    "if this folder, or what is in it, changes."
)
BATCH_HELP = "The most rows answered at once; may change between the starts of a run."
RESTART_HELP = "Discard the answers that are there."


def _default_output(model: str, name: str) -> Path:
    if not Path(model).is_dir():
        raise ValueError(f"{model} is no local folder, so there is no place for the answers in it: give --output")
    return Path(model) / name


def _report(output: Path, result, num_rows: int) -> None:
    known = f", {result.num_known} of them already there" if result.num_known else ""
    typer.echo(f"{num_rows - len(result.failures)} of {num_rows} rows answered{known}: {output}", err=True)
    if result.model_seconds:
        share = result.model_seconds / result.wall_seconds
        typer.echo(f"{result.wall_seconds:.1f} s, the model at work {share:.0%} of them", err=True)
    for row, reason in list(result.failures.items())[:SHOWN_FAILURES]:
        typer.echo(f"failed: row {row}: {reason}", err=True)
    if result.failures:
        more = len(result.failures) - SHOWN_FAILURES
        rest = f"{more} more and " if more > 0 else ""
        typer.echo(f"{len(result.failures)} rows failed; {rest}all reasons: {output / 'failures.json'}", err=True)
        typer.echo("the same command tries them again", err=True)


def _add_command(benchmark: Benchmark, title: str, annotations_help: str) -> None:
    @app.command(benchmark.name, help=f"Answer {title}. Exit code 1 if a row failed.")
    def command(
        annotations: Annotated[Path, typer.Option(help=annotations_help)],
        videos: Annotated[Path, typer.Option(help=VIDEOS_HELP)],
        model: Annotated[str, typer.Option(help="Folder or Hub id of a converted checkpoint.")],
        output: Annotated[
            Path | None, typer.Option(help=f"Folder for the answers; default: MODEL/{benchmark.name}.")
        ] = None,
        batch_size: Annotated[int, typer.Option(help=BATCH_HELP)] = 8,
        max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 2048,
        sample: Annotated[
            bool, typer.Option("--sample", help="Sample at temperature 0.2 instead of greedily.")
        ] = False,
        seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
        fps: Annotated[
            float | None, typer.Option(help="Frames per second; default: as the model was trained.")
        ] = None,
        max_frames: Annotated[int | None, typer.Option(help="The most frames of a video.")] = None,
        decode_workers: Annotated[int | None, typer.Option(help="Processes that decode videos, per process.")] = None,
        dtype: Annotated[str, typer.Option(help="float32, float16, bfloat16, or auto: as stored.")] = "auto",
        device: Annotated[
            str | None, typer.Option(help="Such as cpu or cuda:0; default: one GPU per process.")
        ] = None,
        cache: Annotated[
            Path | None, typer.Option(help="Folder that keeps encoded videos for later runs and `etchat ask`.")
        ] = None,
        cache_gib: Annotated[float, typer.Option(help="Size at which that folder takes no more.")] = 50.0,
        restart: Annotated[bool, typer.Option("--restart", help=RESTART_HELP)] = False,
    ) -> None:
        from transformers.utils import logging

        from ..clip_encoder import ClipEncoder
        from ..inference import load
        from .clips import default_workers
        from .runner import Settings, check_videos, infer, join_processes

        output = output or _default_output(model, benchmark.name)
        settings = Settings(
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            sample=sample,
            seed=seed,
            fps=fps,
            max_frames=max_frames,
            decode_workers=default_workers() if decode_workers is None else decode_workers,
        )
        rows = benchmark.read(annotations)
        check_videos(videos)
        output.mkdir(parents=True, exist_ok=True)  # before the model is loaded, which can take minutes
        state = join_processes(cpu=device == "cpu")
        if state.num_processes > 1 and device not in (None, "cpu"):
            raise ValueError(
                f"--device {device} would put {state.num_processes} processes on one device; leave it out"
            )
        if not state.is_main_process:
            logging.disable_progress_bar()
        network, processor = load(model, dtype=dtype, device=device or str(state.device))
        encoder = ClipEncoder(network, processor, cache, cache_gib)
        result = infer(network, processor, benchmark, rows, videos, settings, output, restart, encoder=encoder)
        if state.is_main_process:
            _report(output, result, len(rows))
        state.destroy_process_group()
        if state.is_main_process and result.failures:
            raise typer.Exit(1)


_add_command(BENCHMARKS["etbench"], "E.T. Bench", "JSON array of rows, with `<vid>` in the questions.")
_add_command(BENCHMARKS["charades"], "Charades-STA", "Text file of lines `VID START END##SENTENCE.`.")
_add_command(BENCHMARKS["mvbench"], "MVBench", "JSON array of rows, or folder of one such file per task.")
