"""The rename table and the operations."""

import pytest
import torch

from etchat_hf.conversion.lazy_tensor import append_mean_rows, in_memory, join_qkv_bias, split_qkv_bias
from etchat_hf.conversion.weight_map import originals_of, translate


def test_wildcards():
    assert translate("a.3.b.weight", "a.*.b.**", "x.*.y.**") == "x.3.y.weight"
    assert translate("a.b.c", "**", "x.**") == "x.a.b.c"
    assert translate("a.3.5.b", "a.*.b", "x.*") is None
    assert translate("axb", "a.b", "c") is None


def test_an_unknown_parameter_is_an_error():
    with pytest.raises(ValueError, match="model.newcomer.weight"):
        originals_of("model.newcomer.weight")


def test_several_originals_make_one():
    rule, originals = originals_of("model.vision_tower.encoder.layers.7.self_attn.qkv.bias")
    prefix = "model.vision_tower.vision_tower.blocks.7.attn"
    assert originals == (f"{prefix}.q_bias", f"{prefix}.v_bias") and rule.join is join_qkv_bias


def test_qkv_bias_there_and_back():
    query, value = torch.randn(2, 4, dtype=torch.float16)
    joined = join_qkv_bias(in_memory(query, "q"), in_memory(value, "v"))
    assert joined.shape == (12,) and joined.load().dtype == torch.float16
    assert all(torch.equal(a.load(), b) for a, b in zip(split_qkv_bias(joined), (query, value), strict=True))


def test_mean_rows_keep_the_stored_ones_in_place():
    weight = torch.randn(5, 3, dtype=torch.bfloat16)
    stored, new = append_mean_rows(in_memory(weight, "w"), 2).row_blocks()
    assert stored.data_ptr() == weight.data_ptr()
    assert new.shape == (2, 3) and torch.equal(new[0], weight.float().mean(0).bfloat16())
