"""Claims: `<vid>` matching costs at most 3 % over plain decoding by the same language model, token by token; and a
batch of eight different clips is no slower than the eight one by one (on a GPU: four times the throughput).

Plain decoding is transformers' own class around the same weights, with a prompt as long. Both are stopped after the
same number of tokens; the time of a token is taken from step to step, so that the prompt does not count. Run as
`python benchmarks/decoding.py [--device cuda --full-size]`.
"""

import statistics
import sys

import torch
from measuring import now, profile_table, ratios
from mid_size import FRAMES, build_inputs, build_model, build_parser, encoded, parse
from reporting import report
from transformers import Phi3ForCausalLM, StoppingCriteria

OVERHEAD_LIMIT = 1.03
ROWS, THROUGHPUT_CPU, THROUGHPUT_GPU = 8, 1.0, 4.0
TOKENS, BATCH_TOKENS = 96, 24


class Clock(StoppingCriteria):
    """Notes when each token was there, and never stops."""

    def __init__(self):
        self.times = []

    def __call__(self, input_ids, scores, **kwargs):
        self.times.append(now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def step(self) -> float:
        """The median time from one token to the next: a hiccup of the machine falls on few of them."""
        return statistics.median(b - a for a, b in zip(self.times, self.times[1:], strict=False))


def plain_decoder(model) -> Phi3ForCausalLM:
    with torch.device("meta"):
        plain = Phi3ForCausalLM(model.config.text_config).eval()
    plain.model, plain.lm_head = model.model.language_model, model.lm_head
    return plain


def settings(tokens: int) -> dict:
    return {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def overhead(model, repeats: int) -> list[float]:
    plain, inputs = plain_decoder(model), encoded(model, build_inputs(model))
    embeds = torch.randn(1, inputs["input_ids"].shape[1], plain.config.hidden_size).to(model.device, model.dtype)

    def ours():
        clock = Clock()
        model.generate(**inputs, **settings(TOKENS), stopping_criteria=[clock])
        return clock.step()

    def theirs():
        clock = Clock()
        plain.generate(inputs_embeds=embeds, **settings(TOKENS), stopping_criteria=[clock])
        return clock.step()

    ours(), theirs()
    values = []
    for number in range(repeats):
        first, second = (ours, theirs) if number % 2 else (theirs, ours)
        times = {first: first(), second: second()}
        values.append(times[ours] / times[theirs])
    return values


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
    parser.set_defaults(repeats=9)
    options = parse(parser)
    model = build_model(options.full_size, options.device)
    inputs = encoded(model, build_inputs(model))
    profile = profile_table(lambda: model.generate(**inputs, **settings(TOKENS)))
    claim = f"A token with <vid> matching to {FRAMES} frames / a token of plain decoding"
    held = [
        report(claim, overhead(model, options.repeats), OVERHEAD_LIMIT, reason=f"Profile of decoding:\n\n{profile}")
    ]
    limit = THROUGHPUT_CPU if options.device == "cpu" else THROUGHPUT_GPU
    claim = f"Throughput of a batch of {ROWS} clips / one by one"
    held.append(report(claim, throughput(model, options.repeats), limit, at_most=False))
    return int(not all(held))


if __name__ == "__main__":
    sys.exit(main())
