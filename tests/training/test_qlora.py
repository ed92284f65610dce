"""QLoRA: a language model frozen in 4 bits, of which training leaves an adapter and a merged model in full."""

import json

import pytest
import torch

from etchat_hf import ETChatForConditionalGeneration
from etchat_hf.toy.tiny_model import build_model, build_processor
from etchat_hf.training import ETChatModelArguments

from .runs import build_trainer

LORA = {"tuning_mode": "attention", "lora_targets": "linear", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


@pytest.fixture(scope="module")
def wide_start(tmp_path_factory):
    """As the tiny model, with a language model as wide as bitsandbytes' blocks."""
    folder = tmp_path_factory.mktemp("wide")
    processor = build_processor()
    config = build_model(processor).config
    config.text_config.hidden_size, config.text_config.intermediate_size = 128, 256
    torch.manual_seed(0)
    ETChatForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_four_bits_need_something_to_train():
    with pytest.raises(ValueError, match="lora_targets"):
        ETChatModelArguments(model_name_or_path="somewhere", load_in_4bit=True)


def test_a_model_in_four_bits_learns_and_ends_in_full_precision(wide_start, toy_data, tmp_path):
    pytest.importorskip("bitsandbytes")
    trainer = build_trainer(
        wide_start, toy_data, tmp_path, model_options=LORA | {"load_in_4bit": True}, max_steps=8, bf16=True
    )
    layer = trainer._etchat.model.language_model.layers[0].mlp.down_proj
    assert layer.base_layer.weight.dtype == torch.uint8 and not layer.base_layer.weight.requires_grad
    trained = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
    assert trained == {torch.float32}
    trainer.train()
    losses = [entry["lm_loss"] for entry in trainer.state.log_history if "lm_loss" in entry]
    assert losses[-1] < losses[0]
    trainer.save_stage()
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    for folder in (tmp_path, tmp_path / "checkpoint-8"):
        model = ETChatForConditionalGeneration.from_pretrained(folder)
        assert all(p.is_floating_point() for p in model.parameters())
