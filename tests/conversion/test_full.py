"""Full checkpoints: there and back."""

import json
import stat

import pytest
import torch
from original_checkpoints import assert_same_tensors, read_tensors
from safetensors.torch import load_file
from transformers import Gemma2Config, GenerationConfig, LlamaConfig, Qwen2Config

from etchat_hf.configuration_etchat import ETChatConfig
from etchat_hf.conversion import sources
from etchat_hf.conversion.convert import Options, convert_checkpoint, convert_to_original
from etchat_hf.modeling_etchat import ETChatForConditionalGeneration
from etchat_hf.processing_etchat import ETChatProcessor

EVA = "model.vision_tower.vision_tower"
TINY = {
    "vocab_size": 560,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
REMOTE_CODE = {
    "configuration_etchat.py",
    "generation_etchat.py",
    "modeling_etchat.py",
    "processing_etchat.py",
    "video_decoding_etchat.py",
    "video_processing_etchat.py",
}


def strict_load(folder, **kwargs):
    model, info = ETChatForConditionalGeneration.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model


def test_tensors_are_the_originals(golden, converted):
    original = load_file(golden / "phi3_stage3/original/model.safetensors")
    ours = read_tensors(converted)
    same = {
        "lm_head.weight": "lm_head.weight",
        "model.language_model.layers.2.self_attn.qkv_proj.weight": "model.layers.2.self_attn.qkv_proj.weight",
        "model.vision_tower.encoder.layers.3.self_attn.projection.weight": f"{EVA}.blocks.3.attn.proj.weight",
        "model.vision_tower.embeddings.position_embedding": f"{EVA}.pos_embed",
        "model.compressor.query_tokens": "model.qformer_query",
        "model.compressor.qformer.embeddings.layernorm.bias": "model.qformer_bert.bert.embeddings.LayerNorm.bias",
        "model.compressor.qformer.encoder.layer.2.crossattention.attention.key.weight": (
            "model.qformer_bert.bert.encoder.layer.2.crossattention.self.key.weight"
        ),
        "model.compressor.aggregator_key.1.weight": "model.qformer_k_proj.1.weight",
        "model.compressor.projector.0.bias": "model.qformer_v_proj.0.bias",
        "frm_head.3.weight": "frm_head.3.weight",
    }
    for name, source in same.items():
        assert torch.equal(ours[name], original[source]), name
    bias = ours["model.vision_tower.encoder.layers.1.self_attn.qkv.bias"].chunk(3)
    assert torch.equal(bias[0], original[f"{EVA}.blocks.1.attn.q_bias"])
    assert not bias[1].any()
    assert torch.equal(bias[2], original[f"{EVA}.blocks.1.attn.v_bias"])
    # Two biases become one in each block, and position_ids goes.
    assert len(ours) == len(original) - 4 - 1


def test_folder_is_complete(converted):
    assert {file.name for file in converted.glob("*.py")} == REMOTE_CODE
    config = ETChatConfig.from_pretrained(converted)
    assert config.vision_config.num_hidden_layers == 4 and config.vision_config.image_size == 28
    assert config.qformer_config.vocab_size == 401 and config.qformer_config.cross_attention_frequency == 2
    assert config.text_config.sliding_window is None and config.match_token_id == 524 and config.bi_attention
    generation = GenerationConfig.from_pretrained(converted)
    assert generation.eos_token_id == [2, 522] and generation.pad_token_id == 2 and not generation.do_sample
    processor = ETChatProcessor.from_pretrained(converted)
    assert (processor.match_token_id, processor.image_token_id) == (524, config.image_token_id)
    assert len(processor.qformer_tokenizer) == 401
    assert processor.qformer_tokenizer.truncation_side == "left"
    assert processor.qformer_tokenizer.model_max_length == 256
    strict_load(converted)


def test_folder_can_be_read_by_others(converted):
    assert stat.S_IMODE(converted.stat().st_mode) == stat.S_IMODE(converted.parent.stat().st_mode) | 0o055


@pytest.mark.parametrize("layout", ["save_sharded", "save_bin", "save_sharded_bin", "save_legacy_bin"])
def test_every_file_layout_gives_the_same(checkpoint, converted, tmp_path, options, layout):
    source = checkpoint
    if layout == "save_legacy_bin":
        (source.folder / "model.safetensors").unlink()
        file = source.folder / "pytorch_model.bin"
        torch.save(source.tensors, file, _use_new_zipfile_serialization=False)
    elif layout == "save_sharded_bin":
        source.save_bin(shards=3)
    else:
        getattr(source, layout)()
    convert_checkpoint(source.folder, tmp_path / "out", options=options)
    assert_same_tensors(read_tensors(tmp_path / "out"), read_tensors(converted))


def assert_round_trip(source, tmp_path, options):
    """Bit for bit the same tensors, the same configuration, the same tokens."""
    convert_checkpoint(source, tmp_path / "converted", options=options)
    strict_load(tmp_path / "converted")
    report = convert_to_original(tmp_path / "converted", tmp_path / "back")
    assert_same_tensors(read_tensors(tmp_path / "back"), read_tensors(source))
    for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / "back" / file).read_text()) == json.loads((source / file).read_text()), file
    tokens = [json.loads((folder / "tokenizer.json").read_text()) for folder in (tmp_path / "back", source)]
    assert tokens[0]["added_tokens"] == tokens[1]["added_tokens"] and tokens[0]["model"] == tokens[1]["model"]
    assert not (tmp_path / "back/chat_template.jinja").exists()
    assert report.fresh == {"model.qformer_bert.bert.embeddings.position_ids": "a constant"}
    # .. and what came back is an original checkpoint.
    convert_checkpoint(tmp_path / "back", tmp_path / "again", options=options)
    assert_same_tensors(read_tensors(tmp_path / "again"), read_tensors(tmp_path / "converted"))


