"""Reading videos: which pictures a file shows, when it shows them, and which of them a model looks at.

Two decoders can do the work, and give the same frames and times. PyAV comes first: one pass over the packets, without
decoding, gives every picture's presentation time, and pictures are then fetched by that time. decord counts frames
instead, and silently returns other pictures than those asked for wherever counting fails (open GOPs, edit lists,
MPEG-TS); it also decodes ahead without a bound, which on few cores fills the memory with full-size frames. So it is
used only where PyAV is missing or where it is asked for by name, and then only for files in which counting cannot fail
and its pixels are known to equal PyAV's.

Where only decord is installed its own index has to be trusted: see `DecordReader`.
"""

import importlib
import itertools
import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

# In order of preference.
BACKENDS = ("pyav", "decord")
MODULES = {"pyav": "av", "decord": "decord"}

# Decoding this many frames in a row costs no more than a seek, which throws away the frames in the decoder's threads.
SEEK_MARGIN = 16

# Demuxers of containers that store every frame's time and an index of keyframes: seeks end where they should. Others
# (MPEG-PS, MPEG-TS, AVI, FLV) are decoded from the beginning.
INDEXED_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")

# How files of those containers begin: the first box of an MP4 or MOV (its name follows 4 bytes of length), or EBML.
MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip")
MATROSKA_MAGIC = b"\x1a\x45\xdf\xa3"

# decord raises only when more than `fault_tol` (a share) of the frames were replaced by another one: allow none.
NO_FAULTS = 1e-9


