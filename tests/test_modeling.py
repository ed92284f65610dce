"""The forward pass; that its figures are the original's is for test_parity.py."""

import math

import pytest
import torch
from tiny import FAMILIES, IMAGE, VID, tiny_batch, tiny_config, tiny_model

from etchat_hf import ETChatForConditionalGeneration
from etchat_hf.modeling_etchat import FrameLayout


def with_targets(batch: dict) -> tuple[dict, torch.Tensor]:
    """A right-padded batch of three whose first and last rows end in a `<vid>` target; the first holds one more."""
    ids, lengths = batch["input_ids"], batch["attention_mask"].sum(1)
    labels = torch.full_like(ids, -100)
    ids[0, 2] = VID
    for row in (0, 2):
        end = lengths[row]
        ids[row, end - 1] = VID
        labels[row, end - 2 : end] = ids[row, end - 2 : end]
    labels[1, lengths[1] - 1] = ids[1, lengths[1] - 1]
    return batch | {"vid_times": [[1.4, 99.0], [], [2.2]]}, labels


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_batched_logits_equal_single_ones(family, side):
    model, batch = tiny_model(family), tiny_batch(range(4), side)
    with torch.no_grad():
        together = model(**batch).logits
        for row in range(4):
            alone = model(**tiny_batch([row])).logits[0]
            attended = batch["attention_mask"][row].bool()
            torch.testing.assert_close(together[row][attended], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["phi3", "llama", "qwen2"])
@pytest.mark.parametrize("bi_attention", [True, False])
def test_sdpa_equals_eager(family, bi_attention):
    batch = tiny_batch(range(4))
    logits = [
        tiny_model(family, backend, bi_attention=bi_attention)(**batch).logits.detach()
        for backend in ("eager", "sdpa")
    ]
    attended = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[0][attended], logits[1][attended], atol=1e-4, rtol=1e-4)


def test_gemma2_scales_frame_embeddings_too():
    model, batch = tiny_model("gemma2"), tiny_batch([0])
    features = model.get_vision_features(batch["pixel_values"])
    rows = len(features), -1
    texts, mask = batch["qformer_input_ids"].expand(rows), batch["qformer_attention_mask"].expand(rows)
    frames = model.model.get_frame_embeds(features, texts, mask)
    merged = model(**batch).frame_embeds[0]
    torch.testing.assert_close(merged, frames * math.sqrt(64), atol=1e-4, rtol=1e-4)


def test_frames_of_a_placeholder_see_each_other_and_nothing_else_is_open():
    """Changing the last frame changes the first frame's output, but no text before the block."""
    for bi_attention in (True, False):
        model, batch = tiny_model(bi_attention=bi_attention), tiny_batch([0])
        changed = batch | {"pixel_values": batch["pixel_values"].clone()}
        changed["pixel_values"][-1] += 1.0
        with torch.no_grad():
            difference = (model(**batch).logits - model(**changed).logits).abs().amax(-1)[0]
        first = int((batch["input_ids"][0] == IMAGE).nonzero()[0])
        assert float(difference[:first].max()) == 0.0
        assert (float(difference[first]) > 1e-4) == bi_attention


def test_attention_blocks_are_where_the_original_has_them():
    """As golden phi3_window/train_multi shows: 28 text tokens, a clip of 5, 24 text tokens, the same clip again."""
    pieces = [torch.full((28,), 5), torch.full((5,), IMAGE), torch.full((24,), 5), torch.full((5,), IMAGE)]
    row = torch.cat(pieces)
    ids, mask = torch.zeros(2, len(row) + 3, dtype=torch.long), torch.zeros(2, len(row) + 3, dtype=torch.long)
    ids[0, 3:], mask[0, 3:] = row, 1
    ids[1, : len(row)], mask[1, : len(row)] = row, 1
    layout = FrameLayout.locate(ids, mask, IMAGE, [[0.0, 1.0, 2.0, 3.0, 4.0]], [[0, 0], [0, 0]])
    starts, ends = layout.blocks
    assert starts.tolist() == [[31, 27], [28, 24]]
    assert ends.tolist() == [[36, 32], [33, 29]]
    assert layout.positions.tolist() == [[60, 61, 62, 63, 64], [57, 58, 59, 60, 61]]


