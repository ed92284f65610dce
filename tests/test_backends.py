"""Attention backends, compiled decoding, and the two modes that crash in the original: used, and trained."""

import pytest
import torch
from tiny import VID, generate, tiny_batch, tiny_model
from transformers import CompileConfig


def test_flex_attention_has_the_frame_blocks():
    batch = tiny_batch(range(4), "right")
    with torch.no_grad():
        flex, sdpa = (tiny_model("phi3", backend)(**batch).logits for backend in ("flex_attention", "sdpa"))
    attended = batch["attention_mask"].bool()
    torch.testing.assert_close(flex[attended], sdpa[attended], atol=1e-4, rtol=1e-4)


def test_the_decode_step_compiles_whole(monkeypatch):
    """A static cache and one graph for all steps, without breaks, give what plain decoding gives."""
    model, batch = tiny_model(), tiny_batch(range(2))
    expected = generate(model, batch)
    config = CompileConfig(fullgraph=True, mode="default", dynamic=False)
    config._compile_all_devices = True  # transformers compiles on GPUs only unless it is told to
    monkeypatch.setattr("torch._dynamo.config.error_on_recompile", True)
    compiled = generate(model, batch, cache_implementation="static", compile_config=config)
    assert torch.equal(compiled.sequences, expected.sequences)
    for ours, theirs in zip(compiled.matches, expected.matches, strict=True):
        assert [match.frame for match in ours] == [match.frame for match in theirs]


@pytest.mark.parametrize(
    "mode", [{"use_time_tag": True}, {"projector_type": "mlp2x_gelu"}], ids=["time tag", "pooled"]
)
def test_modes_that_crash_in_the_original_learn(mode):
    model, batch = tiny_model(**mode).train(), tiny_batch(range(2), "right")
    if mode.get("use_time_tag"):
        batch["qformer_input_ids"] = torch.randint(1, 50, (8, 6), generator=torch.Generator().manual_seed(0))
        batch["qformer_attention_mask"] = torch.ones(8, 6, dtype=torch.long)
    lengths = batch["attention_mask"].sum(1)
    labels = torch.full_like(batch["input_ids"], -100)
    for row, length in enumerate(lengths):
        batch["input_ids"][row, length - 1] = labels[row, length - 1] = VID
    batch["vid_times"] = [[3.0], [1.5]]
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(30):
        outputs = model(**batch, labels=labels)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((outputs.lm_loss.detach(), outputs.match_loss.detach()))
    (first_lm, first_match), (last_lm, last_match) = losses[0], losses[-1]
    assert last_lm < 0.1 * first_lm and last_match < first_match
    assert outputs.match_scores.argmax(-1).tolist() == [2, 1]
    answer = generate(model.eval(), batch | {"vid_times": [[3.0], [1.5]]})
    assert all(len(matches) >= 2 for matches in answer.matches)
