"""Claim: a training step takes at most half the memory and 0.8 times the time of a naive implementation, same loss.

The naive step has the same weights and formulas: logits at all positions, in float32; match heads on all tokens; eager
attention everywhere; all frames through the encoder at once. Both train everything but the vision encoder: forward and
backward on CLIPS clips with text around them, of which the last quarter is labelled. The claim is for the longest
text, which with the frames fills the 2048 tokens of a stage. In shorter ones what both steps have to do weighs more.

The encoder is frozen in the naive step too, so that autograd keeps nothing of it in either: there is nothing to
compare. That ours keeps none of its activations is claimed by itself: a step from frames peaks near one from features
that are there already. Kept, they would be more than all the rest, and double the peak. Run as
`python benchmarks/training_step.py [--device cuda --full-size]`.
"""

import json
import math
import statistics
import sys

import torch
from measuring import MB, in_fresh_process, interleaved, kept_megabytes, peak_memory, profile_table, seconds
from mid_size import FRAMES, VID, VOCAB, build_inputs, build_model, build_parser, encoded, parse
from reporting import note, report
from torch.nn.functional import cross_entropy

MEMORY_LIMIT, TIME_LIMIT, LOSS_LIMIT, ENCODER_LIMIT = 0.5, 0.8, 1e-5, 1.1
CLIPS, TEXTS, TARGETS = 2, (2016, 512, 128), 4


def build_batch(model, text: int) -> dict:
    """Rows that end in an answer with TARGETS `<vid>`."""
    batch = build_inputs(model, clips=CLIPS, text=text)
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


STEPS = {"ours": (our_step, None), "naive": (naive_step, "eager"), "from features": (our_step, None)}


def prepare(name: str, options, text: int):
    """The model, its batch, and a function that does one step and returns the loss."""
    step, attention = STEPS[name]
    model = build_model(options.full_size, options.device, attention)
    batch = build_batch(model, text)
    if name == "from features":
        batch = encoded(model, batch)
    return model, batch, lambda: step(model, batch)


def measure_memory(name: str, options) -> dict:
    """Of one step: the loss, MB at its peak above the model, of gradients, and of the compressor's activations."""
    model, batch, step = prepare(name, options, *options.texts)
    with peak_memory() as peak:
        loss = step()
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None) / MB
    features = encoded(model, batch)["vision_features"] if "pixel_values" in batch else batch["vision_features"]
    words = [batch[f"qformer_{key}"].repeat_interleave(FRAMES, 0) for key in ("input_ids", "attention_mask")]
    kept = kept_megabytes(model, lambda: model.model.get_frame_embeds(features, *words))
    return {"megabytes": peak.megabytes, "gradients": gradients, "compressor": kept, "loss": float(loss)}


def compare_memory(text: int, options) -> list[bool]:
    child = ["--device", options.device, "--threads", str(options.threads)] + ["--full-size"] * options.full_size
    names = list(STEPS) if text == max(TEXTS) else ["ours", "naive"]
    runs = {
        name: [in_fresh_process("--measure", name, "--texts", str(text), *child) for _ in range(options.repeats)]
        for name in names
    }
    peaks = {name: [run["megabytes"] for run in measured] for name, measured in runs.items()}
    (ours, naive), first = (min(peaks[name]) for name in ("ours", "naive")), runs["ours"][0]
    floor = first["gradients"] + first["compressor"]
    parts = (
        f"{CLIPS} clips of {FRAMES} frames, {text + FRAMES} tokens each: {ours:.0f} MB above the model, naive "
        f"{naive:.0f} MB. Of both, {first['gradients']:.0f} MB are the gradients of all that is trained, and "
        f"{first['compressor']:.0f} MB what the compressor keeps for its own; the rest is "
        f"{(ours - floor) / (naive - floor):.2f} x."
    )
    ratios = [a / b for a, b in zip(peaks["ours"], peaks["naive"], strict=True)]
    losses = [abs(a["loss"] - b["loss"]) for a, b in zip(runs["ours"], runs["naive"], strict=True)]
    reason = f"{parts} To keep less, the compressor would have to run twice (gradient checkpointing)."
    held = [report(f"Peak memory of a training step / naive, text of {text}", ratios, MEMORY_LIMIT, reason=reason)]
    if held[0]:
        note(parts)
    held.append(report(f"Loss, difference from naive, text of {text}", losses, LOSS_LIMIT, unit=""))
    if "from features" in peaks:
        kept = [a / b for a, b in zip(peaks["ours"], peaks["from features"], strict=True)]
        claim = "Peak memory of a training step from frames / from features"
        reason = "What it consists of has not been profiled. Activations kept by all blocks would more than double it."
        held.append(report(claim, kept, ENCODER_LIMIT, reason=reason))
    return held


def compare_time(text: int, options) -> bool:
    """Where ours misses its limit: what of its time is the encoder's, which the naive step has to run as well."""
    (model, batch, ours), (_, _, naive) = (prepare(name, options, text) for name in ("ours", "naive"))
    times = interleaved(ours, naive, options.repeats)
    tower = min(seconds(lambda: model.get_vision_features(batch["pixel_values"])) for _ in range(2))
    ratios = [a / b for a, b in zip(*times, strict=True)]
    mine, theirs = map(min, times)
    reason = (
        f"Of {mine:.1f} s, naive {theirs:.1f} s, the frozen encoder takes {tower:.1f} s, which both have to run. The "
        f"rest is {(mine - tower) / (theirs - tower):.2f} x."
    )
    if statistics.median(ratios) > TIME_LIMIT:
        reason += f" Profile of our step:\n\n{profile_table(ours)}"
    return report(f"Time of a training step / naive, text of {text}", ratios, TIME_LIMIT, reason=reason)


def main() -> int:
    parser = build_parser(__doc__)
    parser.set_defaults(repeats=2)
    parser.add_argument("--texts", type=int, nargs="+", default=TEXTS, help="tokens of a row beside its frames")
    parser.add_argument("--measure", choices=STEPS, help="(a child process) measure the memory of one step")
    options = parse(parser)
    if options.measure:
        print(json.dumps(measure_memory(options.measure, options)))
        return 0
    held = []
    for text in options.texts:
        held += [*compare_memory(text, options), compare_time(text, options)]
    return int(not all(held))


if __name__ == "__main__":
    sys.exit(main())
