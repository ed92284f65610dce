"""Compresses a tree of videos for training: few small frames, no sound, and the times of the originals."""

import glob
import multiprocessing
import os
import queue
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from etchat_hf.data.settings_file import keep_settings
from etchat_hf.loader_workers import leave_with_parent
from etchat_hf.video_decoding_etchat import INDEXED_FORMATS, open_video, sample_frame_indices

VIDEO_SUFFIXES = frozenset(".3gp .avi .flv .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv".split())
SETTINGS_FILE = ".etchat-compress.json"
X264_OPTIONS = {"crf": "23", "preset": "veryfast", "threads": "1"}  # one process per file keeps the cores busy


@dataclass(frozen=True)
class Compression:
    """
    How videos are compressed.

    Args:
        fps (`float`): the most frames kept per second; slower videos keep all of theirs.
        size (`int`): the short side, in pixels; even, as H.264 halves the colours.
    """

    fps: float = 3.0
    size: int = 224

    def __post_init__(self):
        if not self.fps > 0:
            raise ValueError(f"fps is {self.fps}; it must be greater than 0.")
        if self.size < 2 or self.size % 2:
            raise ValueError(f"size is {self.size}; it must be an even number of at least 2.")


class Compressed(NamedTuple):
    """What became of the videos: how many were `written` and `skipped` (there already); of each `failed` one, why."""

    written: int
    skipped: int
    failed: dict[str, str]


def check_shard(shard: int | None, num_shards: int) -> None:
    """ValueError unless 0 <= shard < num_shards, or shard is `None`, all of them."""
    if num_shards < 1:
        raise ValueError(f"num_shards is {num_shards}; it must be at least 1.")
    if shard is not None and not 0 <= shard < num_shards:
        raise ValueError(f"shard is {shard}; with num_shards {num_shards} it must be from 0 to {num_shards - 1}.")


def compress_tree(
    source: Path,
    destination: Path,
    settings: Compression,
    shard: int | None = None,
    num_shards: int = 1,
    workers: int | None = None,
    progress: Callable[[Iterable, int], Iterable] = lambda results, total: results,
) -> Compressed:
    """
    Compresses every video below `source` to the same relative path, each of which is an MP4 file whatever its name
    ends in. Files that are already there are passed over: each was checked before it got its name.

    Args:
        shard, num_shards (`int`): take every `num_shards`-th file, beginning with number `shard`; default: all files.
        workers (`int`, *optional*): processes; default: one per core.
        progress: wraps the iterator over finished files; called with the number of files.

    Raises:
        FileNotFoundError: if `source` holds no video.
        ValueError: if `destination` is inside `source`, was made with other or unreadable settings, or the shard does
            not exist, or there are no workers.
    """
    check_shard(shard, num_shards)
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1.")
    if destination.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{destination}: lies inside of {source}; choose another destination.")
    videos = sorted(_videos_below(source, {source.resolve()}))
    if not videos:
        raise FileNotFoundError(f"{source}: no videos here; give the folder that holds them.")
    keep_settings(destination / SETTINGS_FILE, asdict(settings))
    videos = videos if shard is None else videos[shard::num_shards]
    tasks = [(path, destination / path.relative_to(source)) for path in videos]
    tasks = [(path, output) for path, output in tasks if not output.exists()]
    results = progress(_in_processes(tasks, settings, workers), len(tasks))
    failed = {str(path): problem for path, problem in results if problem is not None}
    return Compressed(len(tasks) - len(failed), len(videos) - len(tasks), failed)


def _videos_below(folder: Path, above: set[Path]) -> Iterator[Path]:
    """Also those behind links to folders, as data trees have them, but none that leads to one of those `above`."""
    for path in folder.iterdir():
        if path.is_dir():
            if (place := path.resolve()) not in above:
                yield from _videos_below(path, above | {place})
        elif path.suffix.lower() in VIDEO_SUFFIXES and path.is_file():
            yield path


