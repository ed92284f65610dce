"""How time and memory grow with frames, questions and batch: plots, and whether they grow linearly where they should.

The exponent of growth is the slope, in logarithms, over the larger half of the sizes: 1 is linear. Linear are the
vision encoder and the compressor in the frames, and all of it in questions and rows. Not linear is the attention of
the language model, in the frames: each of its frame tokens sees all others, as in any language model.
Run as `python benchmarks/growth.py [--frames 128]`; `--frames` is how far the vision encoder goes, which is by far the
slowest on a CPU (6 minutes of one core to 2048); the other parts always go to 2048, with features in place of frames.
How a turn of a conversation grows is measured in encode_once.py. Writes growth_*.svg.
"""

import ctypes
import gc
import math
import sys
from pathlib import Path

import matplotlib
import torch
from measuring import peak_memory, seconds
from mid_size import build_inputs, build_model, build_parser, encoded, parse
from reporting import note, report

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402 - the backend comes first

FOLDER = Path(__file__).resolve().parent
EXPONENT_LIMIT = 1.1
FRAMES, QUESTIONS, ROWS, TOKENS = 2048, 16, 8, 16


def doubling(first: int, last: int, factor: int = 2) -> list[int]:
    return [first * factor**step for step in range(round(math.log(last / first, factor)) + 1)]


def measure(work) -> tuple[float, float]:
    """Seconds and peak MB of one call, the fastest of two if they are short."""
    gc.collect()
    if sys.platform == "linux":  # what was freed goes back to the system, so that it counts when it is taken again
        ctypes.CDLL(None).malloc_trim(0)
    with peak_memory() as peak:
        first = seconds(work)
    return (min(first, seconds(work)) if first < 5 else first), peak.megabytes


def exponent(points: dict[int, float]) -> float:
    """Least-squares slope over the larger half, in logarithms."""
    kept = sorted(points)[len(points) // 2 - (len(points) < 6) :]
    xs, ys = [math.log(size) for size in kept], [math.log(max(points[size], 1e-3)) for size in kept]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    products = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return products / sum((x - mean_x) ** 2 for x in xs)


def over_frames(model, most_encoded: int) -> dict[str, dict[int, tuple]]:
    curves = {"vision encoder": {}, "compressor": {}, "compressor and language model": {}}
    for frames in doubling(8, FRAMES, 4):
        if frames <= most_encoded:
            pixels = build_inputs(model, frames=frames)["pixel_values"]
            curves["vision encoder"][frames] = measure(lambda: model.get_vision_features(pixels))  # noqa: B023
            del pixels
        inputs = encoded_frames(model, frames)
        texts = [inputs[f"qformer_{name}"].expand(frames, -1) for name in ("input_ids", "attention_mask")]
        compress = lambda: model.model.get_frame_embeds(inputs["vision_features"], *texts)  # noqa: E731, B023
        curves["compressor"][frames] = measure(compress)
        curves["compressor and language model"][frames] = measure(lambda: model(**inputs, logits_to_keep=1))  # noqa: B023
    return curves


def encoded_frames(model, frames: int) -> dict:
    """Inputs with features, made without ever having the frames in memory."""
    inputs = build_inputs(model, frames=1)
    ids = build_inputs(model, frames=1)["input_ids"]
    before = (ids == model.config.image_token_id).nonzero()[0, 1]
    image = ids.new_full((1, frames), model.config.image_token_id)
    inputs["input_ids"] = torch.cat([ids[:, :before], image, ids[:, before + 1 :]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["frame_times"] = [[float(second) for second in range(frames)]]
    features = encoded(model, inputs)["vision_features"]
    del inputs["pixel_values"]
    return inputs | {"vision_features": features.expand(frames, -1, -1).contiguous()}


def over_questions(model) -> dict[str, dict[int, tuple]]:
    """Each question a row of the batch, about one clip, whose features are there once."""
    clip = encoded(model, build_inputs(model))
    curve = {}
    for questions in doubling(1, QUESTIONS):
        rows = build_inputs(model, clips=questions, frames=len(clip["frame_times"][0]))
        del rows["pixel_values"]
        inputs = rows | {key: clip[key] for key in ("vision_features", "frame_times")}
        inputs["placeholder_clips"] = [[0]] * questions
        curve[questions] = measure(lambda: answer(model, inputs))  # noqa: B023
    return {"compressor and answer": curve}


def over_batch(model) -> dict[str, dict[int, tuple]]:
    curve = {}
    for rows in doubling(1, ROWS):
        inputs = encoded(model, build_inputs(model, clips=rows))
        curve[rows] = measure(lambda: answer(model, inputs))  # noqa: B023
    return {"compressor and answer": curve}


def answer(model, inputs: dict) -> None:
    model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)


def plot(name: str, curves: dict[str, dict[int, tuple]]) -> None:
    pyplot.rcParams.update({"svg.hashsalt": name, "svg.fonttype": "none"})
    figure, sides = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for index, (side, unit) in enumerate(zip(sides, ("time, s", "peak memory, MB"), strict=True)):
        for label, points in curves.items():
            side.plot(points.keys(), [point[index] for point in points.values()], marker="o", label=label)
        side.set(xscale="log", yscale="log", xlabel=name, ylabel=unit)
        side.grid(alpha=0.3)
    sides[0].legend(fontsize="small")
    figure.savefig(FOLDER / f"growth_{name}.svg", metadata={"Date": None})
    pyplot.close(figure)
    note(f"![time and memory over {name}](growth_{name}.svg)")


def main() -> int:
    parser = build_parser(__doc__)
    parser.add_argument("--frames", type=int, default=FRAMES)
    options = parse(parser)
    model = build_model(options.full_size, options.device)
    held = []
    with torch.no_grad():
        measured = {
            "frames": over_frames(model, options.frames),
            "questions": over_questions(model),
            "batch": over_batch(model),
        }
    for name, curves in measured.items():
        for label, points in curves.items():
            for index, unit in enumerate(("time", "memory")):
                slope = exponent({size: point[index] for size, point in points.items()})
                claim = f"Exponent of {unit} over {name}: {label}"
                if label == "compressor and language model":
                    note(f"{claim}: {slope:.2f}, of which the language model's attention is quadratic by nature.")
                else:
                    held.append(report(claim, [slope], EXPONENT_LIMIT, unit=""))
        plot(name, curves)
    far = max(measured["frames"]["vision encoder"])
    note(
        f"The vision encoder was given up to {far} frames, the other parts up to {FRAMES}. Each size was measured "
        "once, the time of those under 5 s twice: an exponent is a slope over several sizes."
    )
    return int(not all(held))


if __name__ == "__main__":
    sys.exit(main())
