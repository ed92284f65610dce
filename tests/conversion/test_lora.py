"""LoRA checkpoints, merged into their base."""

import json
import math
import shutil

import pytest
import torch
from original_checkpoints import assert_same_tensors, read_tensors
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from etchat_hf.conversion.convert import convert_checkpoint

MODULE = "layers.{}.self_attn.{}"


@pytest.fixture
def lora(golden, tmp_path):
    shutil.copytree(golden / "phi3_lora/original", tmp_path / "lora")
    return tmp_path / "lora"


@pytest.fixture
def base(golden):
    return golden / "phi3_stage3/original"


def change(folder, **fields):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))


def assert_merged(out, lora, base, scaling):
    """`scaling(module)`, in float64."""
    ours, plain = read_tensors(out), load_file(base / "model.safetensors")
    adapter = load_file(lora / "adapter_model.safetensors")
    for layer in range(3):
        for projection in ("qkv_proj", "o_proj"):
            module = MODULE.format(layer, projection)
            a, b = (adapter[f"base_model.model.model.{module}.lora_{x}.weight"].double() for x in "AB")
            update = scaling(f"model.{module}") * (b @ a)
            merged = plain[f"model.{module}.weight"].double() + update
            assert update.abs().max() > 1e-4
            actual = ours[f"model.language_model.{module}.weight"].double()
            torch.testing.assert_close(actual, merged, atol=1e-6, rtol=0)


def test_merge(lora, base, tmp_path, options):
    report = convert_checkpoint(lora, tmp_path / "out", base=base, options=options)
    assert_merged(tmp_path / "out", lora, base, lambda module: 16 / 8)
    ours, trained = read_tensors(tmp_path / "out"), load_file(lora / "pytorch_model.safetensors")
    assert torch.equal(ours["lm_head.weight"], trained["base_model.model.lm_head.weight"])
    assert torch.equal(
        ours["model.compressor.projector.1.weight"], trained["base_model.model.model.qformer_v_proj.1.weight"]
    )
    assert report.layout == "LoRA"
    assert report.left_out["lm_head.weight"] == "replaced by pytorch_model.safetensors"
    sources = [base / "model.safetensors", lora / "pytorch_model.safetensors", lora / "adapter_model.safetensors"]
    assert set(report.used) | set(report.left_out) == {key for file in sources for key in load_file(file)}


def test_pickled_files_give_the_same(lora, base, tmp_path, options):
    convert_checkpoint(lora, tmp_path / "safetensors", base=base, options=options)
    for stem in ("adapter_model", "pytorch_model"):
        torch.save(load_file(lora / f"{stem}.safetensors"), lora / f"{stem}.bin")
        (lora / f"{stem}.safetensors").unlink()
    convert_checkpoint(lora, tmp_path / "bin", base=base, options=options)
    assert_same_tensors(read_tensors(tmp_path / "bin"), read_tensors(tmp_path / "safetensors"))


def test_base_from_config(lora, base, tmp_path, options):
    config = json.loads((lora / "config.json").read_text())
    (lora / "config.json").write_text(json.dumps(config | {"model_name_or_path": str(base)}))
    convert_checkpoint(lora, tmp_path / "out", options=options)
    assert_merged(tmp_path / "out", lora, base, lambda module: 2)


def test_rslora(lora, base, tmp_path, options):
    change(lora, use_rslora=True)
    convert_checkpoint(lora, tmp_path / "out", base=base, options=options)
    assert_merged(tmp_path / "out", lora, base, lambda module: 16 / math.sqrt(8))


def test_patterns_as_peft_reads_them(lora, base, tmp_path, options):
    alphas = {"o_proj": 24, r"layers\.1\.self_attn\.qkv_proj": 4}
    change(lora, r=4, rank_pattern={"qkv_proj": 8, ".*o_proj": 8}, alpha_pattern=alphas)
    convert_checkpoint(lora, tmp_path / "out", base=base, options=options)
    assert_merged(
        tmp_path / "out", lora, base, lambda module: alphas.get(get_pattern_key(alphas.keys(), module), 16) / 8
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("fan_in_fan_out", True),
        ("modules_to_save", ["lm_head"]),
        ("peft_type", "ADALORA"),
        ("init_lora_weights", "pissa"),
    ],
)
def test_what_is_not_plain_lora_is_refused(lora, base, tmp_path, options, field, value):
    change(lora, **{field: value})
    with pytest.raises(ValueError, match=f"adapter_config.json: {field} is {value!r}".replace("[", r"\[")):
        convert_checkpoint(lora, tmp_path / "out", base=base, options=options)


def test_half_a_pair_wrong_rank_and_unknown_modules(lora, base, tmp_path, options):
    file = lora / "adapter_model.safetensors"
    adapter = load_file(file)
    key = "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"
    change(lora, r=4)
    with pytest.raises(ValueError, match="are not rank 4"):
        convert_checkpoint(lora, tmp_path / "out", base=base, options=options)
    change(lora, r=8)
    save_file({k: v for k, v in adapter.items() if k != key}, file)
    with pytest.raises(ValueError, match="layers.0.self_attn.o_proj.lora_A.weight, which the adapter"):
        convert_checkpoint(lora, tmp_path / "out", base=base, options=options)
    save_file({k.replace("layers.0", "layers.9"): v for k, v in adapter.items()}, file)
    with pytest.raises(ValueError, match="layers.9.self_attn.o_proj.weight, which the adapter"):
        convert_checkpoint(lora, tmp_path / "out", base=base, options=options)
    save_file({k.removeprefix("base_model."): v for k, v in adapter.items()}, file)
    with pytest.raises(ValueError, match="does not begin with 'base_model.model.'"):
        convert_checkpoint(lora, tmp_path / "out", base=base, options=options)


def test_missing_base(lora, tmp_path, options):
    with pytest.raises(FileNotFoundError, match="'base'.*--base"):
        convert_checkpoint(lora, tmp_path / "out", options=options)
    with pytest.raises(FileNotFoundError, match="no/where"):
        convert_checkpoint(lora, tmp_path / "out", base="./no/where", options=options)
    with pytest.raises(ValueError, match="the base is a LoRA checkpoint itself"):
        convert_checkpoint(lora, tmp_path / "out", base=lora, options=options)


def test_missing_half(lora, base, tmp_path, options):
    (lora / "pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lora: holds no weights"):
        convert_checkpoint(lora, tmp_path / "out", base=base, options=options)


@pytest.mark.parametrize("at", ["above", "base"])
def test_the_tokenizer_may_be_above_or_in_the_base(lora, base, tmp_path, options, at):
    """As in a training run's checkpoint-N, which holds weights and configurations alone."""
    checkpoint = tmp_path / "run" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    for file in lora.iterdir():
        kind = checkpoint if not file.name.startswith(("tokenizer", "special", "generation")) else checkpoint.parent
        if kind == checkpoint or at == "above":
            shutil.copy(file, kind / file.name)
    convert_checkpoint(checkpoint, tmp_path / "out", base=base, options=options)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
