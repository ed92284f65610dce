"""Bad input: one line that names the thing, exit code 2, and nothing half-written."""

import json
import os
import re
from dataclasses import replace

import pytest
import torch
import typer
from original_checkpoints import read_tensors
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from etchat_hf.conversion import writing
from etchat_hf.conversion.cli import convert
from etchat_hf.conversion.convert import Options, convert_checkpoint, convert_to_original

app = typer.Typer()
app.command()(convert)


@pytest.fixture
def refused(tmp_path, options):
    """Asserts that converting a folder fails with a one-line message and leaves nothing."""

    def check(source, message, error=ValueError, options=options, **kwargs):
        with pytest.raises(error, match=message) as caught:
            convert_checkpoint(source, tmp_path / "out", options=options, **kwargs)
        assert "\n" not in str(caught.value)
        assert_nothing_left(tmp_path)

    return check


def assert_nothing_left(folder):
    assert not [file.name for file in folder.iterdir() if file.name.startswith(("out", ".out"))]


def test_config(checkpoint, refused):
    refused(checkpoint.save(model_type="etchat_opt"), r"config.json: model_type is 'etchat_opt'")
    refused(checkpoint.save(model_type="phi3"), r"model_type is 'phi3'; it must be one of etchat_phi3")
    refused(checkpoint.save(model_type="etchat_phi3", vision_output_token="cls"), "vision_output_token is 'cls'")
    refused(checkpoint.save(vision_output_token="patch", conv_type="chatty"), "conv_type is 'chatty'")
    refused(checkpoint.save(conv_type="phi3", mm_projector="mlp"), "projector_type is 'mlp'")
    refused(checkpoint.save(mm_projector="qformer", vision_output_layer=4), "is 4, but 4 vision blocks")
    refused(checkpoint.save(vision_output_layer=-2, vision_processor="clip_center_224"), "is for 'clip_center_28'")
    refused(checkpoint.save(vision_processor="clip"), "vision_processor is 'clip'; only")
    refused(checkpoint.save(vision_processor="clip_center_28", hidden_size="wide"), "config.json: .*hidden_size")
    del checkpoint.config["alpha"]
    refused(checkpoint.save(hidden_size=64, match_token_id=None), "config.json: alpha, match_token_id missing")
    (checkpoint.folder / "config.json").write_text("{")
    refused(checkpoint.folder, "config.json: not valid JSON")
    (checkpoint.folder / "config.json").unlink()
    refused(checkpoint.folder, "config.json: no such file", FileNotFoundError)


def test_keys(checkpoint, refused):
    del checkpoint.tensors["vid_head.1.bias"]
    checkpoint.tensors["surprise"] = torch.zeros(2)
    checkpoint.tensors["model.norm.weight"] = torch.zeros(65)
    folder = re.escape(str(checkpoint.save()))
    stored = r"model.norm.weight \(.*model.safetensors\) \(65,\) instead of \(64,\)"
    refused(
        checkpoint.folder,
        f"^{folder}: .* 1 missing: vid_head.1.bias; 1 unexpected: surprise .*; 1 misshapen: {stored}",
    )


def test_half_a_bias_is_missing_not_unexpected(checkpoint, refused):
    del checkpoint.tensors["model.vision_tower.vision_tower.blocks.1.attn.v_bias"]
    refused(checkpoint.save(), r"fit config.json. 1 missing: .*blocks.1.attn.v_bias\.$")


def test_many_missing_keys_are_counted(checkpoint, refused):
    checkpoint.tensors = {name: t for name, t in checkpoint.tensors.items() if "layers.1." not in name}
    refused(checkpoint.save(), r"6 missing: .*, \.\.\.$")


def test_keys_that_sizes_come_from(checkpoint, refused):
    del checkpoint.tensors["model.qformer_query"]
    refused(checkpoint.save(), r"model.safetensors: model.qformer_query is missing")


