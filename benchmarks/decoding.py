"""Claims: `<vid>` matching costs at most 3 % over plain decoding by the same language model, both token by token and
in a whole `generate`; and a batch of eight different clips is no slower than the eight one by one (on a GPU: four
times the throughput).

Plain decoding is transformers' own class around the same weights, with a prompt as long. Both are made to say the same
tokens, of which every fourth is `<vid>`. Token by token they take turns, and the prompt does not count. A whole
`generate` is compared with the compressor, called once, and a plain `generate`: it counts the prompt and the matches
that are collected. Run as `python benchmarks/decoding.py [--device cuda --full-size]`.
"""

import statistics
import sys
import threading
import time
from functools import partial

import torch
from measuring import now, profile_table, ratios
from mid_size import FRAMES, build_inputs, build_model, build_parser, encoded, parse
from reporting import note, report
from transformers import LogitsProcessor, Phi3ForCausalLM, StoppingCriteria

OVERHEAD_LIMIT = 1.03
ROWS, THROUGHPUT_CPU, THROUGHPUT_GPU = 8, 1.0, 4.0
TOKENS, PERIOD, BATCH_TOKENS = 96, 4, 24


class Saying(LogitsProcessor):
    """Chooses the same tokens whatever the weights; each PERIOD-th is `<vid>`."""

    def __init__(self, vid: int):
        self.vid, self.said = vid, 0

    def __call__(self, input_ids, scores):
        self.said += 1
        chosen = torch.full_like(scores, float("-inf"))
        chosen[:, 1 if self.said % PERIOD else self.vid] = 0.0
        return chosen


class TakingTurns(StoppingCriteria):
    """Never stops; after each token lets the other decoder go on, and counts only the time of its own tokens."""

    def __init__(self, mine: threading.Semaphore, others: threading.Semaphore):
        self.mine, self.others, self.steps = mine, others, []
        self.started = 0.0

    def __call__(self, input_ids, scores, **kwargs):
        self.steps.append(clock() - self.started)
        self.others.release()
        if len(self.steps) < TOKENS:
            self.mine.acquire()
        self.started = clock()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def clock() -> float:
    """As [`now`], of this thread alone."""
    return time.thread_time() if not torch.cuda.is_initialized() and torch.get_num_threads() == 1 else now()