def test_loss_is_the_formula():
    """SPEC 1.4: cross entropy against alpha ** -|i - t|, mean over a sample's targets, then over the samples."""
    model = tiny_model()
    batch, labels = with_targets(tiny_batch(range(3), "right"))
    outputs = model(**batch, labels=labels)
    scores = outputs.match_scores
    expected = []
    for row, (target, frames) in enumerate([(4.0, 5), (2.2 / 1.5, 4)]):  # 99 s is clamped to the last of 5 frames
        log_probs = (scores[row, :frames] / math.sqrt(64)).log_softmax(-1)
        weights = torch.tensor([2.0 ** -abs(frame - target) for frame in range(frames)])
        expected.append(-(weights * log_probs).sum())
        assert torch.isneginf(scores[row, frames:]).all()
    torch.testing.assert_close(outputs.match_loss, torch.stack(expected).mean())
    shifted = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(outputs.lm_loss, shifted)
    torch.testing.assert_close(outputs.loss, outputs.lm_loss + outputs.match_loss)


def test_vid_in_the_prompt_carries_its_frame():
    model, batch = tiny_model(), tiny_batch([0])
    batch["input_ids"][0, -2] = VID
    with torch.no_grad():
        near, same, far = (model(**batch, vid_times=[[time]]).logits[0, -1] for time in (1.6, 1.4, 4.4))
    assert torch.equal(near, same)
    assert float((near - far).abs().max()) > 1e-4


def test_ties_between_frames_round_to_even():
    """At 1 fps frame = round(t), as numpy and Python round."""
    model, batch = tiny_model(), tiny_batch([0]) | {"frame_times": [[0.0, 1.0, 2.0, 3.0, 4.0]]}
    batch["input_ids"][0, -2:] = VID
    outputs = model(**batch, vid_times=[[2.5, 3.5]])
    assert outputs.vid_frames[0, -2:].round().tolist() == [2.0, 4.0]


def test_gradients_reach_all_trainable_parameters_and_no_others():
    model = tiny_model()
    batch, labels = with_targets(tiny_batch(range(3), "right"))
    model(**batch, labels=labels).loss.backward()
    idle = "qformer.encoder.layer.1."  # the last block's text half, which feeds nothing
    for name, parameter in model.named_parameters():
        frozen = name.startswith("model.vision_tower") or f"{idle}intermediate." in name or f"{idle}output." in name
        assert parameter.requires_grad == (not frozen), name
        assert (parameter.grad is not None) == (not frozen), name


def test_heads_take_part_without_targets():
    model = tiny_model()
    ids = torch.randint(3, 90, (2, 7))
    outputs = model(input_ids=ids, labels=ids)
    outputs.loss.backward()
    assert float(outputs.match_loss.abs()) == 0.0
    assert model.vid_head[1].weight.grad is not None and model.frm_head[1].weight.grad is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_nothing(family):
    model = tiny_model(family).train()
    batch, labels = with_targets(tiny_batch(range(3), "right"))
    losses, gradients = [], []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        loss = model(**batch, labels=labels).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(losses[0], losses[1])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_save_load_and_resize(family, tmp_path):
    model, batch = tiny_model(family), tiny_batch([0, 1])
    model.save_pretrained(tmp_path)
    loaded, info = ETChatForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    logits = model(**batch).logits
    assert torch.equal(loaded(**batch).logits, logits)
    loaded.resize_token_embeddings(140)
    assert loaded.config.text_config.vocab_size == 140
    torch.testing.assert_close(loaded(**batch).logits[..., :128], logits, atol=1e-5, rtol=1e-5)
    tied = loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert tied == model.config.text_config.tie_word_embeddings


