"""Answers to all rows of a benchmark, by one process or by many: the same answers either way.

A row's way: annotation -> request -> group (plan) -> clip, decoded ahead in threads (clips) -> vision features, once
per video -> prompt and answer, batch by batch (answering) -> journal -> merged predictions.
"""

import hashlib
import json
import sys
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from tqdm import tqdm

from ..modeling_etchat import ETChatForConditionalGeneration
from ..processing_etchat import ETChatProcessor
from .answering import Prompt, answer_batch, write_prompt
from .clips import Clip, default_threads, find_video, read_ahead, read_clip
from .journal import Journal, check_same_run, discard, read_journals, write_run
from .plan import Group, leave_out_answered, plan_groups, share_groups
from .predictions import FAILURES_FILE, PREDICTIONS_FILE, write_atomic
from .tasks import NO_ANSWER, Answer, Benchmark, Request

JOURNAL_FOLDER = "progress"
FINGERPRINT_SAMPLES = 64
# Processes wait for the slowest one, whose share may take hours longer than a collective operation should.
PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Settings:
    """How answers are generated.

    Attributes:
        batch_size: The most rows answered at once.
        max_new_tokens: Longest answer; it ends earlier where the model's context does.
        sample: Sample at temperature 0.2 instead of taking the likeliest token.
        seed: Of the sampling; each row's draws depend on it and the row's position alone.
        fps: Frames sampled per second; None as the model was trained.
        max_frames: Lowers the rate of longer videos to so many frames.
        num_threads: Videos decoded at once.
    """

    batch_size: int = 8
    max_new_tokens: int = 2048
    sample: bool = False
    seed: int = 0
    fps: float | None = None
    max_frames: int | None = None
    num_threads: int = default_threads()

    def __post_init__(self):
        for name in ("batch_size", "max_new_tokens", "num_threads", "max_frames", "fps"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; it must be positive")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative")


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
        restart: Discard answers that are already there.
        show_progress: Show a progress bar on stderr, on the main process.

    Returns:
        The result, the same on every process (times excepted). A row that cannot be answered does not stop the run.

    Raises:
        ValueError: If the folder holds answers of another run.
        NotADirectoryError: If the folder of videos is none.
    """
    settings, videos = settings or Settings(), Path(videos)
    if not videos.is_dir():
        raise NotADirectoryError(f"{videos}: no such folder of videos")
    state = join_processes()
    folder = Path(output) / JOURNAL_FOLDER if output is not None else None
    known = _open_run(state, folder, restart, _describe_run(model, benchmark, rows, settings)) if folder else []
    requests, broken = _read_requests(benchmark, rows)
    answers, _ = _merge(known)
    journal = Journal(folder, state.process_index)
    work = _plan(requests, answers, settings.batch_size, state)
    was_training = model.training
    model.eval()
    try:
        with tqdm(
            total=sum(row not in answers for group in work for batch in group for row in batch),
            desc=benchmark.name if state.num_processes == 1 else f"{benchmark.name}, 1 of {state.num_processes}",
            unit="row",
            smoothing=0.05,
            disable=not (show_progress and state.is_main_process),
        ) as bar:
            clock = Clock()
            for records in answer_groups(model, processor, requests, work, videos, settings, clock):
                new = [record for record in records if record["row"] not in answers]
                journal.append(new)
                bar.update(len(new))
            clock.stop()
    finally:
        model.train(was_training)
    answers, failures = _merge(known + gather_object(journal.records))
    failures = dict(sorted((failures | broken).items()))
    predictions = [benchmark.fill(row, answers.get(index, NO_ANSWER)) for index, row in enumerate(rows)]
    if output is not None:
        if state.is_main_process:
            _write(Path(output), predictions, failures)
        state.wait_for_everyone()
    return Inference(predictions, failures, len(_merge(known)[0]), clock.model_seconds, clock.wall_seconds)


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


class Clock:
    """Tells the time the model works from the time that passes."""

    def __init__(self):
        self.model_seconds = self.wall_seconds = 0.0
        self._start = time.perf_counter()

    def __enter__(self):
        self._begun = time.perf_counter()

    def __exit__(self, *_):
        self.model_seconds += time.perf_counter() - self._begun

    def stop(self) -> None:
        """Takes the time that has passed since the beginning."""
        self.wall_seconds = time.perf_counter() - self._start


def answer_groups(
    model: ETChatForConditionalGeneration,
    processor: ETChatProcessor,
    requests: dict[int, Request],
    groups: Sequence[Group],
    videos: Path,
    settings: Settings,
    clock: Clock,
) -> Iterator[list[dict]]:
    """Answers groups of batches, while the clips of the next ones are decoded.

    Args:
        model, processor, settings: See `infer`.
        requests: What each row asks.
        groups: Batches of rows, those of one video in one group.
        videos: Folder of the videos.
        clock: Measures the model's time.

    Yields:
        Per batch the journal's records.
    """

    def read(key: Hashable) -> Clip:
        names, segment = key
        return read_clip(
            processor.video_processor,
            find_video(videos, names),
            segment,
            settings.fps,
            settings.max_frames,
            model.dtype,
        )

    keys = [_videos_of(group, requests) for group in groups]
    clips = read_ahead(read, [key for part in keys for key in part], settings.batch_size, settings.num_threads)
    for group, group_keys in zip(groups, keys, strict=True):
        found: dict[Hashable, Clip] = {}
        errors: dict[Hashable, str] = {}
        for key in group_keys:
            try:
                clip = next(clips).result()
            except (OSError, ValueError) as error:
                errors[key] = _reason(error)
                continue
            with clock:
                found[key] = replace(clip, frames=model.get_vision_features(clip.frames.to(model.device)))
        for batch in group:
            yield from _answer_rows(model, processor, requests, batch, found, errors, settings, clock)


def _answer_rows(model, processor, requests, batch, found, errors, settings, clock) -> Iterator[list[dict]]:
    prompts: dict[int, Prompt] = {}
    failed = []
    for row in batch:
        key = _video_of(requests[row])
        try:
            if key in errors:
                raise ValueError(errors[key])
            seed = (settings.seed, row) if settings.sample else None
            prompts[row] = write_prompt(
                processor, model.config, requests[row], found[key], settings.max_new_tokens, seed
            )
        except ValueError as error:
            failed.append({"row": row, "error": _reason(error)})
    if failed:
        yield failed
    if prompts:
        with clock:
            records = _generate(model, processor, requests, prompts, found)
        yield records


def _generate(model, processor, requests, prompts: dict[int, Prompt], found) -> list[dict]:
    keys = list(dict.fromkeys(_video_of(requests[row]) for row in prompts))
    try:
        answers = answer_batch(
            model,
            processor,
            list(prompts.values()),
            [keys.index(_video_of(requests[row])) for row in prompts],
            [found[key].frame_times for key in keys],
            torch.cat([found[key].frames for key in keys]),
        )
    except torch.OutOfMemoryError as error:
        if len(prompts) == 1:
            return [{"row": row, "error": f"out of memory: {_reason(error)}"} for row in prompts]
        tqdm.write(f"out of memory with {len(prompts)} rows; answering them one by one", file=sys.stderr)
        answers = None
    if answers is None:  # outside of the handler, whose traceback would keep the failed attempt's memory
        return [
            record
            for row, prompt in prompts.items()
            for record in _generate(model, processor, requests, {row: prompt}, found)
        ]
    return [{"row": row, **asdict(answer)} for row, answer in zip(prompts, answers, strict=True)]


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _video_of(request: Request) -> Hashable:
    return request.videos, request.segment


def _videos_of(group: Group, requests: dict[int, Request]) -> list[Hashable]:
    return list(dict.fromkeys(_video_of(requests[row]) for batch in group for row in batch))


def _read_requests(benchmark: Benchmark, rows: Sequence[dict]) -> tuple[dict[int, Request], dict[int, str]]:
    """What each row asks, and why the others cannot be asked."""
    requests, broken = {}, {}
    for index, row in enumerate(rows):
        try:
            requests[index] = benchmark.request(row)
        except ValueError as error:
            broken[index] = _reason(error)
    return requests, broken


def _plan(requests: dict[int, Request], answers: dict, batch_size: int, state: PartialState) -> list[Group]:
    """This process's share of what is not answered yet."""
    rows = list(requests)
    groups = plan_groups(
        [_video_of(requests[row]) for row in rows], [requests[row].duration or 0.0 for row in rows], batch_size
    )
    groups = [[[rows[place] for place in batch] for batch in group] for group in groups]
    groups = leave_out_answered(groups, set(rows) - set(answers))
    return share_groups(groups, state.num_processes)[state.process_index]


