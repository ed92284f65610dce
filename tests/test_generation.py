import threading
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import FAMILIES, IMAGE, VID, generate, tiny_batch, tiny_model
from torch.overrides import TorchFunctionMode, resolve_name
from transformers import LogitsProcessor, Phi3ForCausalLM

from etchat_hf import ETChatGenerateOutput


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_gives_the_single_answers(family, side):
    model = tiny_model(family)
    batch = tiny_batch(range(4), side)
    together = generate(model, batch)
    start = batch["input_ids"].shape[1]
    for row in range(4):
        single = tiny_batch([row])
        alone = generate(model, single)
        assert torch.equal(together.sequences[row, start:], alone.sequences[0, single["input_ids"].shape[1] :])
        for step in range(8):
            torch.testing.assert_close(together.logits[step][row], alone.logits[step][0], atol=1e-4, rtol=1e-4)
        ours, theirs = together.matches[row], alone.matches[0]
        assert len(ours) >= 2 and [m.frame for m in ours] == [m.frame for m in theirs]


def test_matches_say_where_when_and_how_surely():
    model, batch = tiny_model(), tiny_batch(range(4))
    outputs = generate(model, batch)
    assert isinstance(outputs, ETChatGenerateOutput)
    assert outputs.prompt_length == batch["input_ids"].shape[1]
    for row, matches in enumerate(outputs.matches):
        columns = (outputs.sequences[row] == VID).nonzero().flatten().tolist()
        assert [match.position for match in matches] == columns
        for match in matches:
            assert match.seconds == batch["frame_times"][row][match.frame] == 1.5 * match.frame
            assert match.probabilities.shape == (len(batch["frame_times"][row]),)
            assert float(match.probabilities.sum()) == pytest.approx(1.0)
            assert int(match.probabilities.argmax()) == match.frame


def test_vid_is_fed_back_as_its_frame():
    """Decoding step by step equals one forward over the whole sequence with the matched times."""
    model, batch = tiny_model(), tiny_batch([3])
    outputs = generate(model, batch)
    length = outputs.prompt_length
    whole = batch | {"input_ids": outputs.sequences[:, :-1]}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    times = [match.seconds for match in outputs.matches[0] if match.position < outputs.sequences.shape[1] - 1]
    with torch.no_grad():
        again = model(**whole, vid_times=[times])
    torch.testing.assert_close(torch.cat(outputs.logits), again.logits[0, length - 1 :], atol=1e-4, rtol=1e-4)
    for match in outputs.matches[0]:
        scores = again.match_scores[0, match.position - 1]
        torch.testing.assert_close(scores.softmax(-1), match.probabilities, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kwargs", [{"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}])
