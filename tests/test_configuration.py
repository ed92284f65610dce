import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from tiny import tiny_config

from etchat_hf import ETChatConfig


def test_defaults_are_the_published_phi3_mini():
    config = ETChatConfig()
    vision, qformer, text = config.vision_config, config.qformer_config, config.text_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (1408, 39, 16)
    assert (vision.intermediate_size, vision.image_size, vision.patch_size) == (int(1408 * 4.3637), 224, 14)
    assert (qformer.vocab_size, qformer.hidden_size, qformer.num_hidden_layers) == (30523, 768, 12)
    assert (text.model_type, text.vocab_size, text.hidden_size, text.sliding_window) == ("phi3", 32064, 3072, None)
    assert (config.num_query_tokens, config.alpha, config.fps) == (32, 2.0, 1.0)
    assert config.match_token_id < text.vocab_size


def test_round_trip(tmp_path):
    config = tiny_config("gemma2", alpha=3.0, fps=2.0, bi_attention=False)
    config.save_pretrained(tmp_path)
    assert ETChatConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert (tmp_path / "configuration_etchat.py").is_file()


def test_qformer_reads_what_the_vision_encoder_writes():
    assert tiny_config().qformer_config.encoder_hidden_size == 48


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_config": {"model_type": "opt"}}, "'opt'"),
        ({"alpha": 1.0}, "alpha is 1.0"),
        ({"fps": 0}, "fps is 0"),
        ({"match_token_id": None}, "match_token_id"),
        ({"match_token_id": 128}, "no embedding row"),
        ({"match_token_id": 101}, "both 101"),
        ({"projector_type": "mlp0x_gelu"}, "mlp0x_gelu"),
        ({"projector_type": "linear"}, "linear"),
        ({"projector_type": "mlp2x_gelu", "use_time_tag": True}, "use_time_tag"),
        ({"num_query_tokens": 0}, "num_query_tokens"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"image_token_id": -1}, "image_token_id is -1"),
        ({"qformer_config": {"hidden_size": 32, "num_attention_heads": 5}}, "no multiple of its 5 heads"),
        ({"vision_config": {"num_hidden_layers": 0}}, "num_hidden_layers is 0"),
    ],
)
def test_impossible_combinations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="image_size 30"):
        tiny_config(vision_config={"image_size": 30, "patch_size": 14})
    shallow = tiny_config().text_config.to_dict() | {"num_hidden_layers": 1}
    with pytest.raises(ValueError, match="num_hidden_layers"):
        tiny_config(text_config=shallow)


def test_types_are_checked():
    with pytest.raises(StrictDataclassFieldValidationError, match="image_token_id"):
        tiny_config(image_token_id="101")
