"""Whatever the file: every picture and its time are those that FFmpeg's own command line gives, bit by bit.

Where torchcodec is installed, it has to give the same. If it finds no FFmpeg libraries, it is lent PyAV's.
"""

import importlib.util
import os
import re
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import video_files

from etchat_hf.video_decoding_etchat import Source, TorchcodecReader, import_decoder, open_video, sample_frame_indices

RATES = {"1": 1, "3": 3, "23.976": 24000 / 1001, "25": 25, "29.97": 30000 / 1001, "59.94": 60000 / 1001, "60": 60}
VARIABLE_TIMES = [0, 0.1, 0.2, 0.5, 0.6, 1.4, 1.5, 1.6, 2.6, 2.7, 3.0, 3.04, 3.05, 7.0]
CODECS = {
    "h264": {"codec": "libx264"},
    "h265": {"codec": "libx265", "options": {"x265-params": "log-level=none"}},
    "vp9": {"codec": "libvpx-vp9", "b_frames": 0},
    "av1": {"codec": "libsvtav1", "b_frames": 0, "options": {"preset": "11"}},
    "mpeg4": {"codec": "mpeg4"},
    "gif": {"codec": "gif", "pix_fmt": "rgb8", "b_frames": 0},
}
# All that PyAV's encoders and muxers write; H.265 in AVI, VP9 and AV1 in MOV they do not.
CONTAINERS = {
    "h264": ("mp4", "mov", "mkv", "avi"),
    "h265": ("mp4", "mov", "mkv"),
    "vp9": ("mp4", "mkv", "webm", "avi"),
    "av1": ("mp4", "mkv", "webm", "avi"),
    "mpeg4": ("mp4", "mov", "mkv", "avi"),
    "gif": ("gif", "mov"),
}
OPEN_GOP = {"x265-params": "log-level=none:open-gop=1"}
SPECIAL = {
    "variable.mp4": {"times": VARIABLE_TIMES},
    "variable.mkv": {"times": VARIABLE_TIMES},
    "variable.webm": {"times": VARIABLE_TIMES, **CODECS["vp9"]},
    "variable_mpeg4.mov": {"times": VARIABLE_TIMES, **CODECS["mpeg4"]},
    "late.mp4": {"start": 2.0},
    "late.mov": {"start": 0.5},
    "late.mkv": {"start": 123.4},
    "late.ts": {"start": 2.0},
    "late_with_sound.mp4": {"start": 0.75, "audio": True},
    "many_b_frames.mp4": {"options": {"x264-params": "bframes=8:b-pyramid=normal:b-adapt=0"}, "b_frames": 8},
    "open_gop_h265.mp4": {"codec": "libx265", "options": OPEN_GOP},
    "rotated.mp4": {"rotation": 90},
    "upside_down.mov": {"rotation": 180},
    "mirrored.mp4": {"rotation": 270, "mirrored": True},
    "odd.webm": {"size": (63, 47), **CODECS["vp9"]},
    "odd.mp4": {"size": (63, 47), "pix_fmt": "yuv444p"},
    "interlaced.mp4": {"options": {"flags": "+ilme+ildct", "x264-params": "tff=1"}},
    "interlaced.avi": {"codec": "mpeg4", "fps": 25, "options": {"flags": "+ilme+ildct"}},
    "ten_bit_h264.mp4": {"pix_fmt": "yuv420p10le"},
    "ten_bit_h265.mkv": {"pix_fmt": "yuv420p10le", **CODECS["h265"]},
    "ten_bit_av1.mp4": {"pix_fmt": "yuv420p10le", **CODECS["av1"]},
    "ten_bit_422.mov": {"pix_fmt": "yuv422p10le"},
    "single.mp4": {"num_frames": 1},
    "single.mkv": {"num_frames": 1},
    "single.gif": {"num_frames": 1, **CODECS["gif"]},
    "no_duration.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov+default_base_moof"}},
    "no_duration.mkv": {"container_options": {"live": "1"}},
    "rate_above_a_thousand.mp4": {"fps": 1200},
}
FILES = (
    {f"{codec}.{ext}": CODECS[codec] for codec, exts in CONTAINERS.items() for ext in exts}
    | {f"{name}_fps.mp4": {"fps": fps} for name, fps in RATES.items()}
    | {f"{name}_fps.mkv": {"fps": fps} for name, fps in RATES.items() if name not in ("3", "25")}
    | {f"{fps}_fps.avi": {"fps": fps} for fps in (1, 3, 25, 60)}
    | SPECIAL
)
# What torchcodec would get wrong, and how that is noticed.
WRONG_FRAME = "torchcodec returns the frame at .* for that at"
REFUSED_BY_TORCHCODEC = {
    "late.ts": WRONG_FRAME,
    "mirrored.mp4": "does not mirror",
    **{f"{fps}_fps.avi": WRONG_FRAME for fps in (1, 3, 25, 60)},
    "h264.avi": WRONG_FRAME,
    "mpeg4.avi": WRONG_FRAME,
    "interlaced.avi": WRONG_FRAME,
}
needs_torchcodec = pytest.mark.skipif(import_decoder("torchcodec") is None, reason="torchcodec does not load")


