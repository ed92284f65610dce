"""Which parameters a tuning mode trains, and LoRA on the language model.

Names are those of [`ETChatForConditionalGeneration`]; `plain_name` takes away what PEFT adds to them.
"""

import re

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from ..modeling_etchat import ETChatForConditionalGeneration

COMPRESSOR = "model.compressor."
QFORMER = "model.compressor.qformer."
PROJECTOR_MODULES = ("query_projection", "aggregator_query", "aggregator_key", "projector")
MATCHING_MODULES = ("vid_head", "frm_head", "embed_tokens", "lm_head")
TUNING_MODES = ("projector", "attention", "qformer", "llm")

# Anchored to the language model: the vision encoder and the Q-Former have layers of these names too.
LORA_TARGETS = {
    "attention": r"model\.language_model\.layers\.\d+\.self_attn\.\w+_proj",
    "linear": r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj",
}


def plain_name(name: str) -> str:
    """A parameter's name in the model without PEFT."""
    return re.sub(r"\.(modules_to_save\.default|base_layer)(?=\.)", "", name.removeprefix("base_model.model."))


def is_trained(name: str, tuning_mode: str, use_matching: bool, num_qformer_layers: int) -> bool:
    """
    Whether a tuning mode trains the parameter of that plain name.

    Args:
        name (`str`): see [`plain_name`].
        tuning_mode (`str`): one of `TUNING_MODES`.
        use_matching (`bool`): whether `<vid>` is matched, which trains heads and embeddings in every mode.
        num_qformer_layers (`int`): blocks of the Q-Former, of whose last one the text half feeds nothing.
    """
    if name.startswith("model.vision_tower."):
        return False
    if re.match(rf"{re.escape(QFORMER)}encoder\.layer\.{num_qformer_layers - 1}\.(intermediate|output)\.", name):
        return False  # no gradient ever reaches it
    if use_matching and any(f".{module}." in f".{name}" for module in MATCHING_MODULES):
        return True
    if tuning_mode == "llm":
        return True
    if not name.startswith(COMPRESSOR):
        return False
    if name.startswith(f"{COMPRESSOR}layers."):  # the pooled projector is nothing but a projector
        return True
    if tuning_mode == "projector":
        return name.removeprefix(COMPRESSOR).split(".")[0] in PROJECTOR_MODULES
    return tuning_mode == "qformer" or not name.startswith(QFORMER) or "attention" in name


def add_lora(
    model: ETChatForConditionalGeneration,
    targets: str,
    tuning_mode: str,
    r: int,
    alpha: int,
    dropout: float,
    base: str | None = None,
) -> PeftModel:
    """
    Wraps a model by PEFT: LoRA on the language model, and copies of the modules that are trained beside it.

    Args:
        model ([`ETChatForConditionalGeneration`]): changed in place.
        targets (`str`): key of `LORA_TARGETS`.
        tuning_mode (`str`): one of `TUNING_MODES`.
        r, alpha (`int`), dropout (`float`): of LoRA.
        base (`str`, *optional*): folder or Hub id that adapters will name as their base.
    """
    modules = ["compressor"]
    if tuning_mode == "projector" and model.config.projector_type == "qformer":
        modules = [f"compressor.{name}" for name in PROJECTOR_MODULES]
    if model.config.use_matching:
        modules += MATCHING_MODULES
    lora = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        bias="none",
        target_modules=LORA_TARGETS[targets],
        modules_to_save=modules,
        ensure_weight_tying=bool(model.config.tie_word_embeddings and model.config.use_matching),
        base_model_name_or_path=base,
    )
    return get_peft_model(model, lora)


def set_trained(model: nn.Module, tuning_mode: str) -> None:
    """
    Marks the parameters that a tuning mode trains, and holds them in float32; all others are frozen.

    Args:
        model ([`ETChatForConditionalGeneration`] or `PeftModel`): changed in place.
        tuning_mode (`str`): one of `TUNING_MODES`.
    """
    config = model.config
    for name, parameter in model.named_parameters():
        trained = "lora_" in name or (
            ".original_module." not in name
            and is_trained(plain_name(name), tuning_mode, config.use_matching, config.qformer_config.num_hidden_layers)
        )
        # A LoRA layer's own base stays as it is, also in a language model that is trained otherwise.
        parameter.requires_grad_(trained and ".base_layer." not in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
