"""The original's config.json <-> `ETChatConfig`, with the sizes that only the tensors know."""

import math
import re
from dataclasses import fields

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, InstructBlipQFormerConfig, InstructBlipVisionConfig
from transformers.configuration_utils import PreTrainedConfig

from ..configuration_etchat import TEXT_MODEL_TYPES, ETChatConfig
from .lazy_tensor import LazyTensor
from .weight_map import BERT, EVA, translate

PREFIX = "etchat_"
# What every checkpoint of E.T. Chat says about itself, beside the language model's own fields.
REQUIRED_FIELDS = (
    "alpha",
    "bi_attention",
    "conv_type",
    "mm_projector",
    "use_matching",
    "use_time_tag",
    "vision_output_layer",
    "vision_output_token",
    "vision_processor",
    "vocab_size",
)
# Fields that transformers 5 reads, but no longer declares.
LEGACY_TEXT_FIELDS = {"rope_theta", "rope_scaling", "partial_rotary_factor"}
# Fields that speak of the checkpoint, not of the language model in it.
FIELDS_OF_THE_FILE = {"architectures", "dtype", "transformers_version"}
# Head counts are not stored; the published encoders have heads of these widths.
VISION_HEAD_WIDTH = 88
# EVA-ViT-g: how many blocks should be there is known for this width alone.
VISION_WIDTH, VISION_DEPTH = 1408, 40
QFORMER_HEAD_WIDTH = 64


def image_size_of(original: dict) -> int:
    """Side of a frame in pixels."""
    return int(original["vision_processor"].removeprefix("clip_center_"))


def check_original(original: dict, file: str):
    """
    Refuse a config.json that is none of an original checkpoint.

    Raises:
        ValueError: an unknown model_type, a missing field, or a value that we cannot serve.
    """
    known = [PREFIX + model_type for model_type in TEXT_MODEL_TYPES]
    model_type = original.get("model_type")
    if model_type not in known:
        raise ValueError(f"{file}: model_type is {model_type!r}; it must be one of {', '.join(known)}.")
    missing = [field for field in REQUIRED_FIELDS if field not in original]
    if original.get("use_matching") and original.get("match_token_id") is None:
        missing.append("match_token_id")
    if missing:
        raise ValueError(f"{file}: {', '.join(missing)} missing.")
    if re.fullmatch(r"clip_center_[1-9]\d*", str(original["vision_processor"])) is None:
        raise ValueError(
            f"{file}: vision_processor is {original['vision_processor']!r}; only 'clip_center_N' is known."
        )
    if original["vision_output_token"] != "patch":
        raise ValueError(f"{file}: vision_output_token is {original['vision_output_token']!r}; only 'patch' is known.")


def text_config_of(original: dict, file: str) -> PreTrainedConfig:
    """
    The language model's own configuration.

    Raises:
        ValueError: a field that its class refuses.
    """
    model_type = original["model_type"].removeprefix(PREFIX)
    config_class = CONFIG_MAPPING[model_type]
    own = {field.name for field in fields(config_class)} | LEGACY_TEXT_FIELDS
    values = {name: value for name, value in original.items() if name in own - FIELDS_OF_THE_FILE}
    if values.get("rope_scaling") is None:
        values.pop("rope_scaling", None)
    if model_type == "phi3":
        # The window of phi3's configuration had no effect on the model as it was trained.
        values["sliding_window"] = None
    try:
        return config_class(**values)
    except (StrictDataclassError, TypeError, KeyError) as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from error


def build_config(
    original: dict,
    tensors: dict[str, LazyTensor],
    text_config: PreTrainedConfig,
    image_token_id: int,
    vision_heads: int | None,
    qformer_heads: int | None,
    file: str,
) -> ETChatConfig:
    """
    Our configuration of an original checkpoint.

    Args:
        original (`dict`): its config.json, as [`check_original`] accepts it.
        tensors (`dict[str, LazyTensor]`): its tensors, under the original names.
        text_config (`PreTrainedConfig`): see [`text_config_of`].
        image_token_id (`int`): id of the placeholder in our tokenizer.
        vision_heads, qformer_heads (`int`, *optional*): attention heads; by default width / 88 and width / 64.
        file (`str`): name of config.json, for messages.

    Raises:
        ValueError: tensors or head counts that no configuration fits; the message names them.
    """
    vision = _vision_config(original, tensors, vision_heads, file)
    sizes = {"vision_config": vision}
    if original["mm_projector"] == "qformer":
        sizes["qformer_config"] = _qformer_config(tensors, qformer_heads, vision.hidden_size)
        sizes["num_query_tokens"] = _tensor(tensors, "model.qformer_query").shape[1]
    try:
        return ETChatConfig(
            **sizes,
            text_config=text_config,
            image_token_id=image_token_id,
            projector_type=original["mm_projector"],
            use_matching=original["use_matching"],
            match_token_id=original["match_token_id"] if original["use_matching"] else None,
            bi_attention=original["bi_attention"],
            use_time_tag=original["use_time_tag"],
            alpha=original["alpha"],
            dtype=_tensor(tensors, "model.embed_tokens.weight").dtype,
            architectures=["ETChatForConditionalGeneration"],
        )
    except (StrictDataclassError, ValueError) as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from error


