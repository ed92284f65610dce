"""Clips that pass the vision encoder once: on disk, by content; and never decoded for what is known."""

import json
import os
import pickle
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from etchat_hf import ClipEncoder, inference
from etchat_hf import video_decoding_etchat as decoding
from etchat_hf.clip_encoder import DecodedClip, fingerprint


@pytest.fixture(scope="module")
def loaded(converted):
    return inference.load(converted)


@pytest.fixture
def no_encoding(loaded, monkeypatch):
    """From when it is called, neither the decoder nor the vision encoder works."""

    def forbid():
        monkeypatch.setattr(decoding.PyAVReader, "read", None)
        monkeypatch.setattr(type(loaded[0].model.vision_tower), "forward", None)

    return forbid


def files(folder):
    return sorted(folder.glob("*.safetensors"))


def test_a_known_clip_is_neither_decoded_nor_encoded(loaded, clip, tmp_path, no_encoding):
    expected = loaded[1].encode(clip, loaded[0])
    first = ClipEncoder(*loaded, tmp_path / "cache").encode(clip)
    copied = shutil.copy(clip, tmp_path / "elsewhere.mp4")
    no_encoding()
    again = ClipEncoder(*loaded, tmp_path / "cache")
    ways = [clip, copied, clip.read_bytes(), {"path": None, "bytes": clip.read_bytes()}, open(clip, "rb")]
    for encoded in (
        first,
        *map(again.encode, ways),
        again.encode(again.decode(clip)),
        again.encode(clip, max_frames=50),
    ):
        assert torch.equal(encoded.vision_features, expected.vision_features)
        assert encoded.frame_times == expected.frame_times and encoded.frame_indices == expected.frame_indices
        assert encoded.duration == expected.duration == 12.0
    assert len(files(tmp_path / "cache")) == 1


def test_other_frames_contents_and_pixels_are_other_entries(loaded, clip, tmp_path):
    model, processor = loaded
    encoder = ClipEncoder(model, processor, tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), np.uint8)
    metadata = {"frame_times": [0.0, 1.0, 2.0]}
    pictures = [PIL.Image.fromarray(picture) for picture in noise]
    clips = [(clip, {}), (clip, {"fps": 2}), (noise, {"video_metadata": metadata}), (noise[0], {})]
    clips += [(pictures, {"video_metadata": metadata}), (pictures[1], {})]
    for count, (shown, sampling) in enumerate(clips, 1):
        features = encoder.encode(shown, **sampling).vision_features
        assert torch.equal(features, processor.encode(shown, model, **sampling).vision_features)
        assert len(files(tmp_path)) == count
        assert torch.equal(encoder.encode(shown, **sampling).vision_features, features)
        assert len(files(tmp_path)) == count


def test_pixels_of_other_settings_are_other_entries(loaded, clip, tmp_path, monkeypatch):
    model, processor = loaded
    encoder = ClipEncoder(model, processor, tmp_path)
    cropped = encoder.encode(clip).vision_features
    monkeypatch.setattr(processor.video_processor, "image_mean", [0.5, 0.5, 0.5])
    assert not torch.equal(encoder.encode(clip).vision_features, cropped) and len(files(tmp_path)) == 2


def test_any_other_weight_is_another_model(loaded):
    tower = torch.nn.Sequential(torch.nn.Linear(1000, 1000), torch.nn.LayerNorm(1000)).half()
    before = fingerprint(tower)
    assert before == fingerprint(tower) != fingerprint(tower.float())
    tower.half()
    weight = tower[0].weight.data
    value = weight[1, 1].item()
    weight[1, 1] = value + 1
    assert fingerprint(tower) != before
    weight[1, 1] = value
    assert fingerprint(tower) == before
    for places in ([1, 0, *range(2, 1000)], [*range(900, 1000), *range(900)]):
        tower[0].weight.data = weight[places]
        assert fingerprint(tower) != before
        tower[0].weight.data = weight[:, places]
        assert fingerprint(tower) != before
    tower[0].weight.data = weight
    tower.register_buffer("scale", torch.ones(3))
    scaled = fingerprint(tower)
    tower.scale[1] = 2
    assert len({before, scaled, fingerprint(tower)}) == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.uint8])
def test_weights_are_told_apart_wherever_they_lie(dtype):
    values = torch.arange(5003).to(dtype)
    ways = [torch.nn.ParameterList([torch.nn.Parameter(v, False)]) for v in (values[3:], values[3:].clone())]
    assert fingerprint(ways[0]) == fingerprint(ways[1])


