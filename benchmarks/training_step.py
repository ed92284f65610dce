"""Claim: a training step takes at most half the memory and 0.8 times the time of a naive implementation, same loss.

The naive step has the same weights and formulas: logits at all positions, in float32; match heads on all tokens; eager
attention everywhere; all frames through the encoder at once, outside no_grad. Both train everything but the vision
encoder: forward and backward on CLIPS clips with text around them, of which the last quarter is labelled. Run as
`python benchmarks/training_step.py [--device cuda --full-size]`.
"""

import json
import math
import sys

import torch
from measuring import in_fresh_process, peak_memory, profile_table, ratios
from mid_size import FRAMES, VID, VOCAB, build_inputs, build_model, build_parser, parse
from reporting import note, report
from torch.nn.functional import cross_entropy

MEMORY_LIMIT, TIME_LIMIT, LOSS_LIMIT = 0.5, 0.8, 1e-5
CLIPS, TEXT, TARGETS = 2, 2016, 4  # a long conversation about each clip


def build_batch(model) -> dict:
    """Rows that end in an answer with TARGETS `<vid>`."""
    batch = build_inputs(model, clips=CLIPS, text=TEXT)
    ids = batch["input_ids"]
    answer = ids.shape[1] - ids.shape[1] // 4
    ids[:, answer : answer + 8 * TARGETS : 8] = VID
    labels = ids.clone()
    labels[:, :answer] = -100
    times = [[FRAMES * (row + 1) / (CLIPS + target + 1) for target in range(TARGETS)] for row in range(CLIPS)]
    return batch | {"labels": labels, "vid_times": times}


def our_step(model, batch: dict) -> torch.Tensor:
    model.zero_grad()
    loss = model(**batch, skip_logits=True).loss
    loss.backward()
    return loss.detach()


def naive_step(model, batch: dict) -> torch.Tensor:
    """`model` must use eager attention."""
    model.zero_grad()
    inputs, labels = dict(batch), batch["labels"]
    del inputs["labels"]
    features = model.model.vision_tower(inputs.pop("pixel_values")).last_hidden_state[:, 1:]
    last_states = []  # before the final norm, at all tokens
    norm = model.model.language_model.norm
    handle = norm.register_forward_pre_hook(lambda module, args: last_states.append(args[0]))
    outputs = model.model(**inputs, vision_features=features)
    handle.remove()

    logits = model.lm_head(outputs.last_hidden_state).float()
    lm_loss = cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))
    questions, keys = model.vid_head(outputs.match_states).float(), model.frm_head(last_states[0]).float()
    is_frame = batch["input_ids"] == model.config.image_token_id
    losses = []
    for row in range(len(labels)):
        columns = (labels[row] == VID).nonzero().flatten()
        scores = questions[row, columns - 1] @ keys[row, is_frame[row]].T / math.sqrt(keys.shape[-1])
        distance = (torch.arange(scores.shape[1], device=scores.device) - outputs.vid_frames[row, columns, None]).abs()
        losses.append(-(model.config.alpha**-distance * scores.log_softmax(-1)).sum(-1).mean())
    loss = lm_loss + torch.stack(losses).mean()
    loss.backward()
    return loss.detach()


STEPS = {"ours": (our_step, None), "naive": (naive_step, "eager")}


def prepare(name: str, options):
    """A function that does one step, and returns the loss."""
    step, attention = STEPS[name]
    model = build_model(options.full_size, options.device, attention)
    batch = build_batch(model)
    return lambda: step(model, batch)


def main() -> int:
    parser = build_parser(__doc__)
    parser.set_defaults(repeats=2)
    parser.add_argument("--measure", choices=STEPS, help="(a child process) measure the memory of one step")
    options = parse(parser)
    if options.measure:
        step = prepare(options.measure, options)
        with peak_memory() as peak:
            loss = step()
        print(json.dumps({"megabytes": peak.megabytes, "loss": float(loss)}))
        return 0
    child = ["--device", options.device, "--threads", str(options.threads)] + ["--full-size"] * options.full_size
    ours, naive = (in_fresh_process("--measure", name, *child) for name in STEPS)
    note(
        f"{CLIPS} clips of {FRAMES} frames, {TEXT + FRAMES} tokens each: {ours['megabytes']:.0f} MB above the model, "
        f"naive {naive['megabytes']:.0f} MB, of both of which the gradients are a part."
    )
    steps = {name: prepare(name, options) for name in STEPS}
    profile = profile_table(steps["ours"])
    held = [
        report("Peak memory of a training step / naive", [ours["megabytes"] / naive["megabytes"]], MEMORY_LIMIT),
        report("Loss, difference from naive", [abs(ours["loss"] - naive["loss"])], LOSS_LIMIT, unit=""),
        report(
            "Time of a training step / naive",
            ratios(steps["ours"], steps["naive"], options.repeats),
            TIME_LIMIT,
            reason=f"Profile of our step:\n\n{profile}",
        ),
    ]
    return int(not all(held))


if __name__ == "__main__":
    sys.exit(main())
