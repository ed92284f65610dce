"""From the original's pieces through the stages, and back to the original's layout."""

import json

import pytest
import torch

from etchat_hf import ETChatForConditionalGeneration, ETChatProcessor
from etchat_hf.conversion.convert import Options, convert_checkpoint, convert_pieces, convert_to_original

from .runs import REPOSITORY, build_trainer

LORA = {"tuning_mode": "attention", "lora_targets": "attention", "lora_r": 4, "lora_alpha": 8, "bi_attention": True}


@pytest.fixture
def options():
    golden = REPOSITORY / "tests" / "golden"
    return Options(qformer_tokenizer=str(golden / "bert"), vision_heads=4, qformer_heads=4)


def test_pieces_become_stages_that_convert_back(toy_data, tmp_path, options):
    pieces = REPOSITORY / "tests" / "golden" / "pieces"
    names = ("llm", "eva_vit_g.pth", "instruct_blip_vicuna7b_trimmed.pth")
    convert_pieces(*(pieces / name for name in names), tmp_path / "pieces", image_size=28, options=options)
    first = build_trainer(tmp_path / "pieces", toy_data, tmp_path / "one", matching=False, max_steps=2)
    first.train()
    first.save_stage()
    second = build_trainer(tmp_path / "one", toy_data, tmp_path / "two", model_options=LORA, max_steps=2)
    second.train()
    second.save_stage()

    convert_to_original(tmp_path / "two", tmp_path / "original")
    config = json.loads((tmp_path / "original" / "config.json").read_text())
    assert config["use_matching"] and config["bi_attention"] and config["conv_type"] == "phi3"
    convert_checkpoint(tmp_path / "original", tmp_path / "again", options=options)
    ours = ETChatForConditionalGeneration.from_pretrained(tmp_path / "two")
    theirs, info = ETChatForConditionalGeneration.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name
    end = ETChatProcessor.from_pretrained(tmp_path / "two").tokenizer.convert_tokens_to_ids("<|end|>")
    assert end in ours.generation_config.eos_token_id
