"""The processor against the original's pixels, against real files, and against every kind of clip."""

import json
import sys
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import video_files
from safetensors.torch import load_file
from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_imports, get_relative_imports
from transformers.video_utils import VideoMetadata

from etchat_hf import video_processing_etchat as processing
from etchat_hf.inference import ask, load
from etchat_hf.video_decoding_etchat import open_video
from etchat_hf.video_processing_etchat import ETChatVideoProcessor, pad_to_square

GOLDEN = Path(__file__).parent / "golden" / "frames"
CASES = json.loads((GOLDEN / "frames.json").read_text())["cases"]


@pytest.fixture
def clip(tmp_path):
    """A 4 s clip at 10 fps whose k-th frame shows k."""
    return video_files.write_video(tmp_path / "clip.mp4", 40, 10)


@pytest.fixture
def processor():
    return ETChatVideoProcessor(size=48)


def shown_numbers(pixel_values, processor):
    """The numbers on frames that were 48 x 64 and are now a centre crop of 48 x 48: the inner six of eight bits."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    pictures = ((pixel_values * std + mean) * 255).permute(0, 2, 3, 1).numpy()
    return [
        int("".join("1" if bar.mean() > 128 else "0" for bar in np.array_split(picture[26:].mean((0, 2)), 6)), 2)
        for picture in pictures
    ]


def inner_bits(numbers):
    return [number >> 1 & 0b111111 for number in numbers]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['width']}x{case['height']}")
@pytest.mark.parametrize("layout", ["numpy", "torch", "channels_first", "pil", "arrays"])
def test_pixels_golden(case, layout):
    golden = load_file(GOLDEN / "frames.safetensors")
    frames, expected = golden[f"frames_{case['i']}"], golden[f"pixel_values_{case['i']}"]
    clip = {
        "numpy": frames.numpy(),
        "torch": frames,
        "channels_first": frames.permute(0, 3, 1, 2),
        "pil": [PIL.Image.fromarray(frame.numpy()) for frame in frames],
        "arrays": list(frames),
    }[layout]
    processor = ETChatVideoProcessor(size=case["size"])
    batch = processor([clip], video_metadata=[{"frame_times": range(len(frames))}])
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["pixel_values"].is_contiguous()
    torch.testing.assert_close(batch["pixel_values"].to(expected.dtype), expected, rtol=0, atol=0)


@pytest.mark.parametrize("i", range(3))
def test_padding_golden(i):
    golden = load_file(GOLDEN / "pad_square.safetensors")
    image, padded = golden[f"image_{i}"].numpy(), golden[f"padded_{i}"].numpy()
    np.testing.assert_array_equal(pad_to_square(image, processing.CLIP_MEAN), padded)
    with_padding = ETChatVideoProcessor(size=28, pad_to_square=True)([image])["pixel_values"]
    of_padded = ETChatVideoProcessor(size=28)([padded])["pixel_values"]
    torch.testing.assert_close(with_padding, of_padded, rtol=0, atol=0)


@pytest.mark.parametrize("decoder", [None, "decord", "pyav"])
def test_a_video_file_is_sampled_once_a_second(clip, decoder):
    processor = ETChatVideoProcessor(size=48, decoder=decoder)
    batch = processor(clip)
    assert batch["pixel_values"].shape == (4, 3, 48, 48)
    assert batch["frame_indices"] == [[0, 10, 20, 30]]
    assert batch["frame_times"] == [[0.0, 1.0, 2.0, 3.0]]
    assert shown_numbers(batch["pixel_values"], processor) == inner_bits([0, 10, 20, 30])
    assert batch["video_metadata"] == [
        {
            "path": str(clip),
            "decoder": decoder or "pyav",
            "num_frames": 40,
            "average_fps": 10.0,
            "duration": 4.0,
            "sampled_fps": 1.0,
            "height": 48,
            "width": 64,
        }
    ]


def test_variable_rate_times_are_the_real_ones(tmp_path, processor):
    times = [0, 0.1, 0.2, 1.05, 1.1, 3.0, 3.1]
    path = video_files.write_video(tmp_path / "variable.mp4", times=times)
    batch = processor([path])
    np.testing.assert_allclose(batch["frame_times"][0], [0, 1.05, 1.1, 3.0], atol=1e-6)
    assert shown_numbers(batch["pixel_values"], processor) == inner_bits([0, 3, 4, 5])


@pytest.mark.filterwarnings("ignore:.*more than max_frames")
@pytest.mark.parametrize(
    ("options", "indices"),
    [
        ({"fps": 2}, list(range(0, 40, 5))),
        ({"num_frames": 4}, [0, 13, 26, 39]),
        ({"max_frames": 2}, [0, 20]),
        ({"num_frames": 9, "max_frames": 2}, [0, 39]),
        ({"do_sample_frames": False}, list(range(40))),
    ],
)
def test_sampling_options_of_the_call_and_of_the_constructor_agree(clip, options, indices):
    of_call = ETChatVideoProcessor(size=16)([clip], **options)
    of_constructor = ETChatVideoProcessor(size=16, **options)([clip])
    assert of_call["frame_indices"] == of_constructor["frame_indices"] == [indices]
    assert of_call["frame_times"][0] == pytest.approx([index / 10 for index in indices])
    assert len(of_call["pixel_values"]) == len(indices)


def test_clips_of_all_kinds_share_a_batch(clip, tmp_path, processor):
    image = tmp_path / "image.png"
    PIL.Image.fromarray(video_files.numbered_picture(40)).save(image)
    frames = np.stack([video_files.numbered_picture(number) for number in range(20)])
    batch = processor(
        [clip, image, frames, PIL.Image.open(image), [image, image], frames[3]],
        video_metadata=[None, None, {"fps": 5.0}, None, {"frame_times": [0.5, 7.25]}, None],
    )
    assert batch["frame_times"] == [[0, 1, 2, 3], [0], [0, 1, 2, 3], [0], [0, 6.75], [0]]
    assert batch["frame_indices"] == [[0, 10, 20, 30], [0], [0, 5, 10, 15], [0], [0, 1], [0]]
    numbers = [0, 10, 20, 30, 40, 0, 5, 10, 15, 40, 40, 40, 3]
    assert shown_numbers(batch["pixel_values"], processor) == inner_bits(numbers)
    decoders = [entry["decoder"] for entry in batch["video_metadata"]]
    assert decoders == ["pyav", "pillow", "memory", "memory", "memory", "memory"]
    assert batch["video_metadata"][1]["duration"] == 0.0


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 7, 100])
@pytest.mark.parametrize("options", [{"fps": 2.5}, {"num_frames": 7}, {"do_sample_frames": False}])
def test_chunks_are_the_whole(clip, processor, chunk_size, options):
    whole = processor([clip], **options)
    chunks = list(processor.iter_frames(clip, chunk_size, **options))
    assert {len(chunk["pixel_values"]) for chunk in chunks[:-1]} <= {chunk_size}
    assert 0 < len(chunks[-1]["pixel_values"]) <= chunk_size
    joined = torch.cat([chunk["pixel_values"] for chunk in chunks])
    torch.testing.assert_close(joined, whole["pixel_values"], rtol=0, atol=0)
    for key in ("frame_times", "frame_indices"):
        assert [value for chunk in chunks for value in chunk[key]] == whole[key][0]


def test_chunks_of_every_kind_of_clip(clip, processor):
    frames = np.stack([video_files.numbered_picture(number) for number in range(20)])
    (chunk,) = processor.iter_frames(frames, video_metadata={"fps": 5.0})
    assert (chunk["frame_times"], chunk["frame_indices"]) == ([0, 1, 2, 3], [0, 5, 10, 15])
    (chunk,) = processor.iter_frames(open_video(clip, "pyav"))
    assert shown_numbers(chunk["pixel_values"], processor) == inner_bits([0, 10, 20, 30])


def test_chunks_come_before_the_rest_is_decoded(clip, processor, monkeypatch):
    read = []
    transform = processor._transform
    monkeypatch.setattr(processor, "_transform", lambda picture: read.append(picture) or transform(picture))
    chunks = processor.iter_frames(clip, 2, fps=10)
    next(chunks)
    assert len(read) <= 2 + processing.LOOK_AHEAD + 1
    chunks.close()  # and the thread in the background ends


def test_a_reader_that_breaks_off_is_an_error(clip, processor):
    reader = open_video(clip, "pyav")
    read = reader.read
    reader.read = lambda indices: read(indices[:2])
    with pytest.raises(RuntimeError):
        list(processor.iter_frames(reader))


def test_a_lowered_rate_is_said(clip, processor):
    with pytest.warns(
        UserWarning, match=r"clip.mp4: 8 frames at 2 fps .* max_frames=3; sampling at 0.75 fps"
    ) as caught:
        processor([clip], fps=2, max_frames=3)
    assert "\n" not in str(caught[0].message)
    with pytest.warns(UserWarning, match="40 frames at 10 fps are more than max_frames=5; sampling at 1.25 fps"):
        list(processor.iter_frames(clip, num_frames=40, max_frames=5))
    with pytest.warns(UserWarning, match="<frames>: 5 frames at .* max_frames=2"):
        processor([np.zeros((5, 8, 8, 3), np.uint8)], video_metadata={"frame_times": range(5)}, max_frames=2)


def test_a_rate_that_fits_is_kept_in_silence(clip, processor):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert processor([clip], max_frames=4)["frame_times"] == [[0, 1, 2, 3]]


def test_a_long_video_is_sampled_to_fit_the_context(converted, tmp_path, monkeypatch):
    model, tiny = load(converted)
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", 256)
    path = video_files.write_video(tmp_path / "long.mp4", 160, 1)
    with pytest.warns(
        UserWarning, match="160 frames at 1 fps are more than max_frames=128; sampling at 0.8 fps instead"
    ):
        answer = ask(model, tiny, path, "What?", max_new_tokens=1)
    assert (answer["num_frames"], answer["frame_times"][:3]) == (128, [0, 1, 2])
    assert answer["frame_times"][-1] == 159
    tiny.video_processor.max_frames = 20  # what the processor was saved with counts, and what a call says most
    with pytest.warns(UserWarning, match="max_frames=20"):
        assert ask(model, tiny, path, "What?", max_new_tokens=1)["num_frames"] == 20
    with pytest.warns(UserWarning, match="max_frames=30"):
        assert ask(model, tiny, path, "What?", max_frames=30, max_new_tokens=1)["num_frames"] == 30
    with pytest.raises(ValueError, match="max_frames must be a positive number, not 0"):
        ask(model, tiny, path, "What?", max_frames=0)


def test_times_count_from_the_first_frame_given(processor):
    frames = np.zeros((3, 8, 8, 3), np.uint8)
    assert processor([frames], video_metadata={"frame_times": [7, 8.5, 9]})["frame_times"] == [[0, 1.5, 2]]
    late = VideoMetadata(total_num_frames=40, fps=2.0, frames_indices=[10, 11, 20])
    assert processor([frames], video_metadata=[late])["frame_times"] == [[0, 0.5, 5]]


def test_frames_are_left_as_they_are(processor):
    frames = np.random.default_rng(0).integers(0, 256, (2, 60, 80, 3), np.uint8)
    expected, before = processor([frames], video_metadata={"fps": 1})["pixel_values"], frames.copy()
    np.testing.assert_array_equal(frames, before)
    frames.flags.writeable = False
    mirrored_twice = np.ascontiguousarray(frames[..., ::-1])[..., ::-1]  # BGR, seen as RGB
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for same in (frames, mirrored_twice):
            found = processor([same], video_metadata={"fps": 1})["pixel_values"]
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_times_survive_a_cast(clip, processor):
    batch = processor([clip], fps=3).to(dtype=torch.bfloat16)
    assert batch["pixel_values"].dtype == torch.bfloat16
    assert batch["frame_times"][0] == [index / 10 for index in batch["frame_indices"][0]]


@pytest.mark.filterwarnings("ignore:.*more than max_frames")
def test_an_array_is_sampled_as_a_file_of_its_rate_is(clip, processor):
    frames = np.stack([video_files.numbered_picture(number) for number in range(40)])
    for options in ({}, {"fps": 3}, {"num_frames": 5}, {"max_frames": 3}):
        of_file = processor([clip], **options)
        of_array = processor([frames], video_metadata={"fps": 10}, **options)
        assert of_file["frame_indices"] == of_array["frame_indices"]
        assert of_file["frame_times"][0] == pytest.approx(of_array["frame_times"][0])


@pytest.mark.filterwarnings("ignore:.*more than max_frames")
def test_sampled_frames_are_taken_as_they_are_up_to_the_budget(processor):
    frames = np.stack([video_files.numbered_picture(number) for number in range(5)])
    times = {"frame_times": [0, 2.5, 5, 7.5, 10]}
    assert processor([frames], video_metadata=times)["frame_indices"] == [[0, 1, 2, 3, 4]]
    assert processor([frames], video_metadata=times, num_frames=8)["frame_indices"] == [[0, 1, 2, 3, 4]]
    assert processor([frames], video_metadata=times, max_frames=3)["frame_times"] == [[0, 5, 10]]
    assert processor([frames], video_metadata=times, num_frames=2)["frame_times"] == [[0, 10]]


def test_transformers_metadata(processor):
    frames = np.stack([video_files.numbered_picture(number) for number in range(4)])
    whole = VideoMetadata(total_num_frames=4, fps=2.0)
    assert processor([frames], video_metadata=[whole])["frame_times"] == [[0, 1]]
    sampled = VideoMetadata(total_num_frames=40, fps=2.0, frames_indices=[0, 5, 9, 30])
    assert processor([frames], video_metadata=[sampled])["frame_times"] == [[0, 2.5, 4.5, 15]]


def test_image_files_are_upright_rgb(tmp_path):
    picture = PIL.Image.fromarray(video_files.numbered_picture(77))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turn clockwise to show
    picture.transpose(PIL.Image.Transpose.ROTATE_90).save(tmp_path / "phone.png", exif=exif)
    picture.convert("RGBA").save(tmp_path / "alpha.png")
    picture.convert("P").save(tmp_path / "palette.gif")
    for name in ("phone.png", "alpha.png", "palette.gif"):
        assert video_files.read_number(processing.load_picture(tmp_path / name)) == 77
    picture.convert("L").save(tmp_path / "grey.jpg")
    assert processing.load_picture(tmp_path / "grey.jpg").shape == (48, 64, 3)


def test_an_animation_is_a_video(tmp_path, processor):
    path = video_files.write_video(tmp_path / "animation.gif", 20, codec="gif", pix_fmt="rgb8", b_frames=0)
    assert processor(path)["frame_times"] == [[0, 1]]


@pytest.mark.parametrize(
    ("clip", "metadata", "message"),
    [
        (np.zeros((3, 8, 8, 3), np.uint8), None, "3 frames without a time base; pass video_metadata="),
        ([np.zeros((8, 8, 3), np.uint8)] * 2, {}, "2 frames without a time base"),
        (np.zeros((3, 8, 8, 3), np.uint8), {"frame_times": [0, 1]}, "one time per frame"),
        (np.zeros((3, 8, 8, 3), np.uint8), {"frame_times": [0, 2, 1]}, "ascend"),
        (np.zeros((3, 8, 8, 3), np.uint8), {"frame_times": [0, 1, float("nan")]}, "finite"),
        (np.zeros((3, 8, 8, 3), np.uint8), {"fps": 0}, "fps must be a positive number, not 0"),
        (np.zeros((8, 8, 3), np.float32), None, "uint8 .* not float32"),
        (torch.zeros(3, 8, 8), None, "uint8 .* not float32"),
        (np.zeros((8, 8), np.uint8), None, r"not \(1, 8\)|frames must be"),
        (np.zeros((8, 8, 4), np.uint8), None, r"not \(8, 8, 4\)"),
        (np.zeros((1, 0, 8, 3), np.uint8), None, r"not \(0, 8, 3\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), None, "without frames"),
        ([], None, "without frames"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((9, 8, 3), np.uint8)], {"fps": 1}, "must have one size"),
        ({"frames": 1}, None, "cannot be a dict"),
        ([None, None], {"fps": 1}, "cannot be a NoneType"),
    ],
)
def test_unsuitable_clips(processor, clip, metadata, message):
    with pytest.raises(ValueError, match=message) as caught:
        processor([clip], video_metadata=[metadata])
    assert "\n" not in str(caught.value)


def test_unsuitable_calls(clip, processor, tmp_path):
    with pytest.raises(ValueError, match="at least one clip"):
        processor([])
    with pytest.raises(ValueError, match="1 entries for 2 clips"):
        processor([clip, clip], video_metadata=[None])
    with pytest.raises(ValueError, match="its own time base"):
        processor([clip], video_metadata=[{"fps": 3}])
    with pytest.raises(ValueError, match="exclude each other"):
        processor([clip], fps=1, num_frames=3)
    with pytest.raises(ValueError, match="fps must be a positive number, not nan"):
        processor([clip], fps=float("nan"))
    with pytest.raises(ValueError, match="return_tensors"):
        processor([clip], return_tensors="tf")
    with pytest.raises(FileNotFoundError, match="nowhere.mp4"):
        processor([tmp_path / "nowhere.mp4"])
    with pytest.raises(ValueError, match="clip.mp4: not an image"):
        processor([[clip, clip]], video_metadata=[{"fps": 1}])
    image = tmp_path / "image.jpg"
    PIL.Image.fromarray(video_files.noise_picture(0)).save(image)
    with pytest.raises(ValueError, match="cut.jpg: the image cannot be decoded"):
        processor([video_files.cut_short(image, tmp_path / "cut.jpg", 0.5)])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"size": 0}, ValueError, "size must be"),
        ({"size": {"height": 3, "width": 4}}, ValueError, "size must be"),
        ({"size": {"longest_edge": 3}}, ValueError, "size must be"),
        ({"fps": -1}, ValueError, "fps must be a positive number, not -1"),
        ({"fps": 1, "num_frames": 3}, ValueError, "fps=None"),
        ({"image_mean": [0.5]}, ValueError, "three values"),
        ({"decoder": "opencv"}, ValueError, "unknown decoder 'opencv'"),
        ({"sise": 3}, TypeError, "no argument sise"),
    ],
)
def test_impossible_configurations(arguments, error, message):
    with pytest.raises(error, match=message):
        ETChatVideoProcessor(**arguments)


@pytest.mark.parametrize("size", [28, {"shortest_edge": 28}, {"height": 28, "width": 28}])
def test_sizes(size):
    assert ETChatVideoProcessor(size=size).size == 28


def test_round_trip(tmp_path):
    options = {"size": 28, "num_frames": 7, "max_frames": 5, "pad_to_square": True, "decoder": "pyav"}
    saved = ETChatVideoProcessor(**options)
    (path,) = saved.save_pretrained(tmp_path)
    assert Path(path).name == "video_preprocessor_config.json"
    config = json.loads(Path(path).read_text())
    assert {name: config[name] for name in options} == options
    loaded = ETChatVideoProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == saved.to_dict()
    assert (loaded.fps, loaded.num_frames) == (None, 7)
    assert ETChatVideoProcessor.from_pretrained(tmp_path, max_frames=3).max_frames == 3
    by_rate = ETChatVideoProcessor.from_pretrained(tmp_path, fps=2.0, num_frames=None)
    assert (by_rate.fps, by_rate.num_frames) == (2.0, None)


def test_remote_code_round_trip_without_torchvision(tmp_path, monkeypatch, clip):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(ETChatVideoProcessor, "_auto_class", None)
    ETChatVideoProcessor.register_for_auto_class()
    ETChatVideoProcessor(size=48).save_pretrained(tmp_path / "repo")
    config = json.loads((tmp_path / "repo" / "video_preprocessor_config.json").read_text())
    reference = config["auto_map"]["AutoVideoProcessor"]
    assert reference == "video_processing_etchat.ETChatVideoProcessor"
    remote = get_class_from_dynamic_module(reference, str(tmp_path / "repo"))
    assert remote is not ETChatVideoProcessor
    batch = remote.from_pretrained(tmp_path / "repo")(clip)
    torch.testing.assert_close(batch["pixel_values"], ETChatVideoProcessor(size=48)(clip)["pixel_values"])


def test_what_the_shipped_file_imports():
    assert get_relative_imports(processing.__file__) == ["video_decoding_etchat"]
    assert set(get_imports(processing.__file__)).isdisjoint({"av", "decord", "etchat_hf", "torchvision"})


def test_full_size_frames_are_not_kept(tmp_path):
    """24 frames of 720p are 66 MB as bytes and 265 MB as floats; one at a time stays far below."""
    path = video_files.write_video(tmp_path / "large.mp4", 24, 2, size=(1280, 720), options={"preset": "ultrafast"})
    processor = ETChatVideoProcessor(size=28, decoder="pyav")
    tracemalloc.start()
    batch = processor([path], fps=2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(batch["pixel_values"]) == 24
    assert peak < 6 * 1280 * 720 * 3
