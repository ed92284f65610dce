"""Videos on their way to the model: found, sampled, and decoded ahead of time by a few processes."""

import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from threading import Thread

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..clip_encoder import DecodedClip
from ..loader_workers import leave_with_parent
from ..video_decoding_etchat import rate_and_duration, sample_frame_indices
from ..video_processing_etchat import ETChatVideoProcessor, SampledClip

# MVBench ships the frames of some videos as images in a folder, so many per second.
FRAME_FOLDER_FPS = 3.0
FRAME_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")

DEAD_WORKER = "DataLoader worker (pid"  # how torch begins to tell of a process that did not end by itself


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
    read: Callable[[Hashable], DecodedClip], keys: Sequence[Hashable], ahead: int, num_workers: int
) -> Iterator[DecodedClip | str]:
    """Reads clips in order, in processes, while the caller is busy with earlier ones.

    In threads every call of a decoder would take Python's global lock from the thread that drives the model.

    Args:
        read: Makes the clip of a key; can be pickled.
        keys: What to read, in order.
        ahead: How many clips are read beyond those already taken, rounded up to a multiple of `num_workers`.
        num_workers: How many are read at once.

    Yields:
        The clip of each key, or in one line why there is none: `read` raised OSError or ValueError, or a process died
        of it. Any other error is raised.
    """
    done, is_alone = 0, False
    while done < len(keys):
        begun = done
        # Which of the keys being read a process died of is unknown: each is then read alone, until one is the cause
        clips = _load(read, keys[done : done + 1] if is_alone else keys[done:], ahead, num_workers)
        try:
            for clip in clips:
                yield _with_tensor(clip)
                done += 1
            is_alone = False
        except RuntimeError as error:
            if DEAD_WORKER not in str(error):
                raise
            if is_alone and done == begun:
                yield "the process that decoded it died; was there too little memory?"
                done += 1
            is_alone = not is_alone


def _load(read: Callable[[Hashable], DecodedClip], keys: Sequence[Hashable], ahead: int, num_workers: int) -> Iterator:
    num_workers = min(num_workers, len(keys))
    loader = DataLoader(
        _Reading(read, keys),
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=-(-ahead // num_workers),
        collate_fn=_without_tensor,
        worker_init_fn=leave_with_parent,
    )
    # From another thread: else torch has a signal raise an error, amid whatever goes on, when a process dies. It still
    # does where a loader has been started from the main thread before.
    started = Future()
    thread = Thread(target=_start, args=(loader, started))
    thread.start()
    thread.join()
    return started.result()


def _start(loader: DataLoader, started: Future) -> None:
    try:
        started.set_result(iter(loader))
    except OSError as error:  # no further process can be had
        started.set_exception(error)


class _Reading(Dataset):
    """What `read` makes of each key."""

    def __init__(self, read: Callable[[Hashable], DecodedClip], keys: Sequence[Hashable]):
        self._read, self._keys = read, keys

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, position: int) -> DecodedClip | str:
        try:
            return self._read(self._keys[position])
        except (OSError, ValueError) as error:
            return reason_of(error)


# A tensor would travel through shared memory, of which containers have little; an array does through a pipe.
def _without_tensor(clip: DecodedClip | str) -> tuple[DecodedClip | str, np.ndarray | None, torch.dtype | None]:
    if isinstance(clip, str) or clip.pixel_values is None:
        return clip, None, None
    pixels = clip.pixel_values
    return replace(clip, pixel_values=None), pixels.view(torch.uint8).numpy(), pixels.dtype


def _with_tensor(parts: tuple[DecodedClip | str, np.ndarray | None, torch.dtype | None]) -> DecodedClip | str:
    clip, array, dtype = parts
    return clip if array is None else replace(clip, pixel_values=torch.from_numpy(array).view(dtype))


def reason_of(error: Exception) -> str:
    """An error's message in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def default_workers() -> int:
    """How many videos to decode at once."""
    return max(1, min(4, (os.cpu_count() or 1) // 2))