def test_round_trip(golden, tmp_path, options):
    assert_round_trip(golden / "phi3_stage3/original", tmp_path, options)


def test_round_trip_without_matching(checkpoint, tmp_path, options):
    assert_round_trip(checkpoint.without_matching().save(), tmp_path, options)


def test_round_trip_of_llama(checkpoint, tmp_path, options):
    text = LlamaConfig(**TINY, num_key_value_heads=2, tie_word_embeddings=False)
    assert_round_trip(checkpoint.with_language_model(text, "vicuna_v1").save(), tmp_path, options)


def test_round_trip_through_save_pretrained(golden, converted, tmp_path):
    strict_load(converted).save_pretrained(tmp_path / "saved")
    ETChatProcessor.from_pretrained(converted).save_pretrained(tmp_path / "saved")
    convert_to_original(tmp_path / "saved", tmp_path / "back")
    source = golden / "phi3_stage3/original"
    assert_same_tensors(read_tensors(tmp_path / "back"), load_file(source / "model.safetensors"))
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((source / "config.json").read_text())


def test_source_on_the_hub(golden, converted, tmp_path, options, monkeypatch):
    asked = []
    local = str(golden / "phi3_stage3/original")
    monkeypatch.setattr(sources, "snapshot_download", lambda repo, allow_patterns: asked.append(repo) or local)
    convert_checkpoint("someone/ETChat-Phi3", tmp_path / "out", options=options)
    assert asked == ["someone/ETChat-Phi3"]
    assert_same_tensors(read_tensors(tmp_path / "out"), read_tensors(converted))


def test_shards_and_dtype(golden, converted, tmp_path, options):
    small = Options(options.qformer_tokenizer, 4, 4, dtype=torch.bfloat16, max_shard_size="300KB")
    report = convert_checkpoint(golden / "phi3_stage3/original", tmp_path / "out", options=small)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    ours, expected = read_tensors(tmp_path / "out"), read_tensors(converted)
    assert set(index["weight_map"].values()) == set(report.files) and len(report.files) == 3
    assert index["weight_map"].keys() == ours.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in ours.values())
    assert index["metadata"]["total_parameters"] == sum(t.numel() for t in expected.values())
    assert_same_tensors(ours, {name: tensor.bfloat16() for name, tensor in expected.items()})
    assert strict_load(tmp_path / "out").dtype == torch.bfloat16
    assert report.dtypes == {"bfloat16": len(expected)}


def test_report_names_every_key(golden, tmp_path, options):
    report = convert_checkpoint(golden / "phi3_stage3/original", tmp_path / "out", options=options)
    original = load_file(golden / "phi3_stage3/original/model.safetensors")
    position_ids = "model.qformer_bert.bert.embeddings.position_ids"
    assert set(report.used) | set(report.left_out) == original.keys()
    assert list(report.left_out) == [position_ids] and position_ids in str(report)
    assert set(report.filled) == read_tensors(tmp_path / "out").keys() and not report.fresh


