"""Answers to all rows of a benchmark, by one process or by many: the same answers either way.

A row's way: annotation -> request -> group (plan) -> clip, decoded ahead in processes (clips) -> vision features, once
per video -> prompt and answer, batch by batch (answering) -> journal -> merged predictions.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from tqdm import tqdm

from ..clip_encoder import ClipEncoder, fingerprint, settings_of
from ..modeling_etchat import ETChatForConditionalGeneration
from ..processing_etchat import ETChatProcessor
from .clips import reason_of
from .journal import Journal, check_same_run, discard, read_journals, write_run
from .pipeline import Pipeline, Settings, video_of
from .plan import Group, leave_out_answered, plan_groups, share_groups
from .predictions import FAILURES_FILE, JOURNAL_FOLDER, PREDICTIONS_FILE, write_atomic
from .tasks import NO_ANSWER, Answer, Benchmark, Request

# Processes wait for the slowest one, whose share may take hours longer than a collective operation should.
PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Inference:
    """What a run over a benchmark gave.

    Attributes:
        predictions: The annotation rows in their order, answer added; it is empty where a row failed.
        failures: Reason per failed row, by its position.
        num_known: Answers that were already there.
        model_seconds: How long this process's model was at work, of `wall_seconds` since decoding began.
    """

    predictions: list[dict]
    failures: dict[int, str]
    num_known: int
    model_seconds: float
    wall_seconds: float


def infer(
    model: ETChatForConditionalGeneration,
    processor: ETChatProcessor,
    benchmark: Benchmark,
    rows: Sequence[dict],
    videos: str | Path,
    settings: Settings | None = None,
    output: str | Path | None = None,
    restart: bool = False,
    show_progress: bool = True,
    encoder: ClipEncoder | None = None,
) -> Inference:
    """Answers every row of a benchmark; all processes of a distributed run call it together.

    Args:
        model: The same on every process, not wrapped for training. It answers in evaluation mode, whatever its mode.
        processor: Of the model.
        benchmark: `tasks.ETBENCH`, `CHARADES` or `MVBENCH`.
        rows: Its annotations; times in seconds.
        videos: Folder that the rows' video paths are relative to.
        settings: How to generate; default: greedily, 8 rows at a time.
        output: Folder for answers as they come, from which a killed run goes on, and for the merged
            `predictions.json` and `failures.json`; None writes nothing.
        restart: Discard answers that are already there, merged ones included.
        show_progress: Show a progress bar on stderr, on the main process.
        encoder: Of the model; default: one that stores nothing.

    Returns:
        The result, the same on every process (times excepted). A row that cannot be answered does not stop the run.

    Raises:
        ValueError: If the folder holds answers of another run.
        NotADirectoryError: If the folder of videos is none.
    """
    settings, videos = settings or Settings(), Path(videos)
    check_videos(videos)
    encoder = encoder or ClipEncoder(model, processor)
    state = join_processes()
    folder = Path(output) / JOURNAL_FOLDER if output is not None else None
    known = []
    if folder is not None:
        run = _describe_run(model, processor, benchmark, rows, settings)
        known = _open_run(state, folder, restart, run)
    requests, broken = _read_requests(benchmark, rows)
    answered = set(_merge(known)[0])
    work = _plan(requests, answered, settings.batch_size, state)
    pipeline, journal = (
        Pipeline(model, processor, encoder, requests, videos, settings),
        Journal(folder, state.process_index),
    )
    with _evaluation_mode(model), _progress_bar(benchmark, work, answered, state, show_progress) as bar:
        for records in pipeline.answer(work):
            new = [record for record in records if record["row"] not in answered]
            journal.append(new)
            bar.update(len(new))
    answers, failures = _merge(known + gather_object(journal.records))
    failures = dict(sorted((failures | broken).items()))
    predictions = [benchmark.fill(row, answers.get(index, NO_ANSWER)) for index, row in enumerate(rows)]
    if output is not None:
        if state.is_main_process:
            _write(Path(output), predictions, failures)
        state.wait_for_everyone()
    return Inference(predictions, failures, len(answered), pipeline.clock.model_seconds, pipeline.clock.wall_seconds)


def check_videos(folder: Path) -> None:
    """
    Raises:
        NotADirectoryError: If there is no such folder.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: no such folder of videos")