def _merge(records: Sequence[dict]) -> tuple[dict[int, Answer], dict[int, str]]:
    """Each row's answer, and why it has none: an answer outlives failures, before or after, of the same row."""
    answers = {r["row"]: Answer(r["text"], tuple(r["timestamps"])) for r in records if "error" not in r}
    failures = {r["row"]: r["error"] for r in records if "error" in r and r["row"] not in answers}
    return answers, failures


def _open_run(state: PartialState, folder: Path, restart: bool, run: dict) -> list[dict]:
    """The records that earlier starts left; they are gathered, so that nodes need not share a file system."""
    if restart and state.is_local_main_process:
        discard(folder)
    state.wait_for_everyone()
    check_same_run(folder, run)
    if state.is_local_main_process:
        write_run(folder, run)
    # Journals of this start begin only after this: everybody must plan with the same records.
    return gather_object(read_journals(folder))


def _describe_run(model, benchmark: Benchmark, rows: Sequence[dict], settings: Settings) -> dict:
    """What answers depend on, and so must not change between the starts of a run."""
    return {
        "benchmark": benchmark.name,
        "annotations": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        "model": fingerprint(model),
        "dtype": str(model.dtype),
        "max_new_tokens": settings.max_new_tokens,
        "sampling seed": settings.seed if settings.sample else None,
        "fps": settings.fps,
        "max_frames": settings.max_frames,
    }


def fingerprint(model: torch.nn.Module) -> str:
    """Tells models apart by a sample of every parameter's values, without reading all of them."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        step = max(1, parameter.numel() // FINGERPRINT_SAMPLES)
        digest.update(name.encode())
        digest.update(parameter.detach().flatten()[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _write(output: Path, predictions: Sequence[dict], failures: dict[int, str]) -> None:
    write_atomic(output / PREDICTIONS_FILE, json.dumps(predictions, ensure_ascii=False, indent=1) + "\n")
    reasons = [{"row": row, "reason": reason} for row, reason in failures.items()]
    write_atomic(output / FAILURES_FILE, json.dumps(reasons, ensure_ascii=False, indent=1) + "\n")