def restore_original(config: ETChatConfig, dtype: torch.dtype) -> dict:
    """The config.json of an original checkpoint, from the one that ours was converted from and what changed since."""
    original = dict(config.original_checkpoint["config"])
    current = {
        "alpha": config.alpha,
        "bi_attention": config.bi_attention,
        "mm_projector": config.projector_type,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_matching": config.use_matching,
        "use_time_tag": config.use_time_tag,
    }
    if config.use_matching:
        # Without matching, the rows that conversion may have added for <vid> go again.
        current |= {"match_token_id": config.match_token_id, "vocab_size": config.text_config.vocab_size}
    return original | current


def num_stored_blocks(names) -> int:
    """Blocks of the vision encoder that a checkpoint with these original names holds."""
    return _count(names, f"{EVA}.blocks.*.**")


def num_used_blocks(depth: int, output_layer: int) -> int:
    """Blocks that are run, of an encoder of that depth, to reach the output layer (negative: from the end)."""
    return depth + output_layer + 1 if output_layer < 0 else output_layer + 1


def _vision_config(original: dict, tensors: dict, heads: int | None, file: str) -> InstructBlipVisionConfig:
    width = _tensor(tensors, f"{EVA}.cls_token").shape[-1]
    tokens = _tensor(tensors, f"{EVA}.pos_embed").shape[1]
    patch_size = _tensor(tensors, f"{EVA}.patch_embed.proj.weight").shape[-1]
    depth, layer = num_stored_blocks(tensors), original["vision_output_layer"]
    if (layer >= 0 or width == VISION_WIDTH) and depth != num_used_blocks(VISION_DEPTH, layer):
        raise ValueError(f"{file}: vision_output_layer is {layer}, but {depth} vision blocks are to be used.")
    image_size = math.isqrt(tokens - 1) * patch_size
    if image_size_of(original) != image_size:
        raise ValueError(
            f"{file}: vision_processor is {original['vision_processor']!r}, but the position embedding of {tokens} "
            f"tokens is for 'clip_center_{image_size}'."
        )
    return InstructBlipVisionConfig(
        hidden_size=width,
        intermediate_size=_tensor(tensors, f"{EVA}.blocks.0.mlp.fc1.weight").shape[0],
        num_hidden_layers=depth,
        num_attention_heads=_heads(width, heads, VISION_HEAD_WIDTH, "--vision-heads"),
        image_size=image_size,
        patch_size=patch_size,
    )


def _qformer_config(tensors: dict, heads: int | None, vision_width: int) -> InstructBlipQFormerConfig:
    vocab_size, width = _tensor(tensors, f"{BERT}.embeddings.word_embeddings.weight").shape
    layers = _count(tensors, f"{BERT}.encoder.layer.*.**")
    cross_attention = f"{BERT}.encoder.layer.{{}}.crossattention.self.query.weight"
    crossing = [layer for layer in range(layers) if cross_attention.format(layer) in tensors]
    return InstructBlipQFormerConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=_heads(width, heads, QFORMER_HEAD_WIDTH, "--qformer-heads"),
        intermediate_size=_tensor(tensors, f"{BERT}.encoder.layer.0.intermediate_query.dense.weight").shape[0],
        max_position_embeddings=_tensor(tensors, f"{BERT}.embeddings.position_embeddings.weight").shape[0],
        cross_attention_frequency=crossing[1] if len(crossing) > 1 else layers,
        encoder_hidden_size=vision_width,
    )


def _tensor(tensors: dict[str, LazyTensor], name: str) -> LazyTensor:
    if name not in tensors:
        files = sorted({tensor.file for tensor in tensors.values()})
        raise ValueError(f"{', '.join(files)}: {name} is missing.")
    return tensors[name]


def _count(names, pattern: str) -> int:
    indices = (translate(name, pattern, "*") for name in names)
    return 1 + max((int(index) for index in indices if index is not None), default=-1)


def _heads(width: int, heads: int | None, head_width: int, option: str) -> int:
    if heads is None and width % head_width:
        raise ValueError(
            f"{option} is needed: width {width} is no multiple of {head_width}, the usual width of a head."
        )
    heads = width // head_width if heads is None else heads
    if heads < 1 or width % heads:
        raise ValueError(f"{option} {heads} does not divide the width {width}.")
    return heads
