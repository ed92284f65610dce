"""Every frame of the test videos shows its own number: what a reader says is checked against what it shows."""

import json
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import video_files
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from etchat_hf import video_decoding_etchat as decoding
from etchat_hf.video_decoding_etchat import open_video, sample_frame_indices

GOLDEN = Path(__file__).parent / "golden" / "frames"
VARIABLE_TIMES = [0, 0.1, 0.2, 0.5, 0.6, 1.4, 1.5, 1.6, 2.6, 2.7, 3.0]

# Name of the file -> how to write it: what decord may be trusted with, and what it may not.
EXACT_IN_DECORD = {
    "h264.mp4": {},
    "h264.mkv": {},
    "no_b_frames.mp4": {"b_frames": 0},
    "ntsc.mp4": {"num_frames": 45, "fps": 30000 / 1001},
    "late_start.mp4": {"start": 2.0},
    "late_start_with_sound.mkv": {"start": 0.5, "audio": True},
    "variable_rate.mp4": {"times": VARIABLE_TIMES},
    "one_frame.mp4": {"num_frames": 1},
    "odd_size.mp4": {"size": (63, 47), "pix_fmt": "yuv444p"},
    "full_range_709.mp4": {"colour": (1, 2)},
    "vp9.webm": {"codec": "libvpx-vp9", "b_frames": 0},
    "interlaced.mp4": {"options": {"flags": "+ilme+ildct", "x264-params": "tff=1"}},
}
WRONG_IN_DECORD = {
    "late_start.ts": {"start": 2.0},
    "open_gop_h265.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none:open-gop=1"}},
    "open_gop_h264.mp4": {"options": {"x264-params": "open-gop=1"}},
    "ten_bit.mp4": {"pix_fmt": "yuv420p10le"},
    "odd_colours.webm": {"size": (63, 47), "codec": "libvpx-vp9", "b_frames": 0},
    "b_frames.avi": {"fps": 25},
    "no_b_frames.avi": {"fps": 25, "b_frames": 0},
    "mpeg2.mpg": {"fps": 25, "codec": "mpeg2video", "options": {"b": "2000000"}},
    "flash.flv": {"fps": 25},
    "animation.gif": {"codec": "gif", "pix_fmt": "rgb8", "b_frames": 0},
}
ALL_FILES = EXACT_IN_DECORD | WRONG_IN_DECORD
EVERY_WAY = [(name, "pyav") for name in ALL_FILES] + [(name, "decord") for name in EXACT_IN_DECORD]


def written(tmp_path, name):
    options = {"num_frames": 40} | ALL_FILES[name]
    times = options.get("times", [k / options.get("fps", 10) for k in range(options["num_frames"])])
    return video_files.write_video(tmp_path / name, **options), np.array(times)


def numbers(reader, indices):
    return [video_files.read_number(picture) for picture in reader.read(indices)]


def without(monkeypatch, *modules):
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)


@pytest.mark.parametrize(("name", "backend"), EVERY_WAY)
def test_every_frame_is_the_right_one_at_the_right_time(tmp_path, name, backend):
    path, times = written(tmp_path, name)
    reader = open_video(path, backend)
    everything = list(range(len(times)))
    assert reader.num_frames == len(times)
    np.testing.assert_allclose(reader.times, times, atol=6e-4)  # Matroska rounds to milliseconds
    assert reader.times[0] == 0
    assert numbers(reader, everything) == everything
    assert all(picture.dtype == np.uint8 for picture in reader.read([0]))
    assert (reader.height, reader.width) == next(reader.read([0])).shape[:2]