def written(tmp_path, name, **changes):
    rate = 25 if name.endswith(".avi") else 10
    return video_files.write_video(tmp_path / name, **({"num_frames": 24, "fps": rate} | FILES[name] | changes))


def upright(reader, indices):
    """The numbers that the pictures show; a rotated or mirrored file's pictures were stored upright."""
    return [video_files.read_number(picture) for picture in reader.read(indices)]


def check(path, fps=2.7):
    """Times and pictures are FFmpeg's; returns the reader."""
    times, pictures = video_files.ffmpeg_shows(path)
    reader = open_video(path)
    np.testing.assert_allclose(reader.times, times, rtol=0, atol=1e-9)
    for wanted in (range(len(times)), sample_frame_indices(len(times), reader.average_fps, fps, times=reader.times)):
        for index, picture in zip(wanted, reader.read(wanted), strict=True):
            np.testing.assert_array_equal(picture, pictures[index], err_msg=f"picture {index}")
    return reader


@pytest.mark.parametrize("name", FILES)
def test_pictures_and_times_are_ffmpegs(tmp_path, name):
    reader = check(written(tmp_path, name))
    expected = FILES[name].get("times", np.arange(reader.num_frames) / FILES[name].get("fps", reader.average_fps))
    np.testing.assert_allclose(reader.times, expected, atol=1.1e-3)  # Matroska rounds to milliseconds
    if "rotation" not in FILES[name]:
        assert upright(reader, range(reader.num_frames)) == list(range(reader.num_frames))


@pytest.mark.parametrize("fps", RATES.values(), ids=RATES)
def test_a_rate_survives_exactly(tmp_path, fps):
    rate = Fraction(fps).limit_denominator(1001)
    path = video_files.write_video(tmp_path / "rate.mp4", 24, fps, ticks=rate.numerator)
    reader = open_video(path)
    assert reader.average_fps == fps
    assert reader.duration == 24 / fps
    indices = sample_frame_indices(reader.num_frames, reader.average_fps, fps=0.9 * fps, times=reader.times)
    np.testing.assert_allclose(reader.times[indices], indices / fps, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("hidden", "duration"), [(0.5, None), (1.2, None), (1.0, 1.5), (0.3, 2.2)])
@pytest.mark.parametrize("codec", ["h264", "h265"])
def test_edit_lists(tmp_path, codec, hidden, duration):
    plain = video_files.write_video(tmp_path / "plain.mp4", 40, 10, **CODECS[codec])
    reader = check(video_files.set_edit_list(plain, tmp_path / "edited.mp4", hidden, duration))
    first = round(hidden * 10)
    last = 40 if duration is None else first + round(duration * 10)
    assert upright(reader, range(reader.num_frames)) == list(range(first, last))


@pytest.mark.parametrize("ticks", [0, 1, 2**31])
def test_a_wrong_duration_in_an_mp4(tmp_path, ticks):
    plain = video_files.write_video(tmp_path / "plain.mp4", 24, 10)
    reader = check(video_files.set_mp4_durations(plain, tmp_path / "wrong.mp4", ticks))
    assert (reader.num_frames, reader.duration, reader.average_fps) == (24, 2.4, 10)


@pytest.mark.parametrize("milliseconds", [0.0, 50.0, 1e9])
@pytest.mark.parametrize("name", ["h264.mkv", "vp9.webm"])
def test_a_wrong_duration_in_matroska(tmp_path, name, milliseconds):
    plain = written(tmp_path, name)
    reader = check(video_files.set_matroska_duration(plain, tmp_path / f"wrong_{name}", milliseconds))
    assert (reader.num_frames, reader.duration, reader.average_fps) == (24, 2.4, 10)


def tiny(number, width, height):
    return video_files.numbered_picture(number % 256, width, height)


@pytest.mark.parametrize("name", ["day.mp4", "day.mkv"])
def test_eight_hours(tmp_path, name):
    hours, fps = 8, 0.5
    count = round(hours * 3600 * fps)
    path = video_files.write_video(
        tmp_path / name, count, fps, gop=120, picture=tiny, options={"preset": "ultrafast", "threads": "1"}
    )
    begin = time.process_time()
    reader = open_video(path)
    assert time.process_time() - begin < 2
    assert reader.duration == hours * 3600
    np.testing.assert_allclose(reader.times, np.arange(count) / fps, rtol=0, atol=1e-9)
    wanted = sample_frame_indices(count, fps, fps=1 / 900, times=reader.times)
    assert np.array_equal(reader.times[wanted], np.arange(0, hours * 3600, 900))
    assert upright(reader, wanted) == [number % 256 for number in wanted]