def test_every_cache_gives_the_same(family, kwargs):
    model, batch = tiny_model(family), tiny_batch(range(4))
    expected, other = generate(model, batch), generate(model, batch, **kwargs)
    assert torch.equal(other.sequences, expected.sequences)
    for ours, theirs in zip(other.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_sampling_is_seeded_and_expands():
    model, batch = tiny_model(), tiny_batch(range(2))
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append(model.generate(**batch, max_new_tokens=6, do_sample=True, num_return_sequences=3))
    assert drawn[0].shape[0] == 6 and torch.equal(*drawn)
    assert len({tuple(row) for row in drawn[0][:3].tolist()}) > 1
    expanded = generate(model, batch | {}, num_return_sequences=1)
    torch.manual_seed(0)
    copies = model.generate(
        **batch, max_new_tokens=1, do_sample=True, top_k=1, num_return_sequences=2, return_dict_in_generate=True
    )
    first = expanded.sequences[:, : copies.sequences.shape[1]]
    assert torch.equal(copies.sequences, first.repeat_interleave(2, dim=0))


def test_expansion_keeps_the_time_tags_of_each_row():
    model, batch = tiny_model(use_time_tag=True), tiny_batch([0, 1])
    batch["qformer_input_ids"] = torch.randint(1, 50, (8, 6))
    batch["qformer_attention_mask"] = torch.ones(8, 6, dtype=torch.long)
    once = model.generate(**batch, max_new_tokens=4, do_sample=False)
    copies = model.generate(**batch, max_new_tokens=4, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(copies, once.repeat_interleave(2, dim=0))


@pytest.mark.parametrize(
    "kwargs", [{"num_beams": 2}, {"num_beams": 2, "do_sample": True}, {"prompt_lookup_num_tokens": 2}]
)
def test_modes_that_would_lose_frames_are_refused(kwargs):
    with pytest.raises(ValueError, match="greedy search or sampling"):
        tiny_model().generate(**tiny_batch([0]), max_new_tokens=4, **kwargs)


def test_filled_caches_and_chunked_prefill_are_refused():
    model, batch = tiny_model(), tiny_batch([0])
    cache = model(**batch, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="filled past_key_values"):
        model.generate(**batch, past_key_values=cache, max_new_tokens=4)
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(**batch, prefill_chunk_size=4, max_new_tokens=4)


def test_typos_are_refused():
    with pytest.raises(ValueError, match="pixel_value"):
        tiny_model().generate(**tiny_batch([0]), pixel_value=1, max_new_tokens=4)


def test_threads_share_a_model():
    model = tiny_model()
    expected = [generate(model, tiny_batch([row])).sequences for row in range(4)]
    results = {}

    def work(row):
        results[row] = [generate(model, tiny_batch([row])).sequences for _ in range(3)]

    threads = [threading.Thread(target=work, args=(row,)) for row in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, expected[row]) for row in range(4) for one in results[row])


def test_text_alone():
    model = tiny_model()
    outputs = generate(model, {"input_ids": torch.randint(3, 90, (2, 6))})
    assert outputs.sequences.shape == (2, 14) and outputs.matches == [[], []]


def test_models_without_matching_decode_plainly():
    model = tiny_model(use_matching=False, match_token_id=None)
    outputs = model.generate(**tiny_batch([0, 1]), max_new_tokens=5, return_dict_in_generate=True)
    assert outputs.matches == [[], []]


def test_half_precision_keeps_times_exact():
    model, batch = tiny_model().to(torch.bfloat16), tiny_batch([3])
    batch["frame_times"] = [[257.0 + frame / 3 for frame in range(7)]]
    outputs = generate(model, batch | {"pixel_values": batch["pixel_values"].to(torch.bfloat16)})
    assert all(match.seconds in batch["frame_times"][0] for match in outputs.matches[0])


def test_peft_adapters_work():
    model, batch = tiny_model(), tiny_batch([0, 1])
    expected = generate(model, batch)
    config = LoraConfig(r=4, target_modules=r"model\.language_model.*\.(qkv_proj|o_proj)", init_lora_weights=True)
    adapted = get_peft_model(model, config).eval()
    assert torch.equal(generate(adapted, batch).sequences, expected.sequences)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    changed = generate(adapted, batch)
    merged = generate(adapted.merge_and_unload(), batch)
    assert torch.equal(changed.sequences, merged.sequences)
    assert float((changed.logits[0] - expected.logits[0]).abs().max()) > 1e-3


class HostReads(TorchFunctionMode):
    """Counts what makes the host wait for an accelerator: reading a value, or sizes that depend on values."""

    NAMES = {"item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "equal", "unique", "bincount", "allclose"}
    NAMES |= {"__bool__", "__int__", "__float__", "__index__", "__contains__", "is_nonzero", "argwhere"}

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = (resolve_name(function) or function.__name__).rpartition(".")[2]
        by_mask = name in ("__getitem__", "__setitem__") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], tuple) else (args[1],))
        )
        if name in self.NAMES or by_mask or (name == "where" and len(args) == 1):
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