def test_frame_features_can_be_encoded_once():
    model, batch = tiny_model(), tiny_batch(range(2))
    expected = model(**batch).logits
    features = model.get_vision_features(batch.pop("pixel_values"))
    assert not features.requires_grad
    torch.testing.assert_close(model(**batch, vision_features=features).logits, expected)


def test_one_clip_serves_several_questions():
    model = tiny_model()
    one, other = tiny_batch([0]), tiny_batch([0])
    other["qformer_input_ids"] = other["qformer_input_ids"] + 1
    texts = torch.cat([one["qformer_input_ids"], other["qformer_input_ids"]])
    both = one | {
        "input_ids": one["input_ids"].repeat(2, 1),
        "attention_mask": one["attention_mask"].repeat(2, 1),
        "placeholder_clips": [[0], [0]],
        "qformer_input_ids": texts,
        "qformer_attention_mask": torch.ones_like(texts),
    }
    logits = model(**both).logits
    for row, single in enumerate((one, other)):
        torch.testing.assert_close(logits[row], model(**single).logits[0], atol=1e-5, rtol=1e-5)


def test_questions_share_the_frames_of_their_clips():
    """Three rows about two clips, one of which names both: each frame passes the keys once, all values are right."""
    model, singles = tiny_model(), [tiny_batch([row]) for row in (0, 1)]
    features = [model.get_vision_features(batch["pixel_values"]) for batch in singles]
    clips, texts = [0, 1, 0, 1], torch.randint(1, 50, (4, 6), generator=torch.Generator().manual_seed(0))
    sizes = [len(clip) for clip in features]
    ids = [torch.full((2 + sizes[clip],), IMAGE) for clip in clips]
    for piece in ids:
        piece[:2] = 5
    rows = [ids[0], torch.cat(ids[1:3]), ids[3]]
    longest = max(map(len, rows))
    batch = {
        "input_ids": torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows]),
        "vision_features": torch.cat(features),
        "frame_times": [batch["frame_times"][0] for batch in singles],
        "placeholder_clips": [[0], [1, 0], [1]],
        "qformer_input_ids": texts,
        "qformer_attention_mask": torch.ones_like(texts),
    }
    seen = []
    key = model.model.compressor.qformer.encoder.layer[0].crossattention.attention.key
    key.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    layout = FrameLayout.locate(batch["input_ids"], None, IMAGE, batch["frame_times"], batch["placeholder_clips"])
    with torch.no_grad():
        together = model.model.get_frame_embeds(
            batch["vision_features"],
            texts[layout.text_index],
            torch.ones_like(texts)[layout.text_index],
            layout.frame_index,
        )
        assert seen == [sum(sizes)]
        expected = [
            model.model.get_frame_embeds(features[clip], *(text.expand(sizes[clip], -1),) * 2)
            for clip, text in zip(clips, texts, strict=True)
        ]
        model(**batch)
        assert seen[-1] == sum(sizes)
    torch.testing.assert_close(together, torch.cat(expected), atol=1e-5, rtol=1e-5)