def test_the_index_of_a_sparse_file_reads_the_end_of_it(tmp_path):
    """Eight hours with a picture every half hour."""
    times = [1800.0 * k for k in range(16)] + [28799.96]
    for name in ("sparse.mp4", "sparse.mkv"):
        reader = check(video_files.write_video(tmp_path / name, times=times), fps=1 / 1800)
        assert reader.times.tolist() == pytest.approx(times)


@needs_torchcodec
@pytest.mark.parametrize("name", [name for name in FILES if name not in REFUSED_BY_TORCHCODEC])
def test_torchcodec_gives_the_same(tmp_path, name):
    path = written(tmp_path, name, picture=video_files.noise_picture)
    pyav, torchcodec = open_video(path, "pyav"), open_video(path, "torchcodec")
    assert torchcodec.backend == "torchcodec"
    np.testing.assert_array_equal(torchcodec.times, pyav.times)
    everything = range(pyav.num_frames)
    for one, other in zip(torchcodec.read(everything), pyav.read(everything), strict=True):
        np.testing.assert_array_equal(one, other)
    alone = TorchcodecReader(Source(path))
    np.testing.assert_allclose(alone.times, pyav.times, rtol=0, atol=1e-6)
    assert (alone.height, alone.width) == (pyav.height, pyav.width)
    if pyav.num_frames > 1:
        assert (alone.average_fps, alone.duration) == pytest.approx((pyav.average_fps, pyav.duration), rel=1e-4)


@needs_torchcodec
@pytest.mark.parametrize("name", REFUSED_BY_TORCHCODEC)
def test_torchcodec_refuses_what_it_gets_wrong(tmp_path, name):
    path = written(tmp_path, name)
    with pytest.raises(ValueError, match=REFUSED_BY_TORCHCODEC[name]):
        list(open_video(path, "torchcodec").read([5]))


@needs_torchcodec
def test_torchcodec_serves_where_pyav_is_missing(tmp_path, monkeypatch):
    path = written(tmp_path, "h264.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    reader = open_video(path)
    assert reader.backend == "torchcodec"
    assert upright(reader, [0, 7, 7, 23]) == [0, 7, 7, 23]
    np.testing.assert_allclose(reader.times, np.arange(24) / 10, atol=1e-9)


@needs_torchcodec
def test_torchcodecs_times_are_checked_at_every_picture(tmp_path):
    reader = open_video(written(tmp_path, "h264.mp4"), "torchcodec")
    reader.times = reader.times + 0.05 * (np.arange(24) > 10)
    with pytest.raises(ValueError, match="h264.mp4: torchcodec returns the frame at 1.1000 s for that at 1.1500 s"):
        list(reader.read(range(24)))


@needs_torchcodec
@pytest.mark.parametrize("order", ["NCHW", "NHWC"])
def test_torchcodec_decoder_objects(tmp_path, order):
    path = written(tmp_path, "late.mp4")
    decoder = import_decoder("torchcodec").VideoDecoder(str(path), dimension_order=order)
    reader = open_video(decoder)
    np.testing.assert_allclose(reader.times, np.arange(24) / 10, atol=1e-9)
    assert upright(reader, range(24)) == list(range(24))


@pytest.mark.skipif(importlib.util.find_spec("torchcodec") is None, reason="torchcodec is not installed")
@pytest.mark.skipif(import_decoder("torchcodec") is not None, reason="torchcodec loads, so its tests have run")
def test_torchcodec_with_pyavs_libraries(tmp_path):
    bundled = Path(av.__file__).parents[1] / "av.libs"
    if not bundled.is_dir():
        pytest.skip("this build of PyAV has no libraries of its own")
    for library in bundled.iterdir():
        if found := re.fullmatch(r"(lib(?:av|sw)\w+)-\w+(\.so\.\d+)\..*", library.name):
            (tmp_path / "".join(found.groups())).symlink_to(library)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-k", "torchcodec", "--basetemp", tmp_path / "tests"]
        + [Path(__file__), Path(__file__).with_name("test_ways_in.py")],
        env=os.environ | {"LD_LIBRARY_PATH": f"{tmp_path}:{bundled}"},
        capture_output=True,
        text=True,
    )
    if "torchcodec does not load" in result.stdout or result.returncode == 5:
        pytest.skip("torchcodec does not load with PyAV's libraries either")
    assert result.returncode == 0, result.stdout[-3000:]
    assert "passed" in result.stdout or " [100%]" in result.stdout