class ReadsEachToken(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores.max().item()
        return scores


def reads_of_steps(generate_tokens) -> Counter:
    """Host reads of twelve more tokens."""
    counts = []
    for tokens in (4, 16):
        with HostReads() as reads:
            generate_tokens(max_new_tokens=tokens, do_sample=False, eos_token_id=-1)
        counts.append(reads.counts)
    return counts[1] - counts[0]


@pytest.mark.parametrize("rows", [[0], [0, 1, 2]])
def test_a_token_waits_for_the_device_no_more_often_than_in_plain_decoding(rows, monkeypatch):
    model, batch = tiny_model(), tiny_batch(rows)
    monkeypatch.setattr(model, "_is_sharded", lambda: True)  # matches each token, as a GPU does
    plain = Phi3ForCausalLM(model.config.text_config).eval()
    plain.model, plain.lm_head = model.model.language_model, model.lm_head
    text = {"inputs_embeds": torch.randn(*batch["input_ids"].shape, 64), "attention_mask": batch["attention_mask"]}

    ours = reads_of_steps(lambda **kwargs: model.generate(**batch, return_dict_in_generate=True, **kwargs))
    theirs = reads_of_steps(lambda **kwargs: plain.generate(**text, return_dict_in_generate=True, **kwargs))
    assert ours == theirs and ours["__bool__"] >= 12  # transformers asks after each token whether all rows have ended
    reader = [ReadsEachToken()]
    reading = reads_of_steps(lambda **kwargs: model.generate(**batch, logits_processor=reader, **kwargs))
    assert reading["item"] - ours["item"] == 12


def test_on_a_cpu_only_vid_is_matched(monkeypatch):
    model, batch = tiny_model(), tiny_batch([0, 3])
    calls = []
    model.vid_head.register_forward_hook(lambda *_: calls.append(1))
    some = generate(model, batch)
    generated = some.sequences[:, some.prompt_length :]
    steps = (generated[:, :-1] == VID).any(0)
    assert 0 < int(steps.sum()) < len(steps)
    assert len(calls) == int(steps.sum()) + 1  # the last token is matched at the end
    monkeypatch.setattr(model, "_is_sharded", lambda: True)
    calls.clear()
    every = generate(model, batch)
    assert len(calls) == generated.shape[1] and torch.equal(every.sequences, some.sequences)
    for ours, theirs in zip(some.matches, every.matches, strict=True):
        assert [match.frame for match in ours] == [match.frame for match in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one.probabilities, other.probabilities)


def test_states_to_match_without_frames_are_refused():
    model, batch = tiny_model(), tiny_batch([0])
    states = torch.zeros(1, 1, model.config.text_config.hidden_size)
    with pytest.raises(ValueError, match="match_states needs vid_frames, frame_keys and frame_mask"):
        model(**batch, match_states=states)


class ForceImage(LogitsProcessor):
    """Makes the placeholder the first token."""

    def __init__(self, prompt_length: int):
        self.prompt_length = prompt_length

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] != self.prompt_length:
            return scores
        return torch.full_like(scores, float("-inf")).index_fill(1, torch.tensor([IMAGE]), 0.0)


@pytest.mark.parametrize("use_matching", [True, False])
def test_a_generated_placeholder_is_a_token_like_any_other(use_matching):
    model, batch = tiny_model(use_matching=use_matching), tiny_batch(range(2))
    settings = {"max_new_tokens": 4, "eos_token_id": -1, "return_dict_in_generate": True, "output_logits": True}
    settings["logits_processor"] = [ForceImage(batch["input_ids"].shape[1])]
    cached, whole = (model.generate(**batch, use_cache=use_cache, **settings) for use_cache in (True, False))
    assert (cached.sequences == IMAGE).sum() > (batch["input_ids"] == IMAGE).sum()
    assert torch.equal(cached.sequences, whole.sequences)
    for ours, theirs in zip(cached.logits, whole.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_without_a_prompt_decoding_begins_at_bos():
    outputs = tiny_model().generate(max_new_tokens=3, eos_token_id=-1, return_dict_in_generate=True)
    assert outputs.sequences.shape == (1, 4) and outputs.sequences[0, 0] == 1
    assert outputs.prompt_length == 1 and outputs.matches == [[]]


def test_attentions_of_every_step_are_returned():
    model, batch = tiny_model(attn_implementation="eager"), tiny_batch([0])
    outputs = generate(model, batch, output_attentions=True, output_hidden_states=True)
    assert len(outputs.attentions) == len(outputs.hidden_states) == 8
    assert [step[0].shape[2] for step in outputs.attentions] == [batch["input_ids"].shape[1]] + [1] * 7
