"""A small random model of each language-model family, and batches for it."""

import torch
from transformers import LogitsProcessor

from etchat_hf import ETChatConfig, ETChatForConditionalGeneration

VID, IMAGE, VOCAB = 100, 101, 128
FAMILIES = ("phi3", "llama", "gemma2", "qwen2")
CLIPS = (5, 3, 4, 7)  # frames of the four samples' clips
TEXTS = (3, 9, 1, 5)  # how much text the four samples have around them


def tiny_config(family: str = "phi3", **overrides) -> ETChatConfig:
    text = {
        "model_type": family,
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,
        "tie_word_embeddings": family in ("gemma2", "qwen2"),
    }
    if family == "gemma2":
        text |= {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
    vision = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 96, "num_hidden_layers": 2}
    vision |= {"image_size": 28, "patch_size": 14, "initializer_range": 0.1}
    qformer = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    qformer |= {"vocab_size": 50, "initializer_range": 0.2, "hidden_dropout_prob": 0.0}
    qformer |= {"attention_probs_dropout_prob": 0.0}
    fields = {"vision_config": vision, "qformer_config": qformer, "text_config": text}
    fields |= {"match_token_id": VID, "image_token_id": IMAGE}
    return ETChatConfig(**(fields | overrides))


def tiny_model(family: str = "phi3", attn_implementation: str | None = None, **overrides):
    config = tiny_config(family, **overrides)
    config._attn_implementation = attn_implementation
    torch.manual_seed(1)
    return ETChatForConditionalGeneration(config).eval()


def _sample(index: int):
    draw = torch.Generator().manual_seed(index)
    before = torch.randint(3, 90, (4 + TEXTS[index],), generator=draw)
    after = torch.randint(3, 90, (2 + TEXTS[index],), generator=draw)
    ids = torch.cat([before, torch.full((CLIPS[index],), IMAGE), after])
    question = torch.randint(1, 50, (3 + index,), generator=draw)
    pixels = torch.randn(CLIPS[index], 3, 28, 28, generator=draw)
    return ids, question, pixels


def _pad(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids, mask = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(2))
    for row, values in enumerate(rows):
        place = slice(longest - len(values), None) if side == "left" else slice(len(values))
        ids[row, place], mask[row, place] = values, 1
    return ids, mask


def tiny_batch(samples, side: str = "left") -> dict:
    """Inputs of samples 0 to 3, whose frames are 1.5 s apart."""
    rows, questions, pixels = zip(*map(_sample, samples), strict=True)
    ids, mask = _pad(rows, side)
    texts, text_mask = _pad(questions, "right")
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.cat(pixels),
        "frame_times": [[1.5 * frame for frame in range(len(clip))] for clip in pixels],
        "placeholder_clips": [[row] for row in range(len(rows))],
        "qformer_input_ids": texts,
        "qformer_attention_mask": text_mask,
    }


class ForceVid(LogitsProcessor):
    """Makes `<vid>` the token of the second and fourth step."""

    def __init__(self, prompt_length: int):
        self.columns = {prompt_length + 1, prompt_length + 3}

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] not in self.columns:
            return scores
        return torch.full_like(scores, float("-inf")).index_fill(1, torch.tensor([VID]), 0.0)


def generate(model, batch: dict, **kwargs):
    """Eight greedy tokens with two forced `<vid>`, past any end of sequence."""
    return model.generate(
        **batch,
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=-1,
        logits_processor=[ForceVid(batch["input_ids"].shape[1])],
        return_dict_in_generate=True,
        output_logits=True,
        **kwargs,
    )