def join_processes(cpu: bool = False) -> PartialState:
    """Joins the other processes of a distributed launch, if this is one.

    Args:
        cpu: Compute on the CPU although there is an accelerator.

    Returns:
        Which process this is, and of how many; what exists already, as under a `Trainer`, is left as it is.
    """
    # Told nothing, accelerate takes processes without an accelerator for unrelated ones: each would do all the work.
    cpu = cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=PATIENCE)


@contextmanager
def _evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _progress_bar(
    benchmark: Benchmark, work: Sequence[Group], answered: set[int], state: PartialState, is_shown: bool
) -> tqdm:
    """Counts this process's pending rows, and so tells their rate and when they will be done."""
    return tqdm(
        total=sum(row not in answered for group in work for batch in group for row in batch),
        desc=benchmark.name if state.num_processes == 1 else f"{benchmark.name}, 1 of {state.num_processes}",
        unit="row",
        smoothing=0.05,
        disable=not (is_shown and state.is_main_process),
    )


def _read_requests(benchmark: Benchmark, rows: Sequence[dict]) -> tuple[dict[int, Request], dict[int, str]]:
    """What each row asks, and why the others cannot be asked."""
    requests, broken = {}, {}
    for index, row in enumerate(rows):
        try:
            requests[index] = benchmark.request(row)
        except ValueError as error:
            broken[index] = reason_of(error)
    return requests, broken


def _plan(requests: dict[int, Request], answered: set[int], batch_size: int, state: PartialState) -> list[Group]:
    """This process's share of what is not answered yet."""
    rows = list(requests)
    groups = plan_groups(
        [video_of(requests[row]) for row in rows], [requests[row].duration or 0.0 for row in rows], batch_size
    )
    groups = [[[rows[place] for place in batch] for batch in group] for group in groups]
    groups = leave_out_answered(groups, set(rows) - answered)
    return share_groups(groups, state.num_processes)[state.process_index]


def _merge(records: Sequence[dict]) -> tuple[dict[int, Answer], dict[int, str]]:
    """Each row's answer, and why it has none: an answer outlives failures, before or after, of the same row."""
    answers = {r["row"]: Answer(r["text"], tuple(r["timestamps"])) for r in records if "error" not in r}
    failures = {r["row"]: r["error"] for r in records if "error" in r and r["row"] not in answers}
    return answers, failures


def _open_run(state: PartialState, folder: Path, restart: bool, run: dict) -> list[dict]:
    """The records that earlier starts left; they are gathered, so that nodes need not share a file system."""
    if restart and state.is_local_main_process:
        # Merged answers first: after a kill in between, the journals still tell that there is an unfinished run
        for name in (PREDICTIONS_FILE, FAILURES_FILE):
            (folder.parent / name).unlink(missing_ok=True)
        discard(folder)
    state.wait_for_everyone()
    check_same_run(folder, run)
    if state.is_local_main_process:
        write_run(folder, run)
    # Journals of this start begin only after this: everybody must plan with the same records.
    return gather_object(read_journals(folder))


def _describe_run(model, processor, benchmark: Benchmark, rows: Sequence[dict], settings: Settings) -> dict:
    """What answers depend on, and so must not change between the starts of a run.

    Not so the batch size, which may have to shrink to the memory there is: it changes answers by rounding at most.
    Nor the videos, which are known by their paths in the annotations alone: to read them all would take hours.
    """
    return {
        "benchmark": benchmark.name,
        "annotations": _digest(rows),
        "model": fingerprint(model),
        "configuration": _digest(settings_of(model.config), settings_of(model.generation_config)),
        "processor": _digest(json.loads(processor.to_json_string()), processor.chat_template),
        "dtype": str(model.dtype),
        "max_new_tokens": settings.max_new_tokens,
        "sampling seed": settings.seed if settings.sample else None,
        "fps": settings.fps,
        "max_frames": settings.max_frames,
    }


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _write(output: Path, predictions: Sequence[dict], failures: dict[int, str]) -> None:
    write_atomic(output / PREDICTIONS_FILE, json.dumps(predictions, ensure_ascii=False, indent=1) + "\n")
    reasons = [{"row": row, "reason": reason} for row, reason in failures.items()]
    write_atomic(output / FAILURES_FILE, json.dumps(reasons, ensure_ascii=False, indent=1) + "\n")