@pytest.mark.parametrize(
    ("text", "conv_type"),
    [
        (
            Gemma2Config(**TINY, num_key_value_heads=2, tie_word_embeddings=True, head_dim=16, sliding_window=8),
            "gemma2",
        ),
        (Qwen2Config(**TINY, num_key_value_heads=2, tie_word_embeddings=True), "qwen2"),
    ],
)
def test_tied_language_models(checkpoint, tmp_path, options, text, conv_type):
    source = checkpoint.with_language_model(text, conv_type).save()
    report = convert_checkpoint(source, tmp_path / "out", options=options)
    assert report.left_out["lm_head.weight"].startswith("tied")
    assert "is not one token here" in report.notes[0]
    assert "lm_head.weight" not in read_tensors(tmp_path / "out")
    model = strict_load(tmp_path / "out")
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, checkpoint.tensors["model.embed_tokens.weight"])
    assert model.config.text_config.rope_parameters["rope_theta"] == 10000.0
    convert_to_original(tmp_path / "out", tmp_path / "back")
    assert_same_tensors(read_tensors(tmp_path / "back"), checkpoint.tensors)

    checkpoint.tensors["lm_head.weight"] += 1
    checkpoint.save()
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        convert_checkpoint(source, tmp_path / "untied", options=options)


def test_pooled_projector(checkpoint, tmp_path, options):
    source = checkpoint.without_matching()
    source.tensors = {name: t for name, t in source.tensors.items() if not name.startswith("model.qformer")}
    for layer, shape in {0: (64, 48), 2: (64, 64)}.items():
        source.tensors[f"model.mm_projector.{layer}.weight"] = torch.randn(shape)
        source.tensors[f"model.mm_projector.{layer}.bias"] = torch.randn(64)
    folder = source.save(mm_projector="mlp2x_gelu")
    convert_checkpoint(folder, tmp_path / "out", options=options)
    layers = strict_load(tmp_path / "out").model.compressor.layers
    assert torch.equal(layers[2].weight, source.tensors["model.mm_projector.2.weight"])
    convert_to_original(tmp_path / "out", tmp_path / "back")
    assert_same_tensors(read_tensors(tmp_path / "back"), source.tensors)


def test_vid_gets_a_row_where_the_embedding_has_none(checkpoint, tmp_path, options):
    source = checkpoint.without_matching()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        source.tensors[name] = source.tensors[name][:524].clone()
    folder = source.save(vocab_size=524)
    convert_checkpoint(folder, tmp_path / "out", options=options)
    ours = read_tensors(tmp_path / "out")
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        stored = source.tensors[name.replace("language_model.", "")]
        assert ours[name].shape == (525, 64) and torch.equal(ours[name][:524], stored)
        torch.testing.assert_close(ours[name][524], stored.mean(0))
    assert strict_load(tmp_path / "out").config.text_config.vocab_size == 525
    convert_to_original(tmp_path / "out", tmp_path / "back")
    assert_same_tensors(read_tensors(tmp_path / "back"), source.tensors)
    assert json.loads((tmp_path / "back/config.json").read_text()) == source.config


def test_training_further_shows_in_the_original(checkpoint, tmp_path, options):
    """Stage 1 -> ours -> matching added by training -> original."""
    convert_checkpoint(checkpoint.without_matching().save(), tmp_path / "stage1", options=options)
    config = ETChatConfig.from_pretrained(tmp_path / "stage1")
    config.use_matching, config.match_token_id, config.bi_attention = True, 524, True
    trained = ETChatForConditionalGeneration.from_pretrained(tmp_path / "stage1", config=config)
    trained.save_pretrained(tmp_path / "stage3")
    ETChatProcessor.from_pretrained(tmp_path / "stage1").save_pretrained(tmp_path / "stage3")
    convert_to_original(tmp_path / "stage3", tmp_path / "back")
    convert_checkpoint(tmp_path / "back", tmp_path / "again", options=options)
    config = ETChatConfig.from_pretrained(tmp_path / "again")
    assert config.use_matching and config.bi_attention and config.match_token_id == 524
    assert_same_tensors(read_tensors(tmp_path / "again"), read_tensors(tmp_path / "stage3"))
