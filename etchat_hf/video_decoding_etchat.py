"""Reading videos: which pictures a file shows, when it shows them, and which of them a model looks at.

Three decoders can do the work, and give the same frames and times. PyAV comes first: one pass over the packets,
without decoding, gives every picture's presentation time, and pictures are then fetched by that time. torchcodec says
the time of each picture that it returns, which is checked. decord counts frames instead, and silently returns other
pictures than those asked for wherever counting fails (open GOPs, edit lists, MPEG-TS); it also decodes ahead without a
bound, which on few cores fills the memory with full-size frames. So it is used only for files in which counting cannot
fail and its pixels are known to equal PyAV's. The two others serve where they are asked for by name, or where PyAV is
missing or cannot read a file, and then the index has to be their own: see `TorchcodecReader` and `DecordReader`.

A video's bytes come from anywhere: see `Source`.
"""

import importlib
import io
import itertools
import math
import numbers
import os
import re
import shutil
import sys
import tempfile
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import cached_property
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
from torch.utils.data import get_worker_info

# In order of preference.
BACKENDS = ("pyav", "torchcodec", "decord")
PACKAGES = {"pyav": "av", "torchcodec": "torchcodec", "decord": "decord"}
MODULES = {"pyav": "av", "torchcodec": "torchcodec.decoders", "decord": "decord"}

