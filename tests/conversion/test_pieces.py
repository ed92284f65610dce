"""What stage 1 starts from, put together."""

import json

import pytest
import torch
from original_checkpoints import assert_same_tensors, read_tensors
from safetensors.torch import load_file
from transformers import BertTokenizerFast

from etchat_hf.conversion.convert import convert_checkpoint, convert_pieces, convert_to_original
from etchat_hf.modeling_etchat import ETChatForConditionalGeneration


@pytest.fixture
def pieces(golden):
    folder = golden / "pieces"
    return folder / "llm", folder / "eva_vit_g.pth", folder / "instruct_blip_vicuna7b_trimmed.pth"


def test_figures_of_the_parts(golden, pieces, tmp_path, options):
    convert_pieces(*pieces, tmp_path / "out", image_size=28, options=options)
    model, info = ETChatForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    expected = load_file(golden / "pieces/expected.safetensors")
    with torch.no_grad():
        features = model.model.vision_tower(expected["pixel_values"]).last_hidden_state[:, 1:]
        torch.testing.assert_close(features, expected["vision_features"], atol=2e-5, rtol=0)
        query = json.loads((golden / "pieces/expected.json").read_text())["query"]
        words = BertTokenizerFast.from_pretrained(tmp_path / "out/qformer_tokenizer")(query, return_tensors="pt")
        frames, compressor = len(features), model.model.compressor
        hidden = compressor.qformer(
            input_ids=words["input_ids"].expand(frames, -1),
            attention_mask=torch.ones(frames, 32 + words["input_ids"].shape[1]),
            query_embeds=compressor.query_tokens.expand(frames, -1, -1),
            encoder_hidden_states=compressor.vision_layernorm(features),
        ).last_hidden_state[:, :32]
        torch.testing.assert_close(hidden, expected["qformer_hidden"], atol=2e-5, rtol=0)


def test_report_and_configuration(pieces, tmp_path, options):
    report = convert_pieces(*pieces, tmp_path / "out", image_size=28, options=options)
    reasons = report.left_out
    assert {"norm.weight", "head.bias", "llm_proj.weight", "Qformer.bert.embeddings.position_ids"} <= reasons.keys()
    assert reasons["blocks.4.attn.q_bias"] == "a block beyond the 4 that are used"
    assert len(report.fresh) == 14 and set(report.fresh.values()) == {"freshly initialised"}
    config = ETChatForConditionalGeneration.from_pretrained(tmp_path / "out").config
    assert not config.use_matching and not config.bi_attention and config.text_config.sliding_window is None
    assert config.original_checkpoint["config"]["conv_type"] == "plain"


def test_fresh_parameters_are_seeded_and_initialised_as_the_model_does(pieces, tmp_path, options):
    state = torch.random.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        convert_pieces(*pieces, tmp_path / name, image_size=28, seed=seed, options=options)
    assert torch.equal(torch.random.get_rng_state(), state)
    a, b, c = (read_tensors(tmp_path / name) for name in "abc")
    assert_same_tensors(a, b)
    weight = "model.compressor.projector.1.weight"
    assert not torch.equal(a[weight], c[weight]) and 0.015 < a[weight].std() < 0.025
    assert not a["model.compressor.projector.1.bias"].any() and a["model.compressor.projector.0.weight"].eq(1).all()


def test_image_size_decides_the_grid(pieces, tmp_path, options):
    for size, tokens in ((42, 10), (224, 257)):
        convert_pieces(*pieces, tmp_path / str(size), image_size=size, options=options)
        positions = read_tensors(tmp_path / str(size))["model.vision_tower.embeddings.position_embedding"]
        assert positions.shape == (1, tokens, 48)
        stored = torch.load(pieces[1], weights_only=True)["pos_embed"]
        assert torch.equal(positions[:, 0], stored[:, 0])
        assert size != 42 or torch.equal(positions, stored)
    with pytest.raises(ValueError, match="30 is no multiple of the patch size 14"):
        convert_pieces(*pieces, tmp_path / "30", image_size=30, options=options)


def test_becomes_a_full_original_checkpoint(pieces, tmp_path, options):
    convert_pieces(*pieces, tmp_path / "out", image_size=28, conv_type="phi3", options=options)
    convert_to_original(tmp_path / "out", tmp_path / "back")
    convert_checkpoint(tmp_path / "back", tmp_path / "again", options=options)
    assert_same_tensors(read_tensors(tmp_path / "again"), read_tensors(tmp_path / "out"))


def test_bad_pieces(golden, pieces, tmp_path, options):
    llm, vision, qformer = pieces
    with pytest.raises(ValueError, match="a plain language model is needed"):
        convert_pieces(golden / "phi3_stage3/original", vision, qformer, tmp_path / "out", options=options)
    with pytest.raises(ValueError, match="whose only key is 'model'"):
        convert_pieces(llm, vision, vision, tmp_path / "out", options=options)
    with pytest.raises(FileNotFoundError, match="nothing.pth"):
        convert_pieces(llm, tmp_path / "nothing.pth", qformer, tmp_path / "out", options=options)
    with pytest.raises(ValueError, match="conv_type is 'chatty'"):
        convert_pieces(llm, vision, qformer, tmp_path / "out", image_size=28, conv_type="chatty", options=options)
    state = torch.load(vision, weights_only=True)
    torch.save(state | {"surprise": torch.zeros(1)}, tmp_path / "extra.pth")
    with pytest.raises(ValueError, match=r"1 unexpected: surprise \(.*extra.pth\)"):
        convert_pieces(llm, tmp_path / "extra.pth", qformer, tmp_path / "out", image_size=28, options=options)
    torch.save(state | {"nested": {"a": torch.zeros(1)}}, tmp_path / "nested.pth")
    with pytest.raises(ValueError, match="'nested' is a dict: not a flat dict of plain tensors"):
        convert_pieces(llm, tmp_path / "nested.pth", qformer, tmp_path / "out", options=options)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["extra.pth", "nested.pth"]
