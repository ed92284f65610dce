"""Videos on their way to the model: found, sampled, and decoded ahead of time by a few threads."""

import os
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np

from ..clip_encoder import DecodedClip
from ..processing_etchat import EncodedClip
from ..video_decoding_etchat import rate_and_duration, sample_frame_indices
from ..video_processing_etchat import ETChatVideoProcessor, SampledClip

# MVBench ships the frames of some videos as images in a folder, so many per second.
FRAME_FOLDER_FPS = 3.0
FRAME_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")


def find_video(folder: Path, names: Sequence[str]) -> Path:
    """Finds a video below a folder.

    Args:
        folder: The folder of videos.
        names: Paths relative to it, in order of preference.

    Raises:
        ValueError: If a path could lead out of the folder.
        FileNotFoundError: If none exists.
    """
    for name in names:
        paths = PurePosixPath(name), PureWindowsPath(name)
        if not name or any(path.is_absolute() or path.drive or ".." in path.parts for path in paths):
            raise ValueError(f"video {name!r:.100} is not a path inside of {folder}")
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"no {' or '.join(names)} in {folder}")


def sample_video(
    video_processor: ETChatVideoProcessor,
    path: Path,
    segment: tuple[float, float] | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
) -> SampledClip:
    """Opens a video and chooses its frames.

    Args:
        video_processor: Samples the frames.
        path: A video or image file, or a folder of numbered frames at 3 per second.
        segment: Restricts it to `(start, end)`, seconds; times then count from its first frame.
        fps, max_frames: Replace the video processor's.

    Raises:
        OSError, ValueError: If it cannot be read, or has no frame in the segment.
    """
    source, metadata = path, None
    if path.is_dir():
        source = sorted(file for file in path.iterdir() if file.suffix.lower() in FRAME_EXTENSIONS)
        if not source:
            raise ValueError(f"{path}: no frames ({', '.join(FRAME_EXTENSIONS)}) in this folder")
        metadata = {"fps": FRAME_FOLDER_FPS}
    if segment is None:
        return video_processor.sample(source, fps, max_frames=max_frames, video_metadata=metadata)
    whole = video_processor.sample(source, video_metadata=metadata, do_sample_frames=False)
    return _cut(whole, video_processor, path, segment, fps, max_frames)


def _cut(whole: SampledClip, video_processor, path, segment, fps, max_frames) -> SampledClip:
    """Samples the frames of a segment as those of a video of its own."""
    reader, (start, end) = whole.reader, segment
    inside = np.flatnonzero((reader.times >= start) & (reader.times <= end))
    if not len(inside):
        raise ValueError(f"{path}: no frame between {start} and {end} s; the video lasts {reader.duration:.2f} s")
    times = reader.times[inside] - reader.times[inside[0]]
    wanted = video_processor.num_frames if fps is None else None
    budget = video_processor.max_frames if max_frames is None else max_frames
    rate = video_processor.fps if fps is None else fps
    chosen = np.unique(sample_frame_indices(len(inside), reader.average_fps, rate, wanted, budget, times))
    duration = rate_and_duration(times[chosen], None)[1] if len(chosen) > 1 else 0.0
    return replace(
        whole,
        frame_indices=inside[chosen],
        frame_times=times[chosen].tolist(),
        metadata=whole.metadata | {"duration": duration},
    )


def read_ahead(
    read: Callable[[Hashable], EncodedClip | DecodedClip], keys: Sequence[Hashable], ahead: int, num_threads: int
) -> Iterator[Future]:
    """Reads clips in order, in threads, while the caller is busy with earlier ones.

    Decoding and resizing leave the interpreter to the model's thread, so threads suffice, and no pixels are copied.

    Args:
        read: Makes the clip of a key.
        keys: What to read, in order.
        ahead: The most clips that are held or being read beyond those already taken.
        num_threads: How many are read at once.

    Yields:
        One finished future per key; its `result()` is the clip, or raises what `read` raised.
    """
    waiting = iter(keys)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="clip") as pool:
        futures = deque(pool.submit(read, key) for key in islice(waiting, ahead))
        try:
            while futures:
                future = futures.popleft()
                future.exception()  # waits
                futures.extend(pool.submit(read, key) for key in islice(waiting, 1))
                yield future
        finally:
            for future in futures:
                future.cancel()


def default_threads() -> int:
    """How many videos to decode at once: each decoder has threads of its own."""
    return max(1, min(4, (os.cpu_count() or 1) // 2))