class VideoReader(ABC):
    """The pictures of one clip, in display order.

    Attributes:
        path (`str` or `None`): the file; `None` for frames that came from memory.
        backend (`str`): what reads the pictures: "pyav", "decord", or another reader's own name.
        num_frames (`int`): how many pictures are shown.
        average_fps (`float`): the constant rate, or `num_frames / duration` of a variable-rate clip.
        times (`np.ndarray`, float64 (num_frames,)): when each picture comes up, in seconds after the first one.
        duration (`float`): seconds from the first picture's start to the last one's end, always
            `num_frames / average_fps`. The last picture is taken to stay for a typical (median) frame's time: with
            reordered frames, a container's own figure for it belongs to another picture.
        height, width (`int`): size of the upright pictures, in pixels.
    """

    path: str | None
    backend: str
    num_frames: int
    average_fps: float
    times: np.ndarray
    duration: float
    height: int
    width: int

    @abstractmethod
    def read(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Yield one uint8 RGB picture (height, width, 3) per index, holding only a few at a time.

        Args:
            indices: ascending frame numbers in [0, num_frames); a number may repeat.

        Raises:
            IndexError: a number is out of range.
            ValueError: the numbers are not ascending, or no picture can be decoded.
        """

    def check_indices(self, indices: Sequence[int]) -> np.ndarray:
        """`indices` as int64 (n,); raises as `read` does."""
        checked = np.asarray(indices, dtype=np.int64).reshape(-1)
        if (np.diff(checked) < 0).any():
            raise ValueError("frame indices must ascend; sort them")
        if checked.size and not 0 <= checked[0] <= checked[-1] < self.num_frames:
            raise IndexError(f"frame indices {checked[0]}..{checked[-1]} outside of 0..{self.num_frames - 1}")
        return checked


def open_video(path: str | os.PathLike, backend: str | None = None) -> VideoReader:
    """Open a video file.

    Args:
        path: a local video file.
        backend: "pyav", "decord", or `None` for the first of these that is installed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a readable video, `backend` is unknown, or decord was asked for by name and does not read
            this file exactly.
        ImportError: the decoder that is needed is not installed.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"unknown video backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    path = check_file(path)
    wanted = BACKENDS if backend is None else (backend,)
    chosen = next((name for name in wanted if import_decoder(name) is not None), None)
    if chosen is None:
        packages = " or ".join(MODULES[name] for name in wanted)
        raise ImportError(f"reading videos needs a decoder that is not installed: pip install {packages}")
    if import_decoder("pyav") is None:
        return DecordReader(path)
    reader = PyAVReader(path)
    if chosen == "pyav":
        return reader
    obstacle = reader.decord_obstacle
    if obstacle is not None:
        raise ValueError(f"{path}: decord would not read this file exactly ({obstacle}); use backend='pyav'")
    return DecordReader(path, reader)


def import_decoder(backend: str) -> ModuleType | None:
    """The module behind a backend's name, or `None` where it is not installed or its libraries do not load."""
    # Not an import statement: the check of remote code would turn that into a requirement.
    try:
        return importlib.import_module(MODULES[backend])
    except (ImportError, OSError):
        return None


def check_file(path: str | os.PathLike) -> str:
    """`path` as a string, if it is a file with something in it; FileNotFoundError or ValueError otherwise."""
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file; give the path of a local video or image")
    if os.path.isdir(path):
        raise ValueError(f"{path}: this is a directory; give the path of one video or image file")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{path}: this file is empty; download or record it again")
    return path


class PyAVReader(VideoReader):
    """Reads any file that FFmpeg reads, and shows what FFmpeg shows.

    Pictures that an edit list hides are left out, rotation and mirroring by the display matrix (in steps of 90
    degrees) are applied, and a picture that cannot be decoded is replaced by the one before it, with a warning, as on
    a player's screen. The index ends where a broken file ends, whatever its header claims. Files without presentation
    times (raw streams, AVI with B-frames) are decoded once to count the frames, at the constant rate declared.
    """

    backend = "pyav"

    def __init__(self, path: str):
        self.path = path
        self._av = import_decoder("pyav")
        self._read_index()

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        try:
            # Titles in other encodings than UTF-8 are no reason to refuse a video.
            container = self._av.open(self.path, metadata_errors="replace")
        except self._av.error.FFmpegError as error:
            raise ValueError(
                f"{self.path}: not a readable video ({error.strerror}); check that it is one and is complete"
            ) from error
        with container:
            # A cover picture of a song counts as a video stream too.
            cover = self._av.stream.Disposition.attached_pic
            streams = [stream for stream in container.streams.video if not stream.disposition & cover]
            if not streams:
                raise ValueError(f"{self.path}: no video in this file (only sound?); give a file with pictures")
            best = container.streams.best("video")
            yield container, best if best in streams else streams[0]

    def _packets(self, container: Any, stream: Any) -> Iterator[Any]:
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets)
            except (StopIteration, self._av.error.FFmpegError):
                return  # the end of the file, or the place where it breaks off
            if packet.size:
                yield packet

    def _decode(self, packets: Iterator[Any], stream: Any, threads: int) -> Iterator[tuple[int, Any]]:
        """Yield (tick, frame) in display order.

        With one thread, packets that cannot be decoded are passed over; with more, where such a packet can take good
        frames with it, FFmpegError is raised.
        """
        codec = stream.codec_context
        if not codec.is_open:
            codec.thread_type, codec.thread_count = "AUTO", threads
        count = itertools.count()
        for packet in itertools.chain(packets, [None]):
            try:
                frames = codec.decode(packet)
            except self._av.error.FFmpegError:
                if threads != 1:
                    raise
                continue
            for frame in frames:
                tick = frame.pts if self._timed else next(count)
                if tick is not None:  # a damaged frame can have lost its time
                    yield tick, frame

    def _seek(self, container: Any, stream: Any, keyframe: int) -> Iterator[Any]:
        """The packets from a keyframe (its tick) or an earlier one on; SeekError where the container cannot tell."""
        try:
            container.seek(int(keyframe), stream=stream)
        except self._av.error.FFmpegError as error:
            raise SeekError from error
        packets = itertools.dropwhile(lambda packet: not packet.is_keyframe, self._packets(container, stream))
        landed = next(packets, None)
        if landed is None or landed.pts > keyframe:
            raise SeekError
        return itertools.chain([landed], packets)

    def _read_index(self) -> None:
        with self._opened() as (container, stream):
            packets = [
                (packet.pts, packet.is_keyframe, packet.is_discard) for packet in self._packets(container, stream)
            ]
            rate = stream.average_rate or stream.guessed_rate
            self._seconds_per_tick = stream.time_base
            self._format = container.format.name
            # AVI has decoding times only, which are not the presentation times of reordered frames.
            untimed = self._format == "avi" and stream.codec_context.has_b_frames
        self._timed = not untimed and all(pts is not None for pts, *_ in packets)
        first_tick = self._read_first_frame()
        if self._timed:
            self._index_by_time(packets, first_tick)
        else:
            self._index_by_count(rate)
        self.num_frames = len(self._ticks)
        tick = self._seconds_per_tick
        # Numerator and denominator apart: one rounding, so that 63000 / 90000 is the float 0.7.
        self.times = (self._ticks - self._ticks[0]) * tick.numerator / tick.denominator
        self.average_fps, self.duration = rate_and_duration(self.times, float(rate) if rate else None)

    def _read_first_frame(self) -> int:
        """Learn from the first picture that decodes how pictures look here; returns its tick."""
        with self._opened() as (container, stream):
            tick, frame = next(self._decode(self._packets(container, stream), stream, threads=1), (None, None))
        if frame is None:
            raise ValueError(f"{self.path}: no frame of this video can be decoded; convert it or download it again")
        matrix = frame.side_data.get("DISPLAYMATRIX")
        self._matrix = None if matrix is None else np.frombuffer(bytes(matrix), dtype=np.int32, count=9)
        self._stored_size = {"width": frame.width, "height": frame.height}
        self.height, self.width = self._upright(frame).shape[:2]
        self._interlaced = frame.interlaced_frame
        self._bits = max(component.bits for component in frame.format.components)
        return tick

    def _upright(self, frame: Any) -> np.ndarray:
        """The picture as a player shows it: uint8 RGB (height, width, 3)."""
        # A change of size within the video is scaled back, as FFmpeg does.
        picture = frame.reformat(format="rgb24", **self._stored_size).to_ndarray()
        if self._matrix is None:
            return picture
        # x' = a x + c y, y' = b x + d y; b and c outweigh a and d where the axes are swapped.
        a, b, _, c, d = self._matrix[:5]
        if abs(b) > abs(a):
            picture, a, d = picture.transpose(1, 0, 2), c, b
        return np.ascontiguousarray(picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])

    def _index_by_time(self, packets: list[tuple[int, bool, bool]], first_tick: int) -> None:
        """Index the pictures by presentation tick; `packets` are (pts, is keyframe, is hidden) in decoding order."""
        ticks, keyframe, discard = (np.array(column) for column in zip(*packets, strict=True))
        self._hides_frames = bool(discard.any())
        # Pictures before the first that decodes belong to a GOP whose beginning is missing.
        shown = ~discard & (ticks >= first_tick)
        self._ticks = np.unique(ticks[shown])
        self._keyframes = np.unique(ticks[keyframe])
        # A GOP is open when pictures stored after its keyframe are shown before it.
        earliest_from_here = np.minimum.accumulate(ticks[::-1])[::-1]
        self._open_gops = bool((earliest_from_here[keyframe] < ticks[keyframe]).any())

    def _index_by_count(self, rate: Any) -> None:
        """Index pictures without times by decoding them all."""
        if not rate:
            raise ValueError(f"{self.path}: this file has neither frame times nor a frame rate; convert it to MP4")
        with self._opened() as (container, stream):
            frames = self._decode(self._packets(container, stream), stream, threads=1)
            self._ticks = np.array([tick for tick, _ in frames], dtype=np.int64)
        self._seconds_per_tick = 1 / rate
        self._keyframes = self._ticks[:1]

    @property
    def decord_obstacle(self) -> str | None:
        """Why decord would not give this file's frames exactly, or `None` where it does."""
        if self._format not in INDEXED_FORMATS:
            return f"its seeks are unreliable in {self._format}"
        if not self._timed:
            return "there are no frame times"
        if self._hides_frames:
            return "an edit list hides frames"
        if self._open_gops:
            return "its seeks are wrong in open GOPs"
        if self._matrix is not None:
            return "the pictures are rotated"
        if self._interlaced:
            return "the pictures are interlaced"
        if self._bits > 8:
            return f"the pictures have {self._bits} bits per colour"
        return None

    def read(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        ticks = self._ticks[self.check_indices(indices)]
        done, threads, may_seek = 0, 0, self._format in INDEXED_FORMATS
        while done < len(ticks):
            try:
                for picture in self._read_ticks(ticks[done:], threads, may_seek):
                    yield picture
                    done += 1
            except SeekError:
                may_seek = False
            except self._av.error.FFmpegError as error:
                if threads == 1:
                    raise ValueError(f"{self.path}: a picture cannot be converted ({error.strerror})") from error
                threads = 1

    def _read_ticks(self, ticks: np.ndarray, threads: int, may_seek: bool) -> Iterator[np.ndarray]:
        """The picture on screen at each of the ascending `ticks`."""
        with self._opened() as (container, stream):
            frames = self._decode(self._packets(container, stream), stream, threads)
            shown = coming = picture = None  # (tick, frame) on screen, the one after it where known, and its pixels
            position, warned = self._ticks[0], False
            for tick in ticks:
                keyframe = self._keyframe_before(tick)
                if may_seek and self._frames_between(position, keyframe) > SEEK_MARGIN:
                    frames = self._decode(self._seek(container, stream, keyframe), stream, threads)
                    shown, coming = None, next(frames, None)
                    if coming is None or coming[0] > tick:
                        raise SeekError
                while shown is None or shown[0] < tick:
                    coming = coming or next(frames, None)
                    if coming is None or coming[0] > tick:
                        break
                    shown, coming, picture = coming, None, None
                if shown is None and coming is None:
                    raise ValueError(f"{self.path}: no frame after {self._seconds(position):.2f} s can be decoded")
                on_screen = shown or coming
                if on_screen[0] != tick and not warned:
                    warned = True
                    warnings.warn(
                        f"{self.path}: the frame at {self._seconds(tick):.2f} s and maybe more cannot be decoded; the "
                        "one before stands in, as on a player's screen",
                        stacklevel=2,
                    )
                if picture is None:
                    picture = self._upright(on_screen[1])
                position = on_screen[0]
                yield picture

    def _seconds(self, tick: int) -> float:
        return float((tick - self._ticks[0]) * self._seconds_per_tick)

    def _keyframe_before(self, tick: int) -> int:
        """The last keyframe shown at or before `tick`: decoding from it gives that picture, in open GOPs too."""
        return self._keyframes[max(0, np.searchsorted(self._keyframes, tick, side="right") - 1)]

    def _frames_between(self, tick: int, later: int) -> int:
        return int(np.searchsorted(self._ticks, later) - np.searchsorted(self._ticks, tick))


class SeekError(Exception):
    """A seek did not lead to the wanted frame."""


class DecordReader(VideoReader):
    """Fetches pictures with decord.

    Args:
        path: a video file.
        index: a `PyAVReader` of the same file without a `decord_obstacle`; it says how many frames there are and when.
            `None` where PyAV is not installed: then decord's own index is trusted, frames are decoded in one pass
            instead of sought, and times are good to 2 ms. Files in which this fails visibly are refused.

    Raises:
        ValueError: decord cannot read the file, or counts or times its frames differently from `index`.
    """

    backend = "decord"

    def __init__(self, path: str, index: PyAVReader | None = None):
        self.path = path
        self._decord = import_decoder("decord")
        # Its Python side raises AssertionError and RuntimeError, its C++ side the two others.
        self._errors = (
            self._decord.DECORDError,
            self._decord.DECORDLimitReachedError,
            RuntimeError,
            AssertionError,
        )
        self._may_seek = index is not None
        reader, starts = self._retried(self._read_times)
        if index is None:
            self._trust(reader, starts)
            return
        if len(starts) != index.num_frames or np.abs(starts - index.times).max() > 2e-3:
            raise ValueError(f"{path}: decord counts or times the frames differently from PyAV; use backend='pyav'")
        self.num_frames, self.times, self.duration = index.num_frames, index.times, index.duration
        self.average_fps, self.height, self.width = index.average_fps, index.height, index.width

    def _open(self, threads: int) -> Any:
        return self._decord.VideoReader(self.path, num_threads=threads, fault_tol=NO_FAULTS)

    def _read_times(self, threads: int) -> tuple[Any, np.ndarray]:
        reader = self._open(threads)
        return reader, reader.get_frame_timestamp(range(len(reader)))[:, 0].astype(np.float64)

    def _retried(self, step: Callable[[int], Any]) -> Any:
        """The result of `step` with all threads, or with one where that fails."""
        try:
            return step(0)
        except self._errors:
            pass
        try:
            return step(1)
        except self._errors as error:
            raise ValueError(
                f"{self.path}: decord cannot read this file; check that it is complete, or use PyAV (pip install av)"
            ) from error

    def _trust(self, reader: Any, starts: np.ndarray) -> None:
        """Take over decord's own index, where it is not known to be wrong."""
        with open(self.path, "rb") as file:
            head = file.read(12)
        if head[4:8] not in MP4_BOXES and not head.startswith(MATROSKA_MAGIC):
            raise ValueError(f"{self.path}: decord alone reads only MP4, MOV, MKV and WebM reliably; pip install av")
        if starts[0] < 0:
            raise ValueError(f"{self.path}: an edit list hides frames, which decord does not know; pip install av")
        first = reader[0]
        if first.shape[2] != 3:
            raise ValueError(f"{self.path}: decord garbles pictures rotated by 90 degrees; pip install av")
        self.height, self.width = first.shape[:2]
        self.num_frames = len(starts)
        self.times = starts - starts[0]
        self.average_fps, self.duration = rate_and_duration(self.times, float(reader.get_avg_fps()))
        if has_constant_rate(self.times, self.average_fps):
            # decord keeps times in float32, too coarse for long videos.
            self.times = np.arange(self.num_frames) / self.average_fps

    def read(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        indices = self.check_indices(indices)
        done = 0
        for threads in (0, 1):
            try:
                for picture in self._read(indices[done:], threads):
                    yield picture
                    done += 1
                return
            except self._errors as error:
                failure = error
        raise ValueError(
            f"{self.path}: decord cannot decode frame {indices[done]}; use PyAV (pip install av, backend='pyav')"
        ) from failure

    def _read(self, indices: np.ndarray, threads: int) -> Iterator[np.ndarray]:
        reader = self._open(threads)
        position, picture = -1, None  # the frame fetched last, and its pixels
        for index in indices.tolist():
            if self._may_seek and index != position:
                picture, position = reader[index].asnumpy(), index
            # Not skip_frames, which miscounts in open GOPs too.
            while position < index:
                picture, position = reader.next().asnumpy(), position + 1
            yield picture


def has_constant_rate(times: np.ndarray, fps: float) -> bool:
    """Whether every picture comes up within half a frame of its place on the clock of a constant `fps`."""
    return bool(np.abs(times * fps - np.arange(len(times))).max() < 0.5)


def rate_and_duration(times: np.ndarray, declared_fps: float | None) -> tuple[float, float]:
    """The average frames per second and the duration in seconds of pictures that come up at `times`.

    The rate is the declared one where the times keep to it: theirs may be rounded to milliseconds.
    """
    if declared_fps and has_constant_rate(times, declared_fps):
        return declared_fps, len(times) / declared_fps
    if len(times) == 1:
        raise ValueError("a single picture without a declared rate has no duration")
    duration = float(times[-1] + np.median(np.diff(times)))
    return len(times) / duration, duration


def sample_frame_indices(
    num_frames: int,
    average_fps: float,
    fps: float | None = None,
    num_frames_wanted: int | None = None,
    max_frames: int | None = None,
    times: np.ndarray | None = None,
) -> np.ndarray:
    """Choose which frames of a clip a model looks at.

    By rate (the default, at 1 fps): at a constant rate, frames `round(arange(0, num_frames, average_fps / fps))`,
    numpy rounding; a rate above the clip's own repeats frames. At a variable rate, for each k / fps seconds the frame
    on screen at that time, or the next one where that comes up less than half a typical (median) frame later: which is
    the same rounding where frames come regularly, and does not run ahead where one frame stays on screen for long. A
    clip counts as constant-rate while every frame comes up within half a frame of its place on the clock.

    By number: that many frames spread evenly over time from the first to the last frame, both included; more than
    there are repeats frames.

    Args:
        num_frames: frames in the clip.
        average_fps: the clip's frames per second: the constant rate, or frames / duration.
        fps: frames to take per second; 1 where neither it nor `num_frames_wanted` is given.
        num_frames_wanted: how many frames to take, instead of `fps`.
        max_frames: the most frames to take. Where `fps` gives more, the rate is lowered to as many frames, evenly over
            the clip, beginning with the first.
        times: seconds of every frame, float64 (num_frames,); a constant rate where it is not given.

    Returns:
        int64 (n,) ascending frame numbers.

    Raises:
        ValueError: a value is not positive, or both `fps` and `num_frames_wanted` are given.
    """
    if fps is not None and num_frames_wanted is not None:
        raise ValueError("fps and num_frames exclude each other; pass one of them")
    check_positive(
        num_frames=num_frames, average_fps=average_fps, fps=fps, num_frames_wanted=num_frames_wanted,
        max_frames=max_frames,
    )  # fmt: skip
    clock = np.arange(num_frames) / average_fps if times is None else np.asarray(times, dtype=np.float64)
    if num_frames_wanted is not None:
        count = num_frames_wanted if max_frames is None else min(num_frames_wanted, max_frames)
        return frames_at(np.linspace(0, clock[-1], count), clock)
    step = average_fps / (1.0 if fps is None else fps)
    positions = np.arange(0, num_frames, step)
    if max_frames is not None and len(positions) > max_frames:
        positions = np.arange(max_frames) * (num_frames / max_frames)
    if has_constant_rate(clock, average_fps):
        return np.clip(np.round(positions), 0, num_frames - 1).astype(np.int64)
    return frames_at(positions / average_fps, clock)


def frames_at(seconds: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The frame on screen at each of `seconds`, or the next where that is less than half a typical frame away."""
    half_frame = np.median(np.diff(times)) / 2 if len(times) > 1 else 0.0
    return np.maximum(np.searchsorted(times, seconds + half_frame, side="right") - 1, 0).astype(np.int64)


def check_positive(**values: float | None) -> None:
    """ValueError naming the first of `values` that is neither `None` nor a finite number above 0."""
    for name, value in values.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a positive number, not {value!r}")
