"""Real video files for the tests, in which every picture shows its own number.

A numbered picture has a red top left quarter, a blue top right quarter, and the number as eight vertical bars (most
significant bit first, white = 1) in its lower half, so that a test reads off a decoded frame which one it is, and
whether it is upright, without trusting any decoder's bookkeeping.
"""

import functools
import re
import struct
import subprocess
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np

BITS = 8
TICKS = 90_000  # time base of the streams, in ticks per second


def numbered_picture(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    """uint8 RGB (height, width, 3) showing `number` (0 to 255)."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2, 0] = 255
    picture[: height // 2, width // 2 :, 2] = 255
    bits = [(number >> (BITS - 1 - bit)) & 1 for bit in range(BITS)]
    picture[height // 2 :] = np.repeat(bits, -(-width // BITS))[:width, None] * np.uint8(255)
    return picture


def noise_picture(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    """uint8 RGB (height, width, 3) of coloured 4 x 4 blocks, different for every number: hard on colour conversion."""
    blocks = np.random.default_rng(number).integers(0, 256, (-(-height // 4), -(-width // 4), 3), np.uint8)
    return blocks.repeat(4, 0).repeat(4, 1)[:height, :width]


def read_number(picture: np.ndarray) -> int:
    """The number that an upright `numbered_picture` shows; AssertionError if it is not upright."""
    height, width = picture.shape[:2]
    top_left, top_right = picture[: height // 2, : width // 2], picture[: height // 2, width // 2 :]
    assert top_left[..., 0].mean() > 128 > top_left[..., 2].mean(), "the top left is not red: not upright"
    assert top_right[..., 2].mean() > 128 > top_right[..., 0].mean(), "the top right is not blue: not upright"
    bars = np.array_split(picture[height // 2 + 2 :].mean((0, 2)), BITS)
    return int("".join("1" if bar.mean() > 128 else "0" for bar in bars), 2)


def write_video(
    path: str | Path,
    num_frames: int = 20,
    fps: float = 10,
    *,
    times: Sequence[float] | None = None,
    start: float = 0.0,
    ticks: int = TICKS,
    size: tuple[int, int] = (64, 48),
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    gop: int = 8,
    b_frames: int = 2,
    rotation: int = 0,
    mirrored: bool = False,
    audio: bool = False,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    picture: Callable[..., np.ndarray] = numbered_picture,
    colour: tuple[int, int] | None = None,
) -> Path:
    """Write a video whose k-th frame in display order shows the number k.

    `times` (seconds, one per frame) makes a variable-rate file; `start` (seconds) shifts every frame, so that the
    first does not start at 0; `ticks` (per second) is the time base where the format leaves a choice; `size` is
    (width, height) as stored, and `rotation` (degrees, counterclockwise) goes to the display matrix; `colour` is
    (colour space, colour range) as in libav.
    """
    if times is None:
        times = [k / fps for k in range(num_frames)]
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        # AVI and MPEG-2 know constant rates only, MPEG-4 no finer ticks.
        constant = codec == "mpeg2video" or str(path).endswith(".avi")
        ticks = round(fps) if constant else 30_000 if codec == "mpeg4" else ticks
        stream.time_base = stream.codec_context.time_base = Fraction(1, ticks)
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = b_frames
        if rotation or mirrored:
            stream.set_display_rotation(rotation, hflip=mirrored)
        if colour is not None:
            stream.codec_context.colorspace, stream.codec_context.color_range = colour
        if audio:
            sound = container.add_stream("aac", rate=16_000, layout="mono")
            mux_silence(container, sound, seconds=start + times[-1])
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24")
            if colour is not None:
                frame = frame.reformat(format=pix_fmt, dst_colorspace=colour[0], dst_color_range=colour[1])
            frame.pts = round((start + time) * ticks)
            frame.time_base = Fraction(1, ticks)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return Path(path)


@functools.cache
def ffmpeg() -> str:
    """Path of an FFmpeg program, which shares no code with the decoders under test but the libraries' source."""
    return imageio_ffmpeg.get_ffmpeg_exe()


def ffmpeg_shows(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """What FFmpeg's command line says and shows, picture by picture.

    Returns:
        Presentation times in seconds since the first picture, float64 (n,), and pictures, uint8 RGB (n, h, w, 3).
    """
    command = [ffmpeg(), "-nostdin", "-i", str(path), "-map", "0:v:0", "-fps_mode", "passthrough"]
    command += ["-vf", "showinfo=checksum=0", "-pix_fmt", "rgb24", "-f", "rawvideo", "-"]
    result = subprocess.run(command, capture_output=True, check=True)
    lines = [line for line in result.stderr.decode(errors="replace").splitlines() if "showinfo" in line]
    base = next(Fraction(found[1]) for line in lines if (found := re.search(r"config in time_base: (\S+?),", line)))
    shown = [found for line in lines if (found := re.search(r"\bpts: *(-?\d+) .* s:(\d+)x(\d+) ", line))]
    ticks = np.array([int(found[1]) for found in shown])
    width, height = int(shown[0][2]), int(shown[0][3])
    pictures = np.frombuffer(result.stdout, np.uint8).reshape(-1, height, width, 3)
    return (ticks - ticks[0]) * base.numerator / base.denominator, pictures


def mux_silence(container: av.container.OutputContainer, stream: av.AudioStream, seconds: float) -> None:
    for block in range(max(1, round(seconds * stream.rate / 1024))):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = stream.rate
        frame.pts = block * 1024
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def write_audio(path: str | Path, seconds: float = 1.0) -> Path:
    """A file with sound and no picture."""
    with av.open(str(path), "w") as container:
        mux_silence(container, container.add_stream("aac", rate=16_000, layout="mono"), seconds)
    return Path(path)


def cut_short(source: Path, path: Path, keep: float) -> Path:
    """The first `keep` (0 to 1) of a file's bytes, as after a download that broke off."""
    data = source.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    return path


def overwrite_bytes(source: Path, path: Path, start: float, stop: float) -> Path:
    """A copy in which the bytes from `start` to `stop` (fractions of the file) are rubbish, headers left alone."""
    data = bytearray(source.read_bytes())
    first, last = int(len(data) * start), int(len(data) * stop)
    data[first:last] = np.random.default_rng(0).bytes(last - first)
    path.write_bytes(data)
    return path


def set_edit_list(source: Path, path: Path, media_time: float, duration: float | None = None) -> Path:
    """A copy of an MP4 whose edit list hides the first `media_time` seconds, and what is `duration` seconds later."""
    data = bytearray(source.read_bytes())
    (media_timescale,) = struct.unpack_from(">I", data, data.index(b"mdhd") + 16)
    (movie_timescale,) = struct.unpack_from(">I", data, data.index(b"mvhd") + 16)
    edit_list = data.index(b"elst")
    (entries,) = struct.unpack_from(">I", data, edit_list + 8)
    assert data[edit_list + 4] == 0 and entries == 1
    if duration is not None:
        struct.pack_into(">I", data, edit_list + 12, round(duration * movie_timescale))
    (old,) = struct.unpack_from(">i", data, edit_list + 16)
    struct.pack_into(">i", data, edit_list + 16, old + round(media_time * media_timescale))
    path.write_bytes(data)
    return path


def set_mp4_durations(source: Path, path: Path, value: int) -> Path:
    """A copy of an MP4 whose movie, track and media headers claim a duration of `value` of their ticks."""
    data = bytearray(source.read_bytes())
    for box, offset in ((b"mvhd", 20), (b"tkhd", 24), (b"mdhd", 20)):
        struct.pack_into(">I", data, data.index(box) + offset, value)
    path.write_bytes(data)
    return path


def set_matroska_duration(source: Path, path: Path, milliseconds: float) -> Path:
    """A copy of a Matroska or WebM file that claims another duration."""
    data = bytearray(source.read_bytes())
    element = data.index(b"\x44\x89\x88")  # its name, and the length of a float64
    struct.pack_into(">d", data, element + 3, milliseconds)
    path.write_bytes(data)
    return path