@pytest.mark.parametrize(("name", "backend"), EVERY_WAY)
def test_sparse_and_repeated_indices(tmp_path, name, backend):
    path, times = written(tmp_path, name)
    reader = open_video(path, backend)
    last = len(times) - 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no other frame may stand in
        for wanted in ([last], [0, 0, last, last], sorted({0, last // 3, last // 2, last})):
            assert numbers(reader, wanted) == wanted


def test_seeking_in_a_long_video_gives_what_decoding_it_all_gives(tmp_path):
    path = video_files.write_video(tmp_path / "long.mp4", 200, 20, gop=25)
    for backend in ("decord", "pyav"):
        reader = open_video(path, backend)
        for start in range(0, 60, 7):
            wanted = list(range(start, 200, 47))
            assert numbers(reader, wanted) == wanted


def test_pyav_seeks_only_where_frames_are_far_apart(tmp_path, monkeypatch):
    path = video_files.write_video(tmp_path / "long.mp4", 200, 20, gop=25)
    seeks = []
    seek = decoding.PyAVReader._seek
    monkeypatch.setattr(decoding.PyAVReader, "_seek", lambda *args: seeks.append(args[-1]) or seek(*args))
    reader = open_video(path, "pyav")
    list(reader.read(range(0, 200, 10)))
    assert not seeks
    list(reader.read([0, 100, 190]))
    assert len(seeks) == 2


@pytest.mark.parametrize("codec", [{}, {"codec": "libx265", "options": {"x265-params": "log-level=none"}}])
def test_pictures_that_are_not_wanted_and_not_needed_are_passed_over(tmp_path, monkeypatch, codec):
    path = video_files.write_video(tmp_path / "clip.mp4", 60, gop=60, b_frames=3, **codec)
    decoded = []
    decode = decoding.PyAVReader._decode

    def counted(*args, **kwargs):
        for tick, frame in decode(*args, **kwargs):
            decoded.append(tick)
            yield tick, frame

    monkeypatch.setattr(decoding.PyAVReader, "_decode", counted)
    reader = open_video(path, "pyav")
    decoded.clear()
    wanted = [0, 11, 22, 33, 44, 55]
    assert numbers(reader, wanted) == wanted
    assert len(decoded) < 45
    assert numbers(reader, range(60)) == list(range(60))


def test_reading_goes_on_without_seeks_where_they_fail(tmp_path, monkeypatch):
    def fail(*args):
        raise decoding.SeekError

    path = video_files.write_video(tmp_path / "long.mp4", 120, 20, gop=25)
    monkeypatch.setattr(decoding.PyAVReader, "_seek", fail)
    assert numbers(open_video(path, "pyav"), [3, 60, 119]) == [3, 60, 119]


@pytest.mark.parametrize("name", EXACT_IN_DECORD)
def test_decord_and_pyav_agree_to_the_pixel(tmp_path, name):
    options = EXACT_IN_DECORD[name] | {"picture": video_files.noise_picture, "num_frames": 12}
    path = video_files.write_video(tmp_path / name, **options)
    decord, pyav = open_video(path, "decord"), open_video(path)
    assert (decord.backend, pyav.backend) == ("decord", "pyav")
    np.testing.assert_array_equal(decord.times, pyav.times)
    assert (decord.average_fps, decord.duration) == (pyav.average_fps, pyav.duration)
    for one, other in zip(decord.read(range(decord.num_frames)), pyav.read(range(pyav.num_frames)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", WRONG_IN_DECORD)
def test_decord_refuses_files_that_it_gets_wrong(tmp_path, name):
    path, _ = written(tmp_path, name)
    with pytest.raises(ValueError, match=f"{name}: decord would not read this file exactly .*backend='pyav'"):
        open_video(path, "decord")


@pytest.mark.parametrize(("hidden", "duration"), [(0.5, None), (1.0, None), (1.2, None), (1.0, 1.5), (0.3, 2.2)])
def test_pictures_hidden_by_an_edit_list_are_not_shown(tmp_path, hidden, duration):
    plain = video_files.write_video(tmp_path / "plain.mp4", 40, 10)
    reader = open_video(video_files.set_edit_list(plain, tmp_path / "edited.mp4", hidden, duration))
    first = round(hidden * 10)
    last = 40 if duration is None else first + round(duration * 10)
    assert numbers(reader, range(reader.num_frames)) == list(range(first, last))
    np.testing.assert_allclose(reader.times, np.arange(last - first) / 10, atol=1e-9)


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotated_pictures_come_upright(tmp_path, rotation):
    def lying(number, width, height):  # stored so that turning it counterclockwise by `rotation` puts it upright
        upright = video_files.numbered_picture(number, *((height, width) if rotation % 180 else (width, height)))
        return np.ascontiguousarray(np.rot90(upright, -rotation // 90))

    path = video_files.write_video(tmp_path / "phone.mp4", 12, rotation=rotation, picture=lying)
    reader = open_video(path)
    assert (reader.height, reader.width) == ((64, 48) if rotation % 180 else (48, 64))
    assert numbers(reader, range(12)) == list(range(12))


@pytest.mark.parametrize("rotation", [0, 90])
def test_mirrored_pictures_come_unmirrored(tmp_path, rotation):
    path = video_files.write_video(tmp_path / "selfie.mp4", 3, mirrored=True, rotation=rotation)
    plain = next(open_video(video_files.write_video(tmp_path / "plain.mp4", 3)).read([0]))
    mirrored = next(open_video(path).read([0]))
    np.testing.assert_array_equal(mirrored, np.rot90(plain, rotation // 90)[:, ::-1])


def test_raw_streams_have_the_declared_constant_rate(tmp_path):
    reader = open_video(video_files.write_video(tmp_path / "stream.h264", 30))
    np.testing.assert_allclose(reader.times, np.arange(30) / reader.average_fps)
    assert numbers(reader, [0, 17, 29]) == [0, 17, 29]


def test_rate_and_duration(tmp_path):
    constant = open_video(video_files.write_video(tmp_path / "constant.mkv", 45, 30000 / 1001))
    assert constant.average_fps == 30000 / 1001
    assert constant.duration == pytest.approx(45 * 1001 / 30000)
    variable = open_video(video_files.write_video(tmp_path / "variable.mp4", times=VARIABLE_TIMES))
    typical = np.median(np.diff(VARIABLE_TIMES))
    assert variable.duration == pytest.approx(3.0 + typical)
    assert variable.average_fps == pytest.approx(11 / (3.0 + typical))


@pytest.mark.parametrize("name", ["h264.mkv", "late_start.ts"])
def test_the_index_of_a_file_that_breaks_off_ends_there(tmp_path, name):
    path, _ = written(tmp_path, name)
    reader = open_video(video_files.cut_short(path, tmp_path / f"cut_{name}", 0.6))
    assert 5 < reader.num_frames < 40
    wanted = list(range(0, reader.num_frames - 3))
    assert numbers(reader, wanted) == wanted


def test_undecodable_frames_are_replaced_with_a_warning(tmp_path):
    plain = video_files.write_video(tmp_path / "plain.mp4", 60, container_options={"movflags": "faststart"})
    broken = video_files.overwrite_bytes(plain, tmp_path / "broken.mp4", 0.7, 1.0)
    reader = open_video(broken)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pictures = list(reader.read(range(60)))
    assert len(pictures) == 60
    assert [video_files.read_number(picture) for picture in pictures[:10]] == list(range(10))
    assert sum("broken.mp4: the frame at" in str(warning.message) for warning in caught) == 1
    with pytest.raises(ValueError, match="broken.mp4: decord cannot decode frame"):
        list(open_video(broken, "decord").read(range(60)))


def test_an_error_in_decord_is_retried_with_one_thread(tmp_path, monkeypatch):
    reader = open_video(video_files.write_video(tmp_path / "clip.mp4", 20), "decord")
    read, threads = decoding.DecordReader._read, []

    def fail_with_many_threads(self, indices, num_threads):
        threads.append(num_threads)
        yield from read(self, indices[:1], num_threads)
        if num_threads != 1:
            raise self._decord.DECORDError("broken")
        yield from read(self, indices[1:], num_threads)

    monkeypatch.setattr(decoding.DecordReader, "_read", fail_with_many_threads)
    assert numbers(reader, [2, 5, 7]) == [2, 5, 7]
    assert threads == [0, 1]


@pytest.mark.parametrize("seed", range(40))
def test_whatever_is_broken_in_a_file_it_is_read_or_refused(tmp_path, seed):
    rng = random.Random(seed)
    suffix = rng.choice((".mp4", ".mkv", ".avi"))
    content = bytearray(video_files.write_video(tmp_path / f"good{suffix}", 20).read_bytes())
    for _ in range(rng.choice((2, 20))):  # mostly in the headers, which are at one end or the other
        place = rng.randrange(1500) * rng.choice((1, -1))
        content[place : place + 4] = rng.randbytes(4)
    (broken := tmp_path / f"broken{suffix}").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            list(open_video(broken).read([0]))
        except ValueError as error:
            assert f"broken{suffix}" in str(error)


class ThreadsOfADecoder(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return decoding.decoder_threads()


def test_a_loaders_workers_decode_with_one_thread_each():
    assert decoding.decoder_threads() == 0
    loader = torch.utils.data.DataLoader(ThreadsOfADecoder(), batch_size=None, num_workers=1)
    assert list(loader) == [1]


def broken_file(tmp_path, kind):
    path = tmp_path / f"{kind}.mp4"
    if kind == "directory":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("this is not a video\n" * 100)
    elif kind == "sound":
        video_files.write_audio(path)
    elif kind == "truncated":
        video_files.cut_short(video_files.write_video(tmp_path / "whole.mp4"), path, 0.5)
    elif kind == "rubbish":
        whole = video_files.write_video(tmp_path / "whole.mp4", container_options={"movflags": "faststart"})
        start = whole.read_bytes().index(b"mdat") + 4
        video_files.overwrite_bytes(whole, path, start / whole.stat().st_size, 1.0)
    return path


@pytest.mark.parametrize("backend", [None, "decord"])
@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("missing", FileNotFoundError, "no such file"),
        ("directory", ValueError, "directory"),
        ("empty", ValueError, "empty"),
        ("text", ValueError, "not a readable video"),
        ("sound", ValueError, "no video"),
        ("truncated", ValueError, "not a readable video"),
        ("rubbish", ValueError, "no frame of this video can be decoded"),
    ],
)
def test_unreadable_files_are_named(tmp_path, kind, error, message, backend):
    path = broken_file(tmp_path, kind)
    with pytest.raises(error, match=message) as caught:
        open_video(path, backend)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_backend(tmp_path):
    with pytest.raises(ValueError, match="'opencv'; choose one of pyav, torchcodec, decord"):
        open_video(tmp_path / "any.mp4", "opencv")


def test_indices_are_checked(tmp_path):
    reader = open_video(video_files.write_video(tmp_path / "clip.mp4", 5))
    with pytest.raises(IndexError, match=r"0\.\.4"):
        list(reader.read([5]))
    with pytest.raises(ValueError, match="ascend"):
        list(reader.read([3, 1]))


def test_missing_decoders(tmp_path, monkeypatch):
    path = video_files.write_video(tmp_path / "clip.mp4", 20)
    with monkeypatch.context() as patch:
        without(patch, "decord")
        assert numbers(open_video(path), [0, 19]) == [0, 19]
        with pytest.raises(ImportError, match="pip install decord"):
            open_video(path, "decord")
    without(monkeypatch, *decoding.MODULES.values())
    with pytest.raises(ImportError, match="pip install av or torchcodec or decord"):
        open_video(path)


def test_another_decoder_serves_where_one_cannot_read_a_file(tmp_path, monkeypatch):
    def refuse(self, source):
        raise ValueError("no such codec here")

    path = video_files.write_video(tmp_path / "clip.mp4", 20)
    without(monkeypatch, "torchcodec.decoders")
    monkeypatch.setattr(decoding.PyAVReader, "__init__", refuse)
    reader = open_video(path)
    assert (reader.backend, numbers(reader, [0, 19])) == ("decord", [0, 19])
    for backend in ("pyav", "decord"):  # PyAV says which frames there are, so its refusal counts
        with pytest.raises(ValueError, match="no such codec here"):
            open_video(path, backend)
    with pytest.raises(ValueError, match="no such codec here"):
        open_video(video_files.cut_short(path, tmp_path / "cut.mp4", 0.5))


def test_only_what_is_needed_is_imported(tmp_path, monkeypatch):
    path = video_files.write_video(tmp_path / "clip.mp4", 5)
    asked = []
    import_decoder = decoding.import_decoder
    monkeypatch.setattr(decoding, "import_decoder", lambda name: asked.append(name) or import_decoder(name))
    list(open_video(path).read([0]))
    assert set(asked) == {"pyav"}


def test_a_change_of_size_is_scaled_back(tmp_path):
    small, large = (
        video_files.write_video(tmp_path / f"{width}.h264", 10, size=(width, height))
        for width, height in ((64, 48), (128, 96))
    )
    path = tmp_path / "changing.h264"
    path.write_bytes(small.read_bytes() + large.read_bytes())
    reader = open_video(path)
    pictures = list(reader.read(range(20)))
    assert {picture.shape for picture in pictures} == {(48, 64, 3)}
    assert [video_files.read_number(picture) for picture in pictures] == [*range(10), *range(10)]


@pytest.mark.parametrize("name", [*EXACT_IN_DECORD, "open_gop_h265.mp4", "open_gop_h264.mp4"])
def test_decord_alone_gives_the_same_frames_and_times(tmp_path, name, monkeypatch):
    path, times = written(tmp_path, name)
    without(monkeypatch, "av", "torchcodec.decoders")
    reader = open_video(path)
    np.testing.assert_allclose(reader.times, times, atol=2e-3)
    wanted = sorted({0, len(times) // 3, len(times) // 2, len(times) - 1})
    assert numbers(reader, wanted) == wanted


def test_decord_alone_refuses_what_it_would_get_wrong(tmp_path, monkeypatch):
    plain = video_files.write_video(tmp_path / "plain.mp4", 40)
    stream = video_files.write_video(tmp_path / "stream.ts", 20)
    rotated = video_files.write_video(tmp_path / "rotated.mp4", 20, rotation=90)
    edited = video_files.set_edit_list(plain, tmp_path / "edited.mp4", 1.0)
    without(monkeypatch, "av", "torchcodec.decoders")
    for path in (stream, rotated, edited):
        with pytest.raises(ValueError, match=f"{path.name}.*pip install av"):
            open_video(path)


def test_decoders_are_no_hard_requirement_of_remote_code():
    assert set(get_imports(decoding.__file__)).isdisjoint({"av", "decord", "etchat_hf", "torchvision"})
    assert get_relative_imports(decoding.__file__) == []


@pytest.mark.parametrize("case", json.loads((GOLDEN / "frames.json").read_text())["sampling"])
@pytest.mark.parametrize("with_times", [False, True])
def test_sampling_golden(case, with_times):
    times = np.arange(case["num_frames"]) / case["avg_fps"]
    jittered = times + np.random.default_rng(0).uniform(-0.4, 0.4, len(times)) / case["avg_fps"]
    jittered[0] = 0
    indices = sample_frame_indices(
        case["num_frames"], case["avg_fps"], case["fps"], times=jittered if with_times else None
    )
    assert indices.dtype == np.int64
    assert indices.tolist() == case["indices"]
    assert np.round(times[indices], 1).tolist() == case["times"]


def test_variable_rate_is_sampled_by_the_clock():
    # 10 fps for a second, one picture that stays for 3 s, 10 fps again.
    times = np.concatenate([np.arange(0, 1, 0.1), [1.0], np.arange(4, 5, 0.1)])
    indices = sample_frame_indices(len(times), len(times) / 5, fps=1, times=times)
    assert times[indices].tolist() == [0.0, 1.0, 1.0, 1.0, 4.0]
    # A frame that comes up a little late is still that second's.
    indices = sample_frame_indices(len(times), len(times) / 5, fps=1, times=times + 0.04 * (times > 0))
    assert times[indices].tolist() == [0.0, 1.0, 1.0, 1.0, 4.0]


def test_sampling_by_number():
    assert sample_frame_indices(100, 10, num_frames_wanted=1).tolist() == [0]
    assert sample_frame_indices(100, 10, num_frames_wanted=4).tolist() == [0, 33, 66, 99]
    assert sample_frame_indices(3, 10, num_frames_wanted=5).tolist() == [0, 1, 1, 2, 2]
    assert sample_frame_indices(100, 10, num_frames_wanted=100).tolist() == list(range(100))
    times = np.array([0, 0.1, 0.2, 0.3, 9.0, 10.0])
    assert sample_frame_indices(6, 0.6, num_frames_wanted=3, times=times).tolist() == [0, 3, 5]


def test_sampling_within_a_budget():
    assert sample_frame_indices(300, 30, fps=1, max_frames=10).tolist() == list(range(0, 300, 30))
    assert sample_frame_indices(300, 30, fps=1, max_frames=4).tolist() == [0, 75, 150, 225]
    assert sample_frame_indices(300, 30, fps=1, max_frames=1).tolist() == [0]
    assert sample_frame_indices(300, 30, num_frames_wanted=50, max_frames=2).tolist() == [0, 299]
    times = np.array([0, 0.1, 0.2, 5.0, 5.1, 9.9])
    assert sample_frame_indices(6, 0.6, fps=1, max_frames=2, times=times).tolist() == [0, 3]


def test_a_rate_above_the_source_repeats_frames():
    assert sample_frame_indices(4, 1, fps=2).tolist() == np.round([0, 0.5, 1, 1.5, 2, 2.5, 3, 3]).astype(int).tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fps": 0}, "fps must be a positive number, not 0"),
        ({"fps": -1.0}, "fps must be a positive number, not -1.0"),
        ({"fps": float("nan")}, "fps must be a positive number, not nan"),
        ({"num_frames_wanted": 0}, "num_frames_wanted must be a positive number, not 0"),
        ({"max_frames": -3}, "max_frames must be a positive number, not -3"),
        ({"num_frames": 0}, "num_frames must be a positive number, not 0"),
        ({"average_fps": float("inf")}, "average_fps must be a positive number, not inf"),
        ({"fps": 1, "num_frames_wanted": 2}, "exclude each other"),
    ],
)
def test_impossible_sampling(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_frame_indices(**{"num_frames": 10, "average_fps": 10.0} | arguments)