def test_a_model_with_another_configuration_does_not_meet_these_features(loaded, converted, clip, tmp_path):
    ClipEncoder(*loaded, tmp_path / "cache").encode(clip)
    folder = shutil.copytree(converted, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "relu"
    (folder / "config.json").write_text(json.dumps(config))
    other, processor = inference.load(folder)
    features = ClipEncoder(other, processor, tmp_path / "cache").encode(clip).vision_features
    assert torch.equal(features, processor.encode(clip, other).vision_features)
    assert len(files(tmp_path / "cache")) == 2


def test_a_model_with_another_encoder_does_not_meet_these_features(loaded, converted, clip, tmp_path):
    ClipEncoder(*loaded, tmp_path).encode(clip)
    other, processor = inference.load(converted)
    with torch.no_grad():
        other.lm_head.weight.add_(1.0)
    ClipEncoder(other, processor, tmp_path).encode(clip)
    assert len(files(tmp_path)) == 1
    with torch.no_grad():
        other.model.vision_tower.embeddings.class_embedding.add_(1.0)
    features = ClipEncoder(other, processor, tmp_path).encode(clip).vision_features
    assert torch.equal(features, processor.encode(clip, other).vision_features) and len(files(tmp_path)) == 2


def damage_file(path, how: str):
    data, expected = path.read_bytes(), load_file(path)["features"]
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    middle = len(data) - expected.nbytes // 2
    tensors = {
        "reshaped": {"features": expected.flatten(1).unsqueeze(1).contiguous()},
        "other dtype": {"features": expected.view(torch.int32)},
        "number": {"features": torch.tensor(1.0)},
        "nothing": {"features": expected[:0].clone()},
        "fewer frames": {"features": expected[:-1].clone()},
        "misshapen": {"features": torch.zeros(19, 1, 3)},
        "foreign": {"other": expected},
    }
    contents = {
        "cut": data[:-100],
        "empty": b"",
        "flipped bit": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "zeroed tail": data[:middle] + bytes(len(data) - middle),
    }
    if how in contents:
        path.write_bytes(contents[how])
    elif how == "no checksum":
        save_file({"features": expected}, path)
    else:
        save_file(tensors[how], path, metadata)


DAMAGES = ["cut", "empty", "flipped bit", "zeroed tail", "no checksum", "reshaped", "other dtype", "number", "nothing"]
DAMAGES += ["fewer frames", "misshapen", "foreign"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_reported_and_replaced(loaded, clip, tmp_path, damage):
    encoder = ClipEncoder(*loaded, tmp_path)
    expected = encoder.encode(clip).vision_features
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    damage_file(path, damage)
    with pytest.warns(UserWarning, match=f"{path.name} is damaged"):
        assert torch.equal(encoder.encode(clip).vision_features, expected)
    assert path.read_bytes() == whole and files(tmp_path) == [path]


@pytest.mark.parametrize("damage", ["cut", "flipped bit", "zeroed tail", "misshapen"])
def test_damage_does_not_reach_a_training_batch(loaded, tmp_path, damage):
    pixels, times = torch.randn(2, 3, *[loaded[0].config.vision_config.image_size] * 2), [[0.0, 1.0]]
    encoder = ClipEncoder(*loaded, tmp_path)
    expected = encoder.encode_frames(pixels, times)
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    damage_file(path, damage)
    with pytest.warns(UserWarning, match=f"{path.name} is damaged"):
        assert torch.equal(encoder.encode_frames(pixels, times), expected)
    assert path.read_bytes() == whole


def test_a_file_under_the_name_of_another_is_damaged(loaded, clip, tmp_path):
    encoder = ClipEncoder(*loaded, tmp_path)
    expected = encoder.encode(clip).vision_features
    (path,) = files(tmp_path)
    encoder.encode(np.zeros((12, 40, 50, 3), np.uint8), video_metadata={"fps": 1.0})
    (other,) = set(files(tmp_path)) - {path}
    shutil.copy(other, path)
    with pytest.warns(UserWarning, match=f"{path.name} is damaged"):
        assert torch.equal(encoder.encode(clip).vision_features, expected)


def test_a_full_folder_takes_no_more(loaded, clip, tmp_path):
    expected = loaded[1].encode(clip, loaded[0]).vision_features
    encoder = ClipEncoder(*loaded, tmp_path, max_gib=1e-6)
    with pytest.warns(UserWarning, match="further clips are not stored"):
        assert torch.equal(encoder.encode(clip).vision_features, expected)
    assert not files(tmp_path)
    with pytest.raises(ValueError, match="0 GiB"):
        ClipEncoder(*loaded, tmp_path, max_gib=0)


def test_processes_that_share_a_folder_fill_it_together(loaded, tmp_path):
    model, processor = loaded
    pixels = torch.randn(12, 1, 3, *[model.config.vision_config.image_size] * 2)
    size = model.get_vision_features(pixels[0]).numel() * 4
    encoders = [ClipEncoder(model, processor, tmp_path, max_gib=6.5 * size / 2**30) for _ in range(3)]
    with pytest.warns(UserWarning, match="further clips are not stored"):
        for number, frame in enumerate(pixels):
            encoders[number % 3].encode_frames(frame, [[0.0]])
    assert 4 <= len(files(tmp_path)) <= 6
    for path in files(tmp_path):
        path.unlink()
    encoders[0].encode_frames(pixels[0], [[0.0]])
    assert len(files(tmp_path)) == 1


def test_the_folder_may_be_deleted_at_any_time(loaded, clip, tmp_path):
    encoder = ClipEncoder(*loaded, tmp_path / "cache")
    expected = encoder.encode(clip).vision_features
    for _ in range(2):
        shutil.rmtree(tmp_path / "cache")
        assert torch.equal(encoder.encode(clip).vision_features, expected)
        assert len(files(tmp_path / "cache")) == 1


def test_a_clip_that_cannot_be_stored_is_encoded_all_the_same(loaded, clip, tmp_path):
    encoder = ClipEncoder(*loaded, tmp_path / "cache")
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").touch()
    with pytest.warns(UserWarning, match="cache: a clip is not stored"):
        features = encoder.encode(clip).vision_features
    assert torch.equal(features, loaded[1].encode(clip, loaded[0]).vision_features)


def test_files_have_the_rights_of_any_other_file(loaded, clip, tmp_path):
    umask = os.umask(0o027)
    try:
        ClipEncoder(*loaded, tmp_path).encode(clip)
    finally:
        os.umask(umask)
    (path,) = files(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o640


def test_what_killed_processes_left_is_counted_then_removed(loaded, clip, tmp_path):
    encoder = ClipEncoder(*loaded, tmp_path, max_gib=0.001)
    left = tmp_path / ".writing" / "left"
    left.parent.mkdir()
    left.write_bytes(bytes(2**21))
    with pytest.warns(UserWarning, match="further clips are not stored"):
        encoder.encode(clip)
    ClipEncoder(*loaded, tmp_path)
    assert left.exists() and not files(tmp_path)  # another process may be writing it
    os.utime(left, (0, 0))
    ClipEncoder(*loaded, tmp_path, max_gib=0.001).encode(clip)
    assert not left.exists() and len(files(tmp_path)) == 1


def test_a_folder_that_is_a_file_is_refused(loaded, tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(OSError, match="cache"):
        ClipEncoder(*loaded, tmp_path / "cache")


def test_decoding_ahead_and_encoding_later_is_encoding(loaded, clip, tmp_path):
    for folder in (None, tmp_path):
        encoder = ClipEncoder(*loaded, folder)
        decoded = encoder.decode(clip)
        assert isinstance(decoded, DecodedClip) and len(decoded.pixel_values) == 12
        expected = loaded[1].encode(clip, loaded[0])
        assert torch.equal(encoder.encode(decoded).vision_features, expected.vision_features)
    found = pickle.loads(pickle.dumps(encoder)).decode(clip)
    assert found.pixel_values is None
    assert torch.equal(encoder.encode(found).vision_features, expected.vision_features)
    files(tmp_path)[0].unlink()
    with pytest.raises(FileNotFoundError, match="no longer"):
        encoder.encode(found)


def test_frames_of_a_batch_are_known_by_their_pixels(loaded, tmp_path, no_encoding):
    model, processor = loaded
    size = model.config.vision_config.image_size
    pixels, times = torch.randn(5, 3, size, size), [[0.0, 1.0], [0.0, 1.0, 2.0]]
    expected = model.get_vision_features(pixels)
    assert torch.equal(ClipEncoder(model, processor).encode_frames(pixels, times), expected)
    assert torch.allclose(ClipEncoder(model, processor, tmp_path).encode_frames(pixels, times), expected, atol=1e-6)
    assert len(files(tmp_path)) == 2
    no_encoding()
    again = ClipEncoder(model, processor, tmp_path)
    assert torch.allclose(again.encode_frames(pixels, times), expected, atol=1e-6)
    assert torch.allclose(again.encode_frames(pixels[2:], times[1:]), expected[2:], atol=1e-6)


def test_a_long_clip_is_encoded_a_few_frames_at_a_time(loaded, clip, monkeypatch):
    model, processor = loaded
    encode, sizes = model.get_vision_features, []
    monkeypatch.setattr(model, "get_vision_features", lambda pixels: sizes.append(len(pixels)) or encode(pixels))
    encoded = processor.encode(clip, model, fps=10)
    assert sizes == [64, 56] and len(encoded.vision_features) == 120
    expected = encode(processor.video_processor([str(clip)], fps=10)["pixel_values"])
    assert torch.allclose(encoded.vision_features, expected, atol=1e-6)
