"""The model of the speed claims, with random weights, and inputs for it.

Mid-size is for CPUs: vision 384 wide x 12 layers at 224 pixels, Q-Former 256 x 6, language model (Phi-3) 512 x 8,
vocabulary 32064. Full size is the published Phi-3-mini model, for GPUs.
"""

import argparse

import torch

from etchat_hf import ETChatConfig, ETChatForConditionalGeneration

VID, IMAGE, VOCAB = 32011, 32012, 32064
FRAMES, SIZE = 32, 224
QUESTION_WORDS = 12


def config(full_size: bool = False, **overrides) -> ETChatConfig:
    """
    Args:
        full_size (`bool`): the published model instead of the mid-size one.
        overrides: fields of [`ETChatConfig`] that differ.
    """
    if full_size:
        parts = {"qformer_config": {"vocab_size": 30523} | _NO_DROPOUT}
    else:
        vision = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
        qformer = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 1024}
        text = {"model_type": "phi3", "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8}
        text |= {"num_key_value_heads": 8, "intermediate_size": 1408, "vocab_size": VOCAB, "pad_token_id": 0}
        text |= {"bos_token_id": 1, "eos_token_id": 2}
        parts = {
            "vision_config": vision | {"image_size": SIZE, "patch_size": 14},
            "qformer_config": qformer | {"vocab_size": 30523} | _NO_DROPOUT,
            "text_config": text,
        }
    return ETChatConfig(**(parts | {"match_token_id": VID, "image_token_id": IMAGE} | overrides))


# Training compares losses: they must not depend on what is dropped.
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def build_model(
    full_size: bool = False, device: str = "cpu", attn_implementation: str | None = None, **overrides
) -> ETChatForConditionalGeneration:
    """
    Args:
        full_size (`bool`): the published size, in bfloat16, instead of mid-size in float32.
        device (`str`): where it is put.
        attn_implementation (`str`, *optional*): attention backend; by default transformers' choice.
        overrides: fields of [`ETChatConfig`] that differ.

    Returns:
        [`ETChatForConditionalGeneration`] in evaluation mode, the same random weights each time.
    """
    settings = config(full_size, **overrides)
    settings._attn_implementation = attn_implementation
    torch.manual_seed(0)
    if full_size:
        settings.dtype = torch.bfloat16
        with torch.device(device):
            return ETChatForConditionalGeneration._from_config(settings, dtype=torch.bfloat16).eval()
    return ETChatForConditionalGeneration(settings).to(device).eval()


def build_inputs(
    model: ETChatForConditionalGeneration, clips: int = 1, frames: int = FRAMES, text: int = 64, seed: int = 0
) -> dict:
    """
    Args:
        model ([`ETChatForConditionalGeneration`]): whose sizes, device and dtype the inputs fit.
        clips (`int`): rows of the batch, each with a clip of its own.
        frames (`int`): of each clip, 1 s apart.
        text (`int`): tokens of each row beside its frames.
        seed (`int`): of what is shown and asked.

    Returns:
        `dict`: arguments of `forward` and `generate`.
    """
    draw = torch.Generator().manual_seed(seed)
    before = text // 2
    ids = torch.randint(3, 32000, (clips, text + frames), generator=draw)
    ids[:, before : before + frames] = IMAGE
    words = torch.randint(1000, 30000, (clips, QUESTION_WORDS), generator=draw)
    size = model.config.vision_config.image_size
    pixels = torch.randn(clips * frames, 3, size, size, generator=draw)
    return {
        "input_ids": ids.to(model.device),
        "attention_mask": torch.ones_like(ids).to(model.device),
        "pixel_values": pixels.to(model.device, model.dtype),
        "frame_times": [[float(second) for second in range(frames)]] * clips,
        "placeholder_clips": [[clip] for clip in range(clips)],
        "qformer_input_ids": words.to(model.device),
        "qformer_attention_mask": torch.ones_like(words).to(model.device),
    }


def encoded(model: ETChatForConditionalGeneration, inputs: dict, seed: int = 0) -> dict:
    """The inputs with features in place of pixels: random ones, since nothing depends on what they show."""
    settings = model.config.vision_config
    patches = (settings.image_size // settings.patch_size) ** 2
    frames = len(inputs["pixel_values"])
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(frames, patches, settings.hidden_size, generator=draw).to(model.device, model.dtype)
    return {key: value for key, value in inputs.items() if key != "pixel_values"} | {"vision_features": features}


def build_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks of the model share; see [`parse`]."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--full-size", action="store_true", help="the published model in bfloat16, for a GPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU; one is measured by its processor time")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses the command line, and takes as many threads as it says."""
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options