# "https://", "hf://", or fsspec's chains such as "zip://a.mp4::s3://". One letter is a drive of Windows.
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(://|::)")

# Remote files are fetched in blocks of so many bytes; what is fetched moves from memory to the disk beyond a limit.
REMOTE_BLOCK = 1 << 20
SPOOL_LIMIT = 1 << 26

# torchcodec returns pictures in batches: of so many bytes, but of one picture at least.
BATCH_BYTES = 1 << 26

# More sampled frames than this (a day at 60 fps has half as many) are a mistake, not a wish.
MOST_SAMPLES = 10_000_000

# Decoding this many frames in a row costs no more than a seek, which throws away the frames in the decoder's threads.
SEEK_MARGIN = 16

# Demuxers of containers that store every frame's time and an index of keyframes: seeks end where they should. Others
# (MPEG-PS, MPEG-TS, AVI, FLV) are decoded from the beginning.
INDEXED_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")

# Formats of FFmpeg whose files name others instead of holding pictures, and what the texts among those begin with.
PLAYLISTS = {"applehttp", "concat", "dash", "hls", "imf", "rtp", "rtsp", "sap", "sdp", "webm_dash_manifest"}
HEAD_BYTES, PLAYLIST_MARKS = 4096, (b"#EXTM3U", b"ffconcat version", b"<MPD", b"<CompositionPlaylist", b"c=IN IP")

# Decoders that can leave out pictures on which no other depends.
SKIPPING_CODECS = ("h264", "hevc")

# How files of those containers begin: the first box of an MP4 or MOV (its name follows 4 bytes of length), or EBML.
MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip")
MATROSKA_MAGIC = b"\x1a\x45\xdf\xa3"

# Stands for the missing time of a packet.
NO_TIME = np.iinfo(np.int64).min

# decord raises only when more than `fault_tol` (a share) of the frames were replaced by another one: allow none.
NO_FAULTS = 1e-9


def decoder_threads() -> int:
    """0, for as many as a decoder likes; but 1 in a data loader's workers, which share the cores already."""
    return int(get_worker_info() is not None)


class VideoReader(ABC):
    """The pictures of one clip, in display order.

    Attributes:
        path (`str` or `None`): the file or URL; `None` for what came from memory.
        name (`str`): names the clip in messages.
        backend (`str`): what reads the pictures: "pyav", "torchcodec", "decord", or another reader's own name.
        num_frames (`int`): how many pictures are shown.
        average_fps (`float`): the constant rate, or `num_frames / duration` of a variable-rate clip.
        times (`np.ndarray`, float64 (num_frames,)): when each picture comes up, in seconds after the first one.
        duration (`float`): seconds from the first picture's start to the last one's end, always
            `num_frames / average_fps`. The last picture is taken to stay for a typical (median) frame's time: with
            reordered frames, a container's own figure for it belongs to another picture.
        height, width (`int`): size of the upright pictures, in pixels.
    """

    path: str | None
    name: str
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

    def adopt(self, index: "VideoReader") -> None:
        """Take over the numbers, times and sizes of another reader of the same video."""
        self.num_frames, self.times, self.duration = index.num_frames, index.times, index.duration
        self.average_fps, self.height, self.width = index.average_fps, index.height, index.width

    def check_indices(self, indices: Sequence[int]) -> np.ndarray:
        """`indices` as int64 (n,); raises as `read` does."""
        checked = np.asarray(indices, dtype=np.int64).reshape(-1)
        if (np.diff(checked) < 0).any():
            raise ValueError("frame indices must ascend; sort them")
        if checked.size and not 0 <= checked[0] <= checked[-1] < self.num_frames:
            raise IndexError(f"frame indices {checked[0]}..{checked[-1]} outside of 0..{self.num_frames - 1}")
        return checked


class Source:
    """The bytes of a video or image, wherever they are.

    They can be opened as often as it takes and by several readers at once. Local files are read in place. A remote
    file is looked up when it is first opened; the blocks that are read are fetched, once, and kept in memory or in a
    temporary file that has no name and vanishes with this object. A server that cannot send parts sends all of it.

    Args:
        source: a local path; a URL (`http://`, `https://`, `hf://`, or any other that fsspec knows); `bytes`; a binary
            file object, read from its beginning; or a mapping with `bytes` or, where these are `None`, a `path`, as
            `datasets` has them in undecoded `Video` and `Image` columns.

    Attributes:
        name (`str`): names the source in messages.
        path (`str` or `None`): the path or URL, if there is one.
        is_local (`bool`): whether `path` is a local file.

    Raises:
        FileNotFoundError: there is no such file; at a URL when it is first opened, as are the following.
        ValueError: the source is empty, a directory, a closed or a text file, or nothing of the above.
        OSError: a URL cannot be opened.
        ImportError: fsspec or its package for this kind of URL is not installed.
    """

    def __init__(self, source: Any):
        if isinstance(source, Mapping):
            source = content_of(source)
        self.path, self._content = None, source
        if isinstance(source, str | os.PathLike):
            self.name = self.path = os.fspath(source)
        elif isinstance(source, bytes | bytearray | memoryview):
            self.name = f"<{len(source)} bytes>"
        elif is_file_object(source):
            self.name = "<file object>"
        else:
            raise ValueError(f"a {type(source).__name__} is no video or image; pass a path, a URL, bytes or a file")
        self.is_local = self.path is not None and not is_url(source)
        if self.is_local:
            check_file(self.path)

    @cached_property
    def _shared(self) -> "SharedFile":
        if is_url(self._content):
            shared = open_url(self.path)
        elif is_file_object(self._content):
            shared = share_file_object(self.name, self._content)
        else:
            shared = SharedFile(self.name, io.BytesIO(self._content))
        if shared.size == 0:
            raise ValueError(f"{self.name}: there is nothing in it; download or record it again")
        return shared

    def open(self) -> BinaryIO:
        """A file object of its own, at the beginning."""
        return open(self.path, "rb") if self.is_local else io.BufferedReader(View(self._shared))

    @property
    def location(self) -> str | BinaryIO:
        """What decoders take: the path of a local file, and a new file object for all else."""
        return self.path if self.is_local else self.open()


def is_url(source: Any) -> bool:
    """Whether this is a string that fsspec opens, and no local path."""
    return isinstance(source, str) and URL.match(source) is not None


def is_file_object(source: Any) -> bool:
    """Whether this can be read like a file."""
    return hasattr(source, "read")


def is_source(source: Any) -> bool:
    """Whether `Source` takes it."""
    return isinstance(source, str | os.PathLike | bytes | bytearray | memoryview | Mapping) or is_file_object(source)


def content_of(row: Mapping[str, Any]) -> Any:
    """What `{"path": ..., "bytes": ...}` holds: the bytes, or the path where there are none."""
    if not {"path", "bytes"} & row.keys():
        raise ValueError(f"a clip cannot be a dict of {sorted(map(str, row))}; it needs 'path' or 'bytes'")
    content = row.get("path") if row.get("bytes") is None else row["bytes"]
    if content is None:
        raise ValueError("a clip of the form {'path', 'bytes'} needs one of them, but both are None")
    return content


def check_file(path: str) -> None:
    """FileNotFoundError or ValueError unless `path` is a file with something in it."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file; give the path of a local video or image, or a URL")
    if os.path.isdir(path):
        raise ValueError(f"{path}: this is a directory; give the path of one video or image file")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{path}: this file is empty; download or record it again")


class SharedFile:
    """A seekable file that several `View`s read, from several threads.

    Attributes:
        name (`str`): names the file in messages.
        size (`int`): in bytes.
    """

    def __init__(self, name: str, file: BinaryIO):
        self.name, self._file, self._lock = name, file, threading.Lock()
        self.size = file.seek(0, os.SEEK_END)

    def read_at(self, position: int, size: int) -> bytes:
        """The bytes from `position` on: `size` of them, or fewer at the end. OSError if they cannot be read."""
        with self._lock:
            return self._read_at(position, size)

    def _read_at(self, position: int, size: int) -> bytes:
        try:
            self._file.seek(position)
            return self._file.read(size)
        except Exception as error:  # each of fsspec's file systems has errors of its own
            raise OSError(f"{self.name}: reading failed ({one_line(error)})") from error


class RemoteFile(SharedFile):
    """A `SharedFile` of which every block is fetched once, when it is first read.

    Args:
        name: names the file in messages.
        file: what to fetch from.
        system: fsspec's file system; some close their files when they are no longer referred to.
    """

    def __init__(self, name: str, file: BinaryIO, system: Any = None):
        super().__init__(name, file)
        self._system = system
        self._fetched: set[int] = set()
        self._kept = tempfile.SpooledTemporaryFile(SPOOL_LIMIT)

    def _read_at(self, position: int, size: int) -> bytes:
        end = min(position + size, self.size)
        for block in range(position // REMOTE_BLOCK, -(-end // REMOTE_BLOCK)):
            if block not in self._fetched:
                start = block * REMOTE_BLOCK
                content = super()._read_at(start, min(REMOTE_BLOCK, self.size - start))
                self._kept.seek(start)
                self._kept.write(content)
                self._fetched.add(block)
        self._kept.seek(position)
        return self._kept.read(max(0, end - position))


class View(io.RawIOBase):
    """A `SharedFile` with a position of its own. After a failure, which is raised once, the file seems to end."""

    def __init__(self, shared: SharedFile):
        self._shared, self._position, self._failed = shared, 0, False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._failed:
            return 0
        self._failed = True
        content = self._shared.read_at(self._position, len(buffer))
        self._failed = False
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._shared.size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position


def share_file_object(name: str, file: Any) -> SharedFile:
    """A user's file object, or a copy of what it still holds where it cannot seek (a pipe, a download)."""
    if file.closed:
        raise ValueError("the file object is closed; pass an open one, or the path")
    if isinstance(file, io.TextIOBase):
        raise ValueError("the file object was opened as text; open it with mode 'rb'")
    return SharedFile(name, file if file.seekable() else copied(file))


def copied(file: BinaryIO) -> BinaryIO:
    """A seekable copy of what is left in `file`."""
    copy = tempfile.SpooledTemporaryFile(SPOOL_LIMIT)
    shutil.copyfileobj(file, copy, REMOTE_BLOCK)
    return copy


def open_url(url: str) -> SharedFile:
    """A file behind a URL; raises as `Source` does."""
    try:
        fsspec = importlib.import_module("fsspec")
        system, path = fsspec.url_to_fs(url)
    except ImportError as error:
        raise ImportError(
            f"{url}: this URL needs a package ({one_line(error)}); pip install 'fsspec[http]'"
        ) from error
    except Exception as error:  # each of fsspec's file systems has errors of its own
        raise OSError(f"{url}: not a URL that fsspec knows ({one_line(error)})") from error
    try:
        if "file" in ([system.protocol] if isinstance(system.protocol, str) else system.protocol):
            return SharedFile(url, open(path, "rb"))
        try:
            remote = system.open(path, "rb", cache_type="none")
            file = RemoteFile(url, remote, system)
            # Some servers promise ranges, or keep silent about them, and do not serve them.
            remote.seek(file.size - 1)
            remote.read(1)
            return file
        except ValueError:
            with system.open(path, "rb", block_size=0) as stream:
                return SharedFile(url, copied(stream))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{url}: no such file, or no answer; check the URL") from error
    except Exception as error:
        raise OSError(f"{url}: cannot be opened ({one_line(error)})") from error


def one_line(error: Exception) -> str:
    """An error's message, or its type where it has none, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def open_video(source: Any, backend: str | None = None) -> VideoReader:
    """Open a video.

    Args:
        source: what `Source` takes, a `Source`, or a `torchcodec.decoders.VideoDecoder`, which then decodes.
        backend: "pyav", "torchcodec", "decord", or `None` for the first of these that is installed and reads the file.

    Raises:
        FileNotFoundError, OSError: as `Source`.
        ValueError: it is not a readable video, `backend` is unknown, or the decoder that was asked for by name does
            not read this file exactly.
        ImportError: the decoder that is needed is not installed.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"unknown video backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    if is_torchcodec_decoder(source):
        return TorchcodecReader(source)
    source = source if isinstance(source, Source) else Source(source)
    if backend is None:
        return open_with_any(source)
    check_installed(backend)
    if backend != "pyav" and import_decoder("pyav") is not None:
        return READERS[backend](source, PyAVReader(source))
    return open_alone(backend, source)


def open_with_any(source: Source) -> VideoReader:
    """The first reader that is installed and reads the file; raises what the first one raises if none does."""
    failures = []
    for backend in BACKENDS:  # one by one: imports take time
        if import_decoder(backend) is not None:
            try:
                return open_alone(backend, source)
            except ValueError as error:
                failures.append(error)
    if not failures:
        check_installed(*BACKENDS)
    raise failures[0]


def open_alone(backend: str, source: Source) -> VideoReader:
    """The reader with an index of its own; ValueError for a playlist, also where the decoder would follow it."""
    if backend != "pyav":
        with source.open() as file:
            head = file.read(HEAD_BYTES)
        if b"\0" not in head and any(mark in head for mark in PLAYLIST_MARKS):
            raise ValueError(f"{source.name}: a playlist, which names other files; give one of those")
    return READERS[backend](source)


def check_installed(*backends: str) -> None:
    """ImportError unless one of the `backends` is installed."""
    if all(import_decoder(backend) is None for backend in backends):
        packages = " or ".join(PACKAGES[backend] for backend in backends)
        raise ImportError(f"reading videos needs a decoder that is not installed: pip install {packages}")


def import_decoder(backend: str) -> ModuleType | None:
    """The module behind a backend's name, or `None` where it is not installed or its libraries do not load."""
    # Not an import statement: the check of remote code would turn that into a requirement.
    try:
        return importlib.import_module(MODULES[backend])
    except (ImportError, OSError, RuntimeError):  # torchcodec raises the last where it finds no FFmpeg
        return None


def is_torchcodec_decoder(source: Any) -> bool:
    """Whether this is a `torchcodec.decoders.VideoDecoder`."""
    module = sys.modules.get(MODULES["torchcodec"])  # loaded, if there is such an object
    return module is not None and isinstance(source, module.VideoDecoder)


class PyAVReader(VideoReader):
    """Reads any file that FFmpeg reads, and shows what FFmpeg shows.

    Pictures that an edit list hides are left out, rotation and mirroring by the display matrix (in steps of 90
    degrees) are applied, and a picture that cannot be decoded is replaced by the one before it, with a warning, as on
    a player's screen. The index ends where a broken file ends, whatever its header claims. Files without presentation
    times (raw streams, AVI with B-frames) are decoded once to count the frames, at the constant rate declared.
    """

    backend = "pyav"

    def __init__(self, source: Source):
        self.path, self.name = source.path, source.name
        self._source = source
        self._av = import_decoder("pyav")
        self._read_index()

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        place, protocols = self._place()
        try:
            # Titles in other encodings than UTF-8 are no reason to refuse a video.
            options = {"protocol_whitelist": protocols, "format_whitelist": self._formats()}
            container = self._av.open(place, metadata_errors="replace", options=options)
        except self._av.error.FFmpegError as error:
            raise ValueError(
                f"{self.name}: not a readable video ({error.strerror}); check that it is one and is complete"
            ) from error
        with container:
            # A cover picture of a song counts as a video stream too.
            cover = self._av.stream.Disposition.attached_pic
            streams = [stream for stream in container.streams.video if not stream.disposition & cover]
            if not streams:
                raise ValueError(f"{self.name}: no video in this file (only sound?); give a file with pictures")
            best = container.streams.best("video")
            chosen = best if best in streams else streams[0]
            if chosen.codec_context is None:
                raise ValueError(f"{self.name}: its pictures are coded in a way unknown to FFmpeg; convert it to MP4")
            yield container, chosen

    def _place(self) -> tuple[str | BinaryIO, str]:
        """What FFmpeg opens, and the protocols of what it may name in turn: never the network."""
        if self._source.is_local:
            return f"file:{self.path}", "file,crypto,data"
        return self._source.open(), "none"

    def _formats(self) -> str:
        """All containers but those that name other files, which could be anywhere, or wait for more to come."""
        return ",".join(self._av.formats_available - PLAYLISTS)

    def _packets(self, container: Any, stream: Any) -> Iterator[Any]:
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets)
            except (StopIteration, self._av.error.FFmpegError):
                return  # the end of the file, or the place where it breaks off
            if packet.size:
                yield packet

    def _decode(
        self, packets: Iterator[Any], stream: Any, threads: int, wanted: Container[int] | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Yield (tick, frame) in display order: all, or at least those whose ticks are `wanted`.

        With one thread, packets that cannot be decoded are passed over; with more, where such a packet can take good
        frames with it, FFmpegError is raised.
        """
        codec = stream.codec_context
        if not codec.is_open:
            codec.thread_type, codec.thread_count = "AUTO", threads
        count = itertools.count()
        for packet in itertools.chain(packets, [None]):
            if wanted is not None:
                # Pictures that are not wanted, and of no use for decoding others, are passed over.
                codec.skip_frame = "DEFAULT" if packet is None or packet.pts in wanted else "NONREF"
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
            # Hours of video have millions of packets, so no Python objects are kept.
            packets = np.fromiter(
                (
                    (NO_TIME if packet.pts is None else packet.pts, packet.is_keyframe, packet.is_discard)
                    for packet in self._packets(container, stream)
                ),
                dtype=[("tick", np.int64), ("keyframe", bool), ("discard", bool)],
            )
            rate = stream.average_rate or stream.guessed_rate
            self._seconds_per_tick = stream.time_base
            self._format = container.format.name
            # AVI has decoding times only, which are not the presentation times of reordered frames.
            untimed = self._format == "avi" and stream.codec_context.has_b_frames
            self._codec = stream.codec_context.name
        self._timed = not untimed and bool((packets["tick"] != NO_TIME).all())
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
            raise ValueError(f"{self.name}: no frame of this video can be decoded; convert it or download it again")
        matrix = frame.side_data.get("DISPLAYMATRIX")
        self._matrix = None if matrix is None else np.frombuffer(bytes(matrix), dtype=np.int32, count=9)
        self._stored_size = (frame.width, frame.height)
        self.height, self.width = self._upright(frame, RGBConverter(self._av, self._stored_size)).shape[:2]
        halved_colours = frame.format.chroma_width(2) == 1 or frame.format.chroma_height(2) == 1
        self._odd_colours = halved_colours and (frame.width % 2 == 1 or frame.height % 2 == 1)
        self._bits = max(component.bits for component in frame.format.components)
        return tick

    def _upright(self, frame: Any, converter: "RGBConverter") -> np.ndarray:
        """The picture as a player shows it: uint8 RGB (height, width, 3)."""
        picture = converter(frame)
        if self._matrix is None:
            return picture
        # x' = a x + c y, y' = b x + d y; b and c outweigh a and d where the axes are swapped.
        a, b, _, c, d = self._matrix[:5]
        if abs(b) > abs(a):
            picture, a, d = picture.transpose(1, 0, 2), c, b
        return np.ascontiguousarray(picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])

    def _index_by_time(self, packets: np.ndarray, first_tick: int) -> None:
        """Index the pictures by presentation tick; `packets` are (tick, keyframe, discard) in decoding order."""
        ticks, keyframe, discard = packets["tick"], packets["keyframe"], packets["discard"]
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
            raise ValueError(f"{self.name}: this file has neither frame times nor a frame rate; convert it to MP4")
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
        if self._odd_colours:
            return "it shifts the colours of odd sizes"
        if self._bits > 8:
            return f"the pictures have {self._bits} bits per colour"
        return None

    @property
    def torchcodec_obstacle(self) -> str | None:
        """Why torchcodec would not give this file's frames exactly, or `None` where it does or notices itself."""
        if self._matrix is None:
            return None
        a, b, _, c, d = self._matrix[:5].astype(np.int64)
        return "it does not mirror pictures" if a * d - b * c < 0 else None

    def read(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        ticks = self._ticks[self.check_indices(indices)]
        done, threads, may_seek = 0, decoder_threads(), self._format in INDEXED_FORMATS
        while done < len(ticks):
            try:
                for picture in self._read_ticks(ticks[done:], threads, may_seek):
                    yield picture
                    done += 1
            except SeekError:
                may_seek = False
            except self._av.error.FFmpegError as error:
                if threads == 1:
                    raise ValueError(f"{self.name}: a picture cannot be converted ({error.strerror})") from error
                threads = 1

    def _read_ticks(self, ticks: np.ndarray, threads: int, may_seek: bool) -> Iterator[np.ndarray]:
        """The picture on screen at each of the ascending `ticks`."""
        # One packet is one whole picture in these containers, and these decoders take the wish packet by packet.
        can_skip = self._timed and self._format in INDEXED_FORMATS and self._codec in SKIPPING_CODECS
        wanted = set(ticks.tolist()) if can_skip else None
        with self._opened() as (container, stream):
            frames = self._decode(self._packets(container, stream), stream, threads, wanted)
            converter = RGBConverter(self._av, self._stored_size)
            shown = coming = picture = None  # (tick, frame) on screen, the one after it where known, and its pixels
            position, warned = self._ticks[0], False
            for tick in ticks:
                keyframe = self._keyframe_before(tick)
                if may_seek and self._frames_between(position, keyframe) > SEEK_MARGIN:
                    frames = self._decode(self._seek(container, stream, keyframe), stream, threads, wanted)
                    shown, coming = None, next(frames, None)
                    if coming is None or coming[0] > tick:
                        raise SeekError
                while shown is None or shown[0] < tick:
                    coming = coming or next(frames, None)
                    if coming is None or coming[0] > tick:
                        break
                    shown, coming, picture = coming, None, None
                if shown is None and coming is None:
                    raise ValueError(f"{self.name}: no frame after {self._seconds(position):.2f} s can be decoded")
                on_screen = shown or coming
                if on_screen[0] != tick and not warned:
                    warned = True
                    warnings.warn(
                        f"{self.name}: the frame at {self._seconds(tick):.2f} s and maybe more cannot be decoded; the "
                        "one before stands in, as on a player's screen",
                        stacklevel=2,
                    )
                if picture is None:
                    picture = self._upright(on_screen[1], converter)
                position = on_screen[0]
                yield picture

    def _seconds(self, tick: int) -> float:
        return float((tick - self._ticks[0]) * self._seconds_per_tick)

    def _keyframe_before(self, tick: int) -> int:
        """The last keyframe shown at or before `tick`: decoding from it gives that picture, in open GOPs too."""
        return self._keyframes[max(0, np.searchsorted(self._keyframes, tick, side="right") - 1)]

    def _frames_between(self, tick: int, later: int) -> int:
        return int(np.searchsorted(self._ticks, later) - np.searchsorted(self._ticks, tick))


class RGBConverter:
    """Turns decoded frames into uint8 RGB (height, width, 3), bit by bit as FFmpeg's command line does.

    PyAV's own `reformat` is several times slower, and places the colours of 10-bit, interlaced and odd-sized pictures
    differently.

    Args:
        av: PyAV.
        size: (width, height) of the result in pixels, to which all frames are scaled in case theirs change.
    """

    def __init__(self, av: ModuleType, size: tuple[int, int]):
        self._av, self._size = av, size
        self._graph, self._input = None, None

    def __call__(self, frame: Any) -> np.ndarray:
        form = (frame.width, frame.height, frame.format.name)
        if form != self._input:
            self._graph, self._input = self._new_graph(*form), form
        self._graph.push(frame)
        return self._graph.pull().to_ndarray()

    def _new_graph(self, width: int, height: int, pixel_format: str) -> Any:
        graph = self._av.filter.Graph()
        filters = (
            graph.add_buffer(width=width, height=height, format=pixel_format, time_base=Fraction(1)),
            graph.add("scale", "{}:{}".format(*self._size)),
            graph.add("format", "rgb24"),
            graph.add("buffersink"),
        )
        for one, following in itertools.pairwise(filters):
            one.link_to(following)
        graph.configure()
        return graph


class SeekError(Exception):
    """A seek did not lead to the wanted frame."""


class DecordReader(VideoReader):
    """Fetches pictures with decord.

    Args:
        source: a local video file.
        index: a `PyAVReader` of the same file; it says how many frames there are and when. `None` where PyAV is not
            installed or cannot read the file: then decord's own index is trusted, frames are decoded in one pass
            instead of sought, and times are good to 2 ms. Files in which this fails visibly are refused.

    Raises:
        ValueError: decord cannot read the file exactly, or counts or times its frames differently from `index`.
    """

    backend = "decord"

    def __init__(self, source: Source, index: PyAVReader | None = None):
        if not source.is_local:
            raise ValueError(
                f"{source.name}: decord reads local files only; use PyAV (pip install av, backend='pyav')"
            )
        check_exact("decord", source.name, index.decord_obstacle if index is not None else None)
        self.path = self.name = source.path
        self._decord = import_decoder("decord")
        # Its Python side raises AssertionError, RuntimeError and IndexError, its C++ side the two others.
        self._errors = (
            self._decord.DECORDError,
            self._decord.DECORDLimitReachedError,
            RuntimeError,
            AssertionError,
            IndexError,
        )
        self._may_seek = index is not None
        starts = self._retried(self._read_starts)
        if index is None:
            self._trust(starts, *self._retried(self._read_first))
            return
        if len(starts) != index.num_frames or np.abs(starts - index.times).max() > 2e-3:
            raise ValueError(
                f"{self.path}: decord counts or times the frames differently from PyAV; use backend='pyav'"
            )
        self.adopt(index)

    def _open(self, threads: int) -> Any:
        return self._decord.VideoReader(self.path, num_threads=threads, fault_tol=NO_FAULTS)

    def _read_starts(self, threads: int) -> np.ndarray:
        """When each frame starts, in seconds."""
        reader = self._open(threads)
        return reader.get_frame_timestamp(range(len(reader)))[:, 0].astype(np.float64)

    def _read_first(self, threads: int) -> tuple[tuple[int, ...], float]:
        """The shape of the first frame, and the average frames per second."""
        reader = self._open(threads)
        return reader[0].shape, float(reader.get_avg_fps())

    def _retried(self, step: Callable[[int], Any]) -> Any:
        """The result of `step` with all threads, or with one where that fails."""
        try:
            return step(decoder_threads())
        except self._errors:
            pass
        try:
            return step(1)
        except self._errors as error:
            raise ValueError(
                f"{self.path}: decord cannot read this file; check that it is complete, or use PyAV (pip install av)"
            ) from error

    def _trust(self, starts: np.ndarray, shape: tuple[int, ...], fps: float) -> None:
        """Take over decord's own index, where it is not known to be wrong."""
        with open(self.path, "rb") as file:
            head = file.read(12)
        if head[4:8] not in MP4_BOXES and not head.startswith(MATROSKA_MAGIC):
            raise ValueError(f"{self.path}: decord alone reads only MP4, MOV, MKV and WebM reliably; pip install av")
        if starts[0] < 0:
            raise ValueError(f"{self.path}: an edit list hides frames, which decord does not know; pip install av")
        if shape[2] != 3:
            raise ValueError(f"{self.path}: decord garbles pictures rotated by 90 degrees; pip install av")
        self.height, self.width = shape[:2]
        self.num_frames = len(starts)
        self.times = starts - starts[0]
        self.average_fps, self.duration = rate_and_duration(self.times, fps)
        if has_constant_rate(self.times, self.average_fps):
            # decord keeps times in float32, too coarse for long videos.
            self.times = np.arange(self.num_frames) / self.average_fps

    def read(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        indices = self.check_indices(indices)
        done = 0
        for threads in (decoder_threads(), 1):
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


class TorchcodecReader(VideoReader):
    """Fetches pictures with torchcodec.

    Args:
        source: a `Source`, or a `torchcodec.decoders.VideoDecoder` to take the pictures from.
        index: a `PyAVReader` of the same file; it says how many frames there are and when, and whether torchcodec
            returns those is checked for each. `None` where PyAV is not installed or cannot read the file, and for a
            decoder: then all of the video is decoded once for the frames' times, which torchcodec tells in no other
            way.

    Raises:
        ValueError: torchcodec cannot read the file, or counts its frames differently from `index`.
    """

    backend = "torchcodec"

    def __init__(self, source: Any, index: PyAVReader | None = None):
        if is_torchcodec_decoder(source):
            self.path, self.name, self._decoder = None, "<VideoDecoder>", source
        else:
            self.path, self.name = source.path, source.name
            check_exact("torchcodec", self.name, index.torchcodec_obstacle if index is not None else None)
            self._decoder = self._guarded(
                import_decoder("torchcodec").VideoDecoder, source.location, num_ffmpeg_threads=decoder_threads()
            )
        if index is None:
            self._index_by_decoding()
        elif len(self._decoder) != index.num_frames:
            raise ValueError(f"{self.name}: torchcodec counts the frames differently from PyAV; use backend='pyav'")
        else:
            self.adopt(index)
            self._start = self._guarded(self._decoder.get_frame_at, 0).pts_seconds

    def _guarded(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return step(*args, **kwargs)
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(f"{self.name}: torchcodec cannot read this video ({one_line(error)[:200]})") from error

    def _index_by_decoding(self) -> None:
        first = self._pictures([0])[0][0]
        self.height, self.width = first.shape[:2]
        self.num_frames = len(self._decoder)
        starts = np.concatenate([times for _, times in self._batches(np.arange(self.num_frames))])
        if (np.diff(starts) <= 0).any():
            raise ValueError(f"{self.name}: torchcodec gives no ascending frame times; use PyAV (pip install av)")
        self._start = float(starts[0])
        self.times = starts - starts[0]
        rate = self._decoder.metadata.average_fps_from_header
        self.average_fps, self.duration = rate_and_duration(self.times, rate)

    def _pictures(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """uint8 RGB (n, height, width, 3), and float64 (n,) seconds since the source's own zero."""
        batch = self._guarded(self._decoder.get_frames_at, list(indices))
        pictures = batch.data.cpu().numpy()
        if pictures.shape[3] != 3:  # the decoder of a user may have either order
            pictures = pictures.transpose(0, 2, 3, 1)
        return pictures, batch.pts_seconds.cpu().numpy()

    def _batches(self, indices: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        step = max(1, BATCH_BYTES // (self.height * self.width * 3))
        for begin in range(0, len(indices), step):
            yield self._pictures(indices[begin : begin + step].tolist())

    def read(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        indices = self.check_indices(indices)
        expected = iter(self.times[indices])
        for pictures, times in self._batches(indices):
            for picture, time in zip(pictures, times - self._start, strict=True):
                if abs(time - (wanted := next(expected))) > 1e-4:
                    raise ValueError(
                        f"{self.name}: torchcodec returns the frame at {time:.4f} s for that at {wanted:.4f} s; use "
                        "backend='pyav'"
                    )
                yield np.ascontiguousarray(picture)


READERS = {"pyav": PyAVReader, "torchcodec": TorchcodecReader, "decord": DecordReader}


def check_exact(backend: str, name: str, obstacle: str | None) -> None:
    """ValueError where a decoder is known not to give a file's frames exactly."""
    if obstacle is not None:
        raise ValueError(f"{name}: {backend} would not read this file exactly ({obstacle}); use backend='pyav'")


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
    check_counts(num_frames=num_frames, num_frames_wanted=num_frames_wanted, max_frames=max_frames)
    check_positive(average_fps=average_fps, fps=fps)
    clock = np.arange(num_frames) / average_fps if times is None else np.asarray(times, dtype=np.float64)
    if num_frames_wanted is not None:
        count = num_frames_wanted if max_frames is None else min(num_frames_wanted, max_frames)
        return frames_at(np.linspace(0, clock[-1], count), clock)
    step = average_fps / (1.0 if fps is None else fps)
    if num_frames / step > MOST_SAMPLES:
        raise ValueError(f"fps={fps:g} asks for {num_frames / step:.0f} frames; sample fewer")
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
        if value is not None and not (isinstance(value, numbers.Real) and math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a positive number, not {value!r}")


def check_counts(**values: int | None) -> None:
    """ValueError naming the first of `values` that is neither `None` nor a whole number above 0."""
    check_positive(**values)
    for name, value in values.items():
        if value is not None and value != int(value):
            raise ValueError(f"{name} must be a whole number, not {value!r}")