def test_weight_files(checkpoint, refused):
    file = checkpoint.folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(checkpoint.folder, "model.safetensors: not a complete safetensors file")
    file.unlink()
    refused(checkpoint.folder, "holds no weights", FileNotFoundError)
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (checkpoint.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(checkpoint.folder, "model-00001-of-00001.safetensors: no such file", FileNotFoundError)
    checkpoint.save()
    file.rename(checkpoint.folder / "model-00001-of-00001.safetensors")
    refused(checkpoint.folder, r"index.json: disagrees with .* 218 keys \(.*not in the index")


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("out-of-a-pickle",)


@pytest.mark.parametrize("state", [Malicious(), {"model": Malicious()}, [torch.zeros(1)], {1: torch.zeros(1)}])
def test_pickles_that_are_not_plain_tensors(checkpoint, refused, tmp_path, monkeypatch, state):
    monkeypatch.chdir(tmp_path)
    (checkpoint.folder / "model.safetensors").unlink()
    torch.save(state, checkpoint.folder / "pytorch_model.bin")
    refused(checkpoint.folder, "pytorch_model.bin: .*(plain tensors|flat dict)")


@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_pickle(checkpoint, refused, legacy):
    (checkpoint.folder / "model.safetensors").unlink()
    file = checkpoint.folder / "pytorch_model.bin"
    torch.save(checkpoint.tensors, file, _use_new_zipfile_serialization=not legacy)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refused(checkpoint.folder, "pytorch_model.bin: not a complete pickle")


def test_heads_and_tokenizers(checkpoint, refused, options, tmp_path):
    words = options.qformer_tokenizer
    source = checkpoint.folder
    refused(source, "--vision-heads is needed: width 48", options=Options(words))
    refused(source, "--vision-heads 5 does not divide the width 48", options=Options(words, 5, 4))
    refused(source, "--qformer-heads is needed: width 32", options=Options(words, 4))
    refused(source, "no such folder", FileNotFoundError, options=Options("./nowhere", 4, 4))
    refused(source, "holds neither vocab.txt nor", FileNotFoundError, options=Options(str(source.parent), 4, 4))
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    refused(source, r"7 tokens with \[DEC\], .* has 401 rows", options=Options(str(tmp_path), 4, 4))
    refused(source, "a base is for LoRA checkpoints", base=source)
    refused(checkpoint.save(match_token_id=523), "match_token_id is 523, but .* gives <vid> the id 524")
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (source / file).unlink()
    refused(source, "no readable tokenizer")


def test_places(checkpoint, converted, tmp_path, options, monkeypatch):
    source = checkpoint.folder
    for destination in (source, source / "inner"):
        with pytest.raises(ValueError, match="the destination is the source"):
            convert_checkpoint(source, destination, options=options)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for destination in (tmp_path / "full", tmp_path / "full/file"):
        with pytest.raises(FileExistsError, match="exists already"):
            convert_checkpoint(source, destination, options=options)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        convert_checkpoint(tmp_path / "nowhere", tmp_path / "out", options=options)
    with pytest.raises(NotADirectoryError, match="file: not a folder"):
        convert_checkpoint(tmp_path / "full/file", tmp_path / "out", options=options)
    with pytest.raises(ValueError, match="a converted one is 'etchat'"):
        convert_to_original(source, tmp_path / "out")
    with pytest.raises(ValueError, match="model_type is 'etchat'"):
        convert_checkpoint(converted, tmp_path / "out", options=options)
    with pytest.raises(ValueError, match="5 parsecs"):
        convert_checkpoint(source, tmp_path / "out", options=replace(options, max_shard_size="5 parsecs"))
    assert_nothing_left(tmp_path)
    (tmp_path / "out").mkdir()
    convert_checkpoint(source, tmp_path / "out", options=options)
    convert_checkpoint(source, tmp_path / "new/folders/out", options=options)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_error_halfway_leaves_nothing(checkpoint, tmp_path, options, monkeypatch, error):
    written = []

    def fail_at_the_tenth(tensor, dtype):
        if len(written) == 10:
            raise error
        written.append(tensor)
        return [b"\0" * torch.Size(tensor.shape).numel() * dtype.itemsize]

    monkeypatch.setattr(writing, "_bytes_of", fail_at_the_tenth)
    with pytest.raises(type(error)):
        convert_checkpoint(checkpoint.folder, tmp_path / "deep/er/out", options=options)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_a_key_bias_cannot_go_back(converted, tmp_path):
    folder = tmp_path / "changed"
    folder.mkdir()
    for file in converted.iterdir():
        (folder / file.name).symlink_to(file)
    tensors = read_tensors(converted)
    tensors["model.vision_tower.encoder.layers.0.self_attn.qkv.bias"][48] = 1
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="layers.0.self_attn.qkv.bias: the key has a bias"):
        convert_to_original(folder, tmp_path / "out")
    assert_nothing_left(tmp_path)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_command_line(golden, tmp_path):
    source, pieces = golden / "phi3_stage3/original", golden / "pieces"
    tiny = ["--vision-heads", 4, "--qformer-heads", 4, "--qformer-tokenizer", golden / "bert"]
    result = run(source, tmp_path / "out", *tiny, "--dtype", "float16", "--max-shard-size", "400KB")
    assert result.exit_code == 0 and "218 used, 1 left out" in result.output
    assert {tensor.dtype for tensor in read_tensors(tmp_path / "out").values()} == {torch.float16}
    result = run("--to-original", tmp_path / "out", tmp_path / "back")
    assert result.exit_code == 0 and len(load_file(tmp_path / "back/model.safetensors")) == 219
    parts = ["--llm", pieces / "llm", "--vision", pieces / "eva_vit_g.pth"]
    parts += ["--qformer", pieces / "instruct_blip_vicuna7b_trimmed.pth"]
    result = run(*parts, tmp_path / "pieces", *tiny, "--image-size", 28)
    assert result.exit_code == 0 and "model.compressor.projector.1.weight" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./nowhere", "DST"], "error: ./nowhere: no such folder."),
        (["SRC"], "SRC DST expected, 1 paths given"),
        (["--llm", "DIR", "DST"], "pieces need --vision, --qformer too"),
        (["SRC", "DST", "--image-size", "28"], "--image-size is for pieces only"),
        (["SRC", "DST", "--to-original", "--base", "DIR"], "--base does not go with --to-original"),
        (["SRC", "DST", "--dtype", "int8"], "int8"),
    ],
)
def test_command_line_errors(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
    assert "Traceback" not in result.output
