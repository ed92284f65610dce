"""Where every parameter of an original checkpoint lives in ours: a table, and the few operations that are no renaming.

In a pattern `*` stands for one dotted part of a name and `**` for the rest of it. The first rule that matches wins,
in both directions: the same table converts and restores.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from .lazy_tensor import LazyTensor, join_qkv_bias, split_qkv_bias


@dataclass(frozen=True)
class Rule:
    """
    One line of the table.

    Args:
        original (`str` or `tuple[str, ...]`): pattern of the original name, or of the several that make one of ours.
        converted (`str`): pattern of our name.
        join (`Callable`): makes our tensor of the original ones.
        split (`Callable`): makes the tuple of original tensors of ours.
    """

    original: str | tuple[str, ...]
    converted: str
    join: Callable[..., LazyTensor] = lambda tensor: tensor
    split: Callable[[LazyTensor], tuple[LazyTensor, ...]] = lambda tensor: (tensor,)

    @property
    def originals(self) -> tuple[str, ...]:
        return (self.original,) if isinstance(self.original, str) else self.original


EVA = "model.vision_tower.vision_tower"
VIT = "model.vision_tower"
BERT = "model.qformer_bert.bert"
QFORMER = "model.compressor.qformer"

RULES = (
    # language model and heads
    Rule("model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
    Rule("model.layers.**", "model.language_model.layers.**"),
    Rule("model.norm.weight", "model.language_model.norm.weight"),
    Rule("lm_head.weight", "lm_head.weight"),
    Rule("vid_head.**", "vid_head.**"),
    Rule("frm_head.**", "frm_head.**"),
    # vision encoder
    Rule(f"{EVA}.cls_token", f"{VIT}.embeddings.class_embedding"),
    Rule(f"{EVA}.pos_embed", f"{VIT}.embeddings.position_embedding"),
    Rule(f"{EVA}.patch_embed.proj.*", f"{VIT}.embeddings.patch_embedding.*"),
    Rule(f"{EVA}.blocks.*.norm1.*", f"{VIT}.encoder.layers.*.layer_norm1.*"),
    Rule(f"{EVA}.blocks.*.attn.qkv.weight", f"{VIT}.encoder.layers.*.self_attn.qkv.weight"),
    Rule(
        (f"{EVA}.blocks.*.attn.q_bias", f"{EVA}.blocks.*.attn.v_bias"),
        f"{VIT}.encoder.layers.*.self_attn.qkv.bias",
        join_qkv_bias,
        split_qkv_bias,
    ),
    Rule(f"{EVA}.blocks.*.attn.proj.*", f"{VIT}.encoder.layers.*.self_attn.projection.*"),
    Rule(f"{EVA}.blocks.*.norm2.*", f"{VIT}.encoder.layers.*.layer_norm2.*"),
    Rule(f"{EVA}.blocks.*.mlp.**", f"{VIT}.encoder.layers.*.mlp.**"),
    # Q-Former
    Rule("model.qformer_query", "model.compressor.query_tokens"),
    Rule(f"{BERT}.embeddings.LayerNorm.*", f"{QFORMER}.embeddings.layernorm.*"),
    Rule(f"{BERT}.embeddings.*.weight", f"{QFORMER}.embeddings.*.weight"),
    Rule(f"{BERT}.encoder.layer.*.attention.self.**", f"{QFORMER}.encoder.layer.*.attention.attention.**"),
    Rule(f"{BERT}.encoder.layer.*.crossattention.self.**", f"{QFORMER}.encoder.layer.*.crossattention.attention.**"),
    Rule(f"{BERT}.encoder.layer.**", f"{QFORMER}.encoder.layer.**"),
    # aggregator and projector
    Rule("model.qformer_ln.*", "model.compressor.vision_layernorm.*"),
    Rule("model.qformer_proj.*", "model.compressor.query_projection.*"),
    Rule("model.qformer_q_proj.**", "model.compressor.aggregator_query.**"),
    Rule("model.qformer_k_proj.**", "model.compressor.aggregator_key.**"),
    Rule("model.qformer_v_proj.**", "model.compressor.projector.**"),
    Rule("model.mm_projector.**", "model.compressor.layers.**"),
)

POSITION_IDS = f"{BERT}.embeddings.position_ids"
EMBED_TOKENS = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"

# Keys of an original checkpoint that hold nothing to convert, and why.
LEFT_OUT = (
    (POSITION_IDS, "a constant buffer: 0, 1, 2, .."),
    ("model.layers.*.self_attn.rotary_emb.inv_freq", "a constant buffer, computed from the configuration"),
)

# The pieces that stage 1 starts from: their names -> those of an original checkpoint.
VISION_PIECE = (("**", f"{EVA}.**"),)
QFORMER_PIECE = (
    ("Qformer.bert.**", f"{BERT}.**"),
    ("ln_vision.*", "model.qformer_ln.*"),
    ("query_tokens", "model.qformer_query"),
)
VISION_PIECE_LEFT_OUT = (
    ("norm.*", "the final norm: frames are the raw patch features"),
    ("head.*", "the classifier"),
)
QFORMER_PIECE_LEFT_OUT = (("llm_proj.*", "the projector to another language model"),)

# Our parameters that no piece holds.
FRESH_IN_PIECES = (
    "model.compressor.query_projection.*",
    "model.compressor.aggregator_query.**",
    "model.compressor.aggregator_key.**",
    "model.compressor.projector.**",
)


@cache
def _regex(pattern: str) -> re.Pattern:
    wildcards = {"**": "(.+)", "*": r"([^.]+)"}
    parts = re.split(r"(\*\*|\*)", pattern)
    return re.compile("".join(wildcards.get(part) or re.escape(part) for part in parts))


def matches(name: str, pattern: str) -> bool:
    """Whether the whole of `name` fits `pattern`."""
    return _regex(pattern).fullmatch(name) is not None


def translate(name: str, pattern: str, to: str) -> str | None:
    """`name` with the parts that `pattern`'s wildcards stand for put into `to`'s; `None` where it does not fit."""
    match = _regex(pattern).fullmatch(name)
    if match is None:
        return None
    parts = iter(match.groups())
    return re.sub(r"\*\*|\*", lambda _: next(parts), to)


def reason_left_out(name: str, table: tuple[tuple[str, str], ...]) -> str | None:
    """Why `table` leaves `name` out, or `None`."""
    return next((reason for pattern, reason in table if matches(name, pattern)), None)


def originals_of(converted: str) -> tuple[Rule, tuple[str, ...]]:
    """
    The rule for one of our parameters, and the original names it is made of.

    Raises:
        ValueError: no rule covers the name.
    """
    for rule in RULES:
        if matches(converted, rule.converted):
            return rule, tuple(translate(converted, rule.converted, original) for original in rule.originals)
    raise ValueError(f"{converted}: the weight map has no rule for this parameter.")