def _in_processes(tasks: list, settings: Compression, workers: int | None) -> Iterator[tuple[Path, str | None]]:
    # Not a plain fork, which could inherit locks that decoders' threads hold
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload([__name__])
    # A pool for each process: one that dies takes only its own file along
    workers = workers or os.cpu_count()
    idle = queue.SimpleQueue()
    with ExitStack() as pools:

        def new_pool() -> ProcessPoolExecutor:
            pool = ProcessPoolExecutor(1, mp_context=context, initializer=leave_with_parent)
            return pools.enter_context(pool)

        def attempt(path: Path, output: Path) -> str | None:
            pool = idle.get()
            try:
                return pool.submit(_attempt, path, output, settings).result()
            except BrokenProcessPool:
                pool = new_pool()
                _remove_partials(output)
                return "the process that compressed it died; was there too little memory?"
            finally:
                idle.put(pool)

        for _ in range(workers):
            idle.put(new_pool())
        threads = ThreadPoolExecutor(workers)
        try:
            futures = {threads.submit(attempt, *task): task[0] for task in tasks}
            yield from ((futures[future], future.result()) for future in as_completed(futures))
        finally:
            threads.shutdown(cancel_futures=True)


def _attempt(source: Path, output: Path, settings: Compression) -> str | None:
    try:
        compress_video(source, output, settings)
    except (ValueError, OSError, av.FFmpegError) as error:
        if output.exists():  # another run was at it, and was faster
            return None
        return str(error).removeprefix(f"{source}: ")  # it is named with the reason
    return None


def compress_video(source: Path, output: Path, settings: Compression) -> None:
    """
    Writes one video: the frames that are on screen every `1 / fps` seconds, at the times that they come up.

    Raises:
        ValueError, OSError, av.FFmpegError: if the source cannot be read, or its size or rate not be written, or what
            was written does not hold the right frames.
    """
    reader = open_video(source)
    sampled = sample_frame_indices(reader.num_frames, reader.average_fps, settings.fps, times=reader.times)
    indices = np.unique([0, *sampled])  # times count from the first frame, so that one has to stay
    times = reader.times[indices]
    height, width = _scaled(reader.height, reader.width, settings.size)
    _warn_of_early_end(source, reader.duration)
    output.parent.mkdir(parents=True, exist_ok=True)
    _remove_partials(output)
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        _write(partial, reader.read(indices), times, (height, width), _time_base(source))
        _verify(partial, times, (height, width))
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)


def _remove_partials(output: Path) -> None:
    """Removes what killed processes have left behind."""
    for partial in output.parent.glob(f".{glob.escape(output.name)}.*.partial"):
        partial.unlink(missing_ok=True)


def _warn_of_early_end(source: Path, duration: float) -> None:
    with av.open(str(source), metadata_errors="replace") as container:
        stream = container.streams.video[0]
        declared = (container.duration or 0) / av.time_base
        if container.format.name in INDEXED_FORMATS:  # in others it does not count from zero
            declared -= float((stream.start_time or 0) * stream.time_base)
    if declared - duration > max(1.0, 0.1 * declared):
        warnings.warn(
            f"{source}: its pictures end after {duration:.1f} of {declared:.1f} s; is the file complete?", stacklevel=2
        )


def _scaled(height: int, width: int, size: int) -> tuple[int, int]:
    long = 2 * round(size * max(height, width) / min(height, width) / 2)
    return (size, long) if height <= width else (long, size)


def _time_base(source: Path) -> Fraction:
    """The source's own, in which its times are whole numbers of ticks."""
    with av.open(str(source), metadata_errors="replace") as container:
        return container.streams.video[0].time_base


def _write(path: Path, pictures: Iterable[np.ndarray], times: np.ndarray, size: tuple[int, int], tick: Fraction):
    height, width = size
    with av.open(str(path), "w", format="mp4") as container:
        rate = Fraction(len(times) / max(float(times[-1]), 1.0)).limit_denominator(1000)
        stream = container.add_stream("libx264", rate=max(rate, Fraction(1, 1000)), options=X264_OPTIONS)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.time_base = stream.codec_context.time_base = tick
        for time, picture in zip(times, pictures, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = frame.reformat(width=width, height=height, format="yuv420p", interpolation="AREA")
            frame.pts, frame.time_base = round(Fraction(time) / tick), tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _verify(path: Path, times: np.ndarray, size: tuple[int, int]) -> None:
    written = open_video(path)
    if (written.height, written.width) != size or len(written.times) != len(times):
        raise ValueError(
            f"what was written has {written.num_frames} frames of {written.width} x {written.height}, "
            f"not {len(times)} of {size[1]} x {size[0]}"
        )
    if np.abs(written.times - times).max() > 1e-5:
        raise ValueError("the times of what was written differ from the original's")
    for _ in written.read(range(written.num_frames)):
        pass
