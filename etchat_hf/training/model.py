"""The model that a stage starts from: loaded, given matching where it is wanted, wrapped for its tuning mode."""

import os
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import BitsAndBytesConfig

from ..configuration_etchat import ETChatConfig
from ..conversion.tokens import build_generation_config
from ..data import StageData
from ..inference import check_complete, check_is_converted
from ..modeling_etchat import ETChatForConditionalGeneration
from ..processing_etchat import VID_TOKEN, ETChatProcessor
from .arguments import ETChatModelArguments
from .checkpoints import ADAPTER_CONFIG
from .tuning import add_lora, set_trained


def load_processor(path: str, stage: StageData) -> ETChatProcessor:
    """
    The processor of a base model, with the stage's chat template and frame rate.

    Raises:
        OSError: if there is no such model.
        ValueError: if it is none that a stage can start from.
    """
    check_is_converted(path)
    if (Path(path) / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{path}: a LoRA checkpoint; start from the stage's merged model, the folder above it.")
    processor = ETChatProcessor.from_pretrained(path)
    stage.configure(processor)
    return processor


def load_model(
    arguments: ETChatModelArguments, processor: ETChatProcessor, stage: StageData
) -> ETChatForConditionalGeneration | PeftModel:
    """
    Loads what a stage trains.

    Args:
        arguments ([`ETChatModelArguments`]): see there.
        processor ([`ETChatProcessor`]): the base model's.
        stage ([`StageData`]): says the conversation type, the frame rate, and whether `<vid>` is matched to frames. If
            so, heads that the base lacks start fresh, and a `<vid>` without an embedding row gets the others' mean.

    Returns:
        [`ETChatForConditionalGeneration`], or with LoRA a `PeftModel` around it; only what is trained requires
        gradients.

    Raises:
        ValueError: if `<vid>` is not what the base model was made for, or its tensors are not exactly the model's.
        OSError: if there is no such model.
    """
    path = arguments.model_name_or_path
    config = ETChatConfig.from_pretrained(path)
    if stage.use_matching:
        check_vid_token(config, processor, path)
    elif config.use_matching:
        raise ValueError(f"{path}: matches <vid>, but the data have none; train from a stage before matching.")
    try:
        model, info = ETChatForConditionalGeneration.from_pretrained(
            path,
            dtype=arguments.dtype,
            attn_implementation=arguments.attn_implementation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            quantization_config=_four_bits() if arguments.load_in_4bit else None,
        )
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be loaded: {error}") from error
    check_complete(path, info)
    if arguments.load_in_4bit:
        # What training writes is an adapter, for the base in any precision, and a merged model in full.
        del model.config.quantization_config
    if stage.use_matching and not config.use_matching:
        model.enable_matching(processor.match_token_id)
    for name in ("bi_attention", "use_time_tag"):
        if (value := getattr(arguments, name)) is not None:
            setattr(model.config, name, value)
    processor.use_time_tag = model.config.use_time_tag
    _follow_stage(model, processor, stage)
    model.config.validate_combinations()
    if arguments.lora_targets is not None:
        model = add_lora(
            model,
            arguments.lora_targets,
            arguments.tuning_mode,
            arguments.lora_r,
            arguments.lora_alpha,
            arguments.lora_dropout,
            # An adapter must find its base from every working directory.
            base=os.path.abspath(path) if os.path.isdir(path) else path,
        )
    set_trained(model, arguments.tuning_mode)
    return model


def _four_bits() -> BitsAndBytesConfig:
    """QLoRA's settings (https://arxiv.org/abs/2305.14314), for the language model alone."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["model.vision_tower", "model.compressor", "lm_head"],
    )


def _follow_stage(model: ETChatForConditionalGeneration, processor: ETChatProcessor, stage: StageData) -> None:
    """What a model remembers of its training beside weights: frame rate, end of a turn, original conversation type."""
    model.config.fps = stage.fps
    model.generation_config, _ = build_generation_config(
        processor.tokenizer, model.config.text_config, stage.conv_type
    )
    if "original_checkpoint" in vars(model.config):
        model.config.original_checkpoint["config"]["conv_type"] = stage.conv_type


def check_vid_token(config: ETChatConfig, processor: ETChatProcessor, name: str) -> None:
    """
    Checks that `<vid>` is one token of the tokenizer, and the one that the model knows.

    Raises:
        ValueError: if not; `name` says of which model.
    """
    vocabulary = processor.tokenizer.get_vocab()
    if VID_TOKEN not in vocabulary:
        raise ValueError(f"{name}: its tokenizer lacks {VID_TOKEN}, which matching needs; load it by ETChatProcessor.")
    if config.match_token_id is not None and config.match_token_id != vocabulary[VID_TOKEN]:
        raise ValueError(
            f"{name}: match_token_id is {config.match_token_id}, but its tokenizer gives {VID_TOKEN} the id "
            f"{vocabulary[VID_TOKEN]}; use the processor of this model."
        )


def stored_dtype(path: str) -> torch.dtype:
    """The dtype that a model's configuration names, float32 where it names none."""
    return ETChatConfig.from_pretrained(path).dtype or torch.float32
