"""`etchat data check`, `etchat compress` and `etchat pack`: arguments in, a report out."""

import sys
from pathlib import Path
from typing import Annotated

import typer

data_app = typer.Typer(no_args_is_help=True)

SHARD = Annotated[int | None, typer.Option(help="Do only this part of the work, from 0; default: all.")]
NUM_SHARDS = Annotated[int, typer.Option(help="Parts that the work is split into, e.g. over machines.")]
PROBLEMS = 2  # exit code


def _progress(description: str):
    from rich.console import Console
    from rich.progress import track

    return lambda items, total=None: track(items, description, total=total, console=Console(stderr=True))


def _list_problems(problems: list[str]) -> None:
    if problems:
        print("\n".join(problems), file=sys.stderr)
        print(f"{len(problems)} problems", file=sys.stderr)
        raise typer.Exit(PROBLEMS)


@data_app.callback()
def data() -> None:
    """Training data."""


@data_app.command()
def check(
    stage_config: Annotated[str, typer.Argument(help="YAML configuration of a stage, or a published stage's name.")],
    data_root: Annotated[str | None, typer.Option(help="Folder that holds a published stage's files.")] = None,
    opened: Annotated[
        int, typer.Option(help="Images and videos opened per source, chosen at random; all if there are fewer.")
    ] = 50,
    show_all: Annotated[
        bool, typer.Option("--all", help="List every problem, not only the first of each source.")
    ] = False,
) -> None:
    """Look over a stage's data before a run; exit code 2 if something is wrong."""
    from etchat_hf.data.check import SHOWN_PROBLEMS, check_stage, read_arguments

    arguments = read_arguments(stage_config, data_root)
    stages = {"train on": arguments.resolve(), "evaluate on": arguments.resolve_evaluation()}
    checks = {
        purpose: check_stage(stage, opened, _progress("checking rows"))
        for purpose, stage in stages.items()
        if stage is not None
    }
    found = [check for of_stage in checks.values() for check in of_stage]
    for check in found:
        print(check.report(None if show_all else SHOWN_PROBLEMS))
    rows = [f"{sum(check.kept.total() for check in checks[purpose])} rows to {purpose}" for purpose in checks]
    total = sum(len(check.problems) for check in found)
    print(", ".join([*rows, f"{total} problems"]))
    if total:
        raise typer.Exit(PROBLEMS)


def compress(
    src: Annotated[Path, typer.Argument(help="Folder of videos.")],
    dst: Annotated[Path, typer.Argument(help="Folder that gets the same tree, compressed.")],
    fps: Annotated[float, typer.Option(help="Frames kept per second.")] = 3.0,
    size: Annotated[int, typer.Option(help="Short side in pixels.")] = 224,
    workers: Annotated[int | None, typer.Option(help="Processes; default: one per core.")] = None,
    shard: SHARD = None,
    num_shards: NUM_SHARDS = 1,
) -> None:
    """Compress videos for training: few small frames, no sound, exact times. Goes on where it was stopped."""
    from etchat_hf.data.compress import Compression, compress_tree

    done = compress_tree(src, dst, Compression(fps, size), shard, num_shards, workers, _progress("compressing"))
    print(f"{done.written} videos compressed, {done.skipped} skipped (there already), {len(done.failed)} failed")
    _list_problems([f"{path}: {problem}" for path, problem in sorted(done.failed.items())])


def pack(
    annotations: Annotated[str, typer.Argument(help="JSON, JSON Lines or parquet file, glob, or Hub dataset id.")],
    videos: Annotated[str, typer.Argument(help="Folder or URL that the rows' videos are relative to.")],
    dst: Annotated[Path, typer.Argument(help="Folder that gets the parquet files.")],
    images: Annotated[
        str | None, typer.Option(help="Folder or URL of the images; default: that of the videos.")
    ] = None,
    shard: SHARD = None,
    num_shards: NUM_SHARDS = 1,
) -> None:
    """Pack annotations and media into parquet files that stream. Goes on where it was stopped."""
    try:
        from etchat_hf.data.pack import pack as pack_files
    except ImportError as error:
        raise ImportError(f"packing needs pyarrow ({error}): pip install 'etchat_hf[train]'") from error
    done = pack_files(annotations, videos, dst, num_shards, shard, images, _progress("packing"))
    left_out = f"{len(done.problems)} rows left out"
    print(f"{done.rows} rows packed, {done.skipped_shards} shards skipped (there already), {left_out}")
    _list_problems(done.problems)
