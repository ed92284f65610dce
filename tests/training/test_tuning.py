"""Which parameters move in each tuning mode, and which do not."""

import pytest
import torch

from etchat_hf import ETChatForConditionalGeneration
from etchat_hf.toy.tiny_model import build_model, build_processor
from etchat_hf.training import ETChatModelArguments
from etchat_hf.training.tuning import is_trained, plain_name

from .runs import build_trainer

MATCHING = ("vid_head.", "frm_head.", "model.language_model.embed_tokens.", "lm_head.")
PROJECTOR = tuple(
    f"model.compressor.{name}." for name in ("query_projection", "aggregator_query", "aggregator_key", "projector")
)
LAST_TEXT_FFN = (
    "model.compressor.qformer.encoder.layer.1.intermediate.",
    "model.compressor.qformer.encoder.layer.1.output.",
)


def expected(name: str, mode: str, matching: bool, lora: bool) -> bool:
    """SPEC's table in its own words, apart from the code under test."""
    if name.startswith("model.vision_tower.") or name.startswith(LAST_TEXT_FFN):
        return False
    if matching and name.startswith(MATCHING):
        return True
    if lora and "self_attn" in name:
        return "_proj.weight" in name
    if mode == "llm":
        return True
    if name.startswith(PROJECTOR):
        return True
    if mode == "projector" or not name.startswith("model.compressor."):
        return False
    if mode == "qformer" or not name.startswith("model.compressor.qformer."):
        return True
    return "attention" in name


@pytest.mark.parametrize("matching", [False, True])
@pytest.mark.parametrize("mode, lora", [
    ("projector", False), ("projector", True), ("attention", False), ("attention", True),
    ("qformer", False), ("qformer", True), ("llm", False),
])  # fmt: skip
def test_exactly_the_parameters_of_the_mode_move(start, toy_data, tmp_path, mode, lora, matching):
    options = {"tuning_mode": mode, "lora_targets": "attention" if lora else None, "lora_r": 4, "lora_alpha": 8}
    trainer = build_trainer(
        start, toy_data, tmp_path, matching, model_options=options, max_steps=4, save_strategy="no"
    )
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    model = trainer.model
    after = model.state_dict()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    if lora:
        for name in [name for name in moved if "lora_" in name]:
            assert ".language_model." in name and ".self_attn." in name
        assert {name.rpartition(".lora_")[0] for name in after if "lora_A" in name} == {
            name.rpartition(".lora_")[0] for name in moved if "lora_B" in name
        }
    others = {name for name in after if "lora_" not in name}
    for name in others:
        is_copy = ".original_module." in name or ".base_layer." in name
        plain = plain_name(name)
        wanted = not is_copy and expected(plain, mode, matching, lora=False)
        # A weight that gets no gradient from these few words (a token that never occurs) may stay.
        assert (name in moved) == wanted, f"{name}: moved {name in moved}, expected {wanted}"


def test_a_bias_or_norm_has_no_weight_decay_and_lora_its_own_rate(start, toy_data, tmp_path):
    options = {"tuning_mode": "attention", "lora_targets": "linear", "lora_r": 4}
    trainer = build_trainer(
        start, toy_data, tmp_path, model_options=options, weight_decay=0.1, learning_rate=1e-3, lora_learning_rate=5e-4
    )
    groups = trainer.create_optimizer().param_groups
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in trainer.model.parameters())
    for group in groups:
        for name in (names[id(parameter)] for parameter in group["params"]):
            assert group["lr"] == (5e-4 if "lora_" in name else 1e-3)
            no_decay = (
                name.endswith("bias")
                or "norm" in name.lower()
                or name.endswith(("vid_head.modules_to_save.default.0.weight",))
            )
            if group["weight_decay"]:
                assert not no_decay, name
    assert any("mlp.gate_up_proj.lora_A" in name for name in names.values())


def test_the_last_text_block_of_the_qformer_is_never_trained():
    for kind in ("intermediate", "output"):
        name = f"model.compressor.qformer.encoder.layer.1.{kind}.dense.weight"
        assert not is_trained(name, "llm", True, num_qformer_layers=2)
        assert is_trained(name.replace(kind, f"{kind}_query"), "qformer", True, num_qformer_layers=2)
        assert is_trained(name.replace("layer.1", "layer.0"), "qformer", True, num_qformer_layers=2)


@pytest.mark.parametrize("options, message", [
    ({"tuning_mode": "everything"}, "tuning_mode is 'everything'"),
    ({"lora_targets": "mlp"}, "lora_targets is 'mlp'"),
    ({"tuning_mode": "llm", "lora_targets": "linear"}, "leave lora_targets out"),
])  # fmt: skip
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ETChatModelArguments(model_name_or_path="x", **options)


def test_the_pooled_projector_is_trained_in_its_mode(toy_data, tmp_path):
    torch.manual_seed(0)
    processor = build_processor()
    config = build_model(processor).config
    config.projector_type = "mlp2x_gelu"
    ETChatForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    options = {"tuning_mode": "projector", "lora_targets": "attention", "lora_r": 4}
    trainer = build_trainer(tmp_path / "base", toy_data, tmp_path / "out", matching=False, model_options=options)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    moved = {plain_name(name) for name, tensor in trainer.model.state_dict().items() if not tensor.equal(before[name])}
    others = {name for name in moved if "lora_" not in name}
    assert others == {f"model.compressor.layers.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}


def test_time_tags_are_trained_with(start, toy_data, tmp_path):
    options = {"tuning_mode": "attention", "use_time_tag": True}
    trainer = build_trainer(start, toy_data, tmp_path, model_options=options, max_steps=1)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert len(batch["qformer_input_ids"]) == len(batch["pixel_values"])
    trainer.train()
    loaded = ETChatForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-1")
    assert loaded.config.use_time_tag