def test_frames_are_encoded_and_compressed_chunk_by_chunk(monkeypatch):
    model = tiny_model()
    pixels, texts = torch.randn(7, 3, 28, 28), torch.randint(1, 50, (12, 6))
    index = torch.tensor([0, 1, 2, 3, 4, 5, 6, 3, 4, 0, 6, 6])
    features = model.get_vision_features(pixels)
    with torch.no_grad():
        expected = model.model.get_frame_embeds(features, texts, torch.ones_like(texts), index)
    monkeypatch.setattr("etchat_hf.modeling_etchat.CHUNK_FRAMES", 3)
    monkeypatch.setattr("etchat_hf.modeling_etchat.CPU_CHUNK_FRAMES", 3)
    sizes = []
    for module in (model.model.vision_tower, model.model.compressor.projector):
        module.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    torch.testing.assert_close(model.get_vision_features(pixels), features, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        chunked = model.model.get_frame_embeds(features, texts, torch.ones_like(texts), index)
    assert sizes == [3, 3, 1, *(2, 1, 1, 2, 2, 1, 3)]  # so few frames that their questions are about three
    torch.testing.assert_close(chunked, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_attentions_are_those_of_the_language_model(family):
    model, ids = tiny_model(family, "eager"), torch.randint(3, 90, (2, 7))
    wanted = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        ours, theirs = model(ids, **wanted), model.model.language_model(ids, **wanted)
        plain = model(ids)
        model.config.output_hidden_states = model.config.output_attentions = True
        configured = model(ids)
    for outputs in (ours, configured):
        assert len(outputs.attentions) == 3 and len(outputs.hidden_states) == 4
        for name in ("attentions", "hidden_states"):
            for a, b in zip(outputs[name], theirs[name], strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert plain.attentions is None and plain.hidden_states is None


def test_time_tag_takes_a_text_per_frame():
    model, batch = tiny_model(use_time_tag=True), tiny_batch([0, 1])
    with pytest.raises(ValueError, match="2 texts for 8 frames"):
        model(**batch)
    batch["qformer_input_ids"] = torch.randint(1, 50, (8, 6))
    batch["qformer_attention_mask"] = torch.ones(8, 6, dtype=torch.long)
    assert model(**batch).logits.isfinite().all()


def test_pooled_projector_needs_no_text():
    model, batch = tiny_model(projector_type="mlp2x_gelu"), tiny_batch([0, 1])
    expected = model(**batch).logits
    del batch["qformer_input_ids"], batch["qformer_attention_mask"]
    assert torch.equal(model(**batch).logits, expected)


def _break(batch: dict, **changes) -> dict:
    return {key: value for key, value in (batch | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frame_times": [[0.0, 1.0]]}, r"\[5\] placeholder tokens, but their clips have \[2\] frames"),
        ({"frame_times": None, "placeholder_clips": None}, r"clips have \[0\] frames"),
        ({"pixel_values": None}, "neither pixel_values nor vision_features"),
        ({"pixel_values": torch.zeros(4, 3, 28, 28)}, "only 4 were passed"),
        ({"qformer_input_ids": None, "qformer_attention_mask": None}, "qformer_input_ids"),
        ({"qformer_input_ids": torch.ones(2, 3, dtype=torch.long)}, "2 texts for 1 placeholder"),
        ({"vid_times": [[1.0]]}, r"\[0\] <vid> tokens, but vid_times gives \[1\]"),
        ({"inputs_embeds": torch.zeros(1, 3, 64)}, "exactly one of input_ids and inputs_embeds"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(**_break(tiny_batch([0]), **changes))


def test_labels_without_input_ids_are_refused():
    embeds, labels = torch.randn(1, 5, 64), torch.full((1, 5), VID)
    with pytest.raises(ValueError, match="match loss finds its frames by input_ids"):
        tiny_model()(inputs_embeds=embeds, labels=labels)
    plain = tiny_model(use_matching=False, match_token_id=None)
    assert plain(inputs_embeds=embeds, labels=labels).loss.isfinite()


def test_times_without_matching_are_refused():
    with pytest.raises(ValueError, match="without <vid> matching"):
        tiny_model(use_matching=False, match_token_id=None)(**tiny_batch([0]), vid_times=[[1.0]])


def test_a_vid_without_a_clip_is_refused():
    with pytest.raises(ValueError, match="no clip"):
        tiny_model()(input_ids=torch.tensor([[5, VID, 6]]), vid_times=[[1.0]])


def test_flash_attention_is_refused_where_it_would_drop_frame_blocks():
    with pytest.raises(ValueError, match="frame blocks"):
        tiny_model(attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match="frame blocks"):
        tiny_model().set_attn_implementation("flash_attention_2")
    config = tiny_config()
    model = ETChatForConditionalGeneration(config)
    model.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="frame blocks"):
        model(**tiny_batch([0]))