def side_by_side(vid: int, *decoders) -> list[list[float]]:
    """Seconds of each token of two decoders that take turns, so that whatever slows the machine down slows both."""
    turns = [threading.Semaphore(1), threading.Semaphore(0)]
    timers = [TakingTurns(turns[0], turns[1]), TakingTurns(turns[1], turns[0])]

    def decode(index: int):
        turns[index].acquire()
        try:
            saying = {"logits_processor": [Saying(vid)], "stopping_criteria": [timers[index]]}
            decoders[index](**settings(TOKENS), **saying)
        finally:  # after an error, too, the other one must not wait for ever
            turns[1 - index].release(TOKENS)

    threads = [threading.Thread(target=decode, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # The first is the prompt, and in the last they no longer wait: whole periods, the ends left away
    return [timer.steps[PERIOD:-PERIOD] for timer in timers]


def plain_decoder(model) -> Phi3ForCausalLM:
    with torch.device("meta"):
        plain = Phi3ForCausalLM(model.config.text_config).eval()
    plain.model, plain.lm_head = model.model.language_model, model.lm_head
    return plain


def settings(tokens: int) -> dict:
    return {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def period(steps: list[float]) -> list[float]:
    """The median token at each place of the period; the first reads `<vid>`."""
    return [statistics.median(steps[place::PERIOD]) for place in range(PERIOD)]


def overhead(model, repeats: int) -> tuple[list[float], float]:
    """A period of ours over one of plain decoding for each repeat, and for all the same of the `<vid>` alone."""
    plain, inputs, vid = plain_decoder(model), encoded(model, build_inputs(model)), model.config.match_token_id
    embeds = torch.randn(1, inputs["input_ids"].shape[1], plain.config.hidden_size).to(model.device, model.dtype)
    ours, theirs = partial(model.generate, **inputs), partial(plain.generate, inputs_embeds=embeds)
    side_by_side(vid, ours, theirs)
    runs = [[period(steps) for steps in side_by_side(vid, ours, theirs)] for _ in range(repeats)]
    return [sum(a) / sum(b) for a, b in runs], statistics.median(a[0] / b[0] for a, b in runs)


def whole_generate(model, repeats: int) -> list[float]:
    """Time of a `generate` that returns its matches, over that of the compressor and a plain `generate`."""
    plain, inputs, vid = plain_decoder(model), encoded(model, build_inputs(model)), model.config.match_token_id
    ids, is_frame = inputs["input_ids"], inputs["input_ids"] == model.config.image_token_id
    words = [inputs[f"qformer_{name}"].expand(FRAMES, -1) for name in ("input_ids", "attention_mask")]

    def ours():
        saying = {"logits_processor": [Saying(vid)], "return_dict_in_generate": True}
        return model.generate(**inputs, **settings(TOKENS), **saying)

    @torch.no_grad()
    def theirs():
        frames = model.model.get_frame_embeds(inputs["vision_features"], *words)
        embeds = model.get_input_embeddings()(ids.masked_fill(is_frame, 0))
        embeds = embeds.masked_scatter(is_frame[..., None], frames.to(embeds))
        return plain.generate(inputs_embeds=embeds, **settings(TOKENS), logits_processor=[Saying(vid)])

    found, said = ours(), theirs()
    assert found.sequences[:, -TOKENS:].equal(said) and len(found.matches[0]) == TOKENS // PERIOD
    return ratios(ours, theirs, repeats, warmup=0)


def throughput(model, repeats: int) -> list[float]:
    """Tokens per second of a batch of different clips, over those of its rows one by one."""
    singles = [encoded(model, build_inputs(model, seed=row), row) for row in range(ROWS)]
    batch = {key: torch.cat([single[key] for single in singles]) for key in TENSORS}
    batch["frame_times"] = [single["frame_times"][0] for single in singles]
    batch["placeholder_clips"] = [[row] for row in range(ROWS)]

    def one_by_one():
        for single in singles:
            model.generate(**single, **settings(BATCH_TOKENS))

    return ratios(one_by_one, lambda: model.generate(**batch, **settings(BATCH_TOKENS)), repeats)


TENSORS = ("input_ids", "attention_mask", "vision_features", "qformer_input_ids", "qformer_attention_mask")


def main() -> int:
    parser = build_parser(__doc__)
    parser.set_defaults(repeats=5)
    options = parse(parser)
    model = build_model(options.full_size, options.device)
    inputs = encoded(model, build_inputs(model))
    profile = profile_table(lambda: model.generate(**inputs, **settings(TOKENS)))
    reason = (
        "Feeding frames back costs a token about ten small operations, whatever the size of the language model. "
        "On a GPU the head and the scores come on top, for all tokens: to know which are `<vid>`, the host would "
        "have to wait for the device. Profile of decoding:"
        f"\n\n{profile}"
    )
    claim = f"A token alone, with <vid> matching to {FRAMES} frames / a token of plain decoding"
    whole, of_vid = overhead(model, options.repeats)
    held = [report(claim, whole, OVERHEAD_LIMIT, reason=reason)]
    note(f"Every {PERIOD}th token is `<vid>`; such a token alone takes {of_vid:.2f} x one of plain decoding.")
    claim = f"A whole generate of {TOKENS} tokens with <vid> matching / compressor and plain generate"
    # More often than the others: not taking turns at each token, single runs differ by more than the limit.
    held.append(report(claim, whole_generate(model, 3 * options.repeats), OVERHEAD_LIMIT, reason=reason))
    limit = THROUGHPUT_CPU if options.device == "cpu" else THROUGHPUT_GPU
    claim = f"Throughput of a batch of {ROWS} clips / one by one"
    held.append(report(claim, throughput(model, options.repeats), limit, at_most=False))
    return int(not all(held))


if __name__ == "__main__":
    sys.exit(main())
