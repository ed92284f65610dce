"""Claim: the vision tower takes at most 1.25 times as long as its bare matrix products and attention, in memory
bounded by a chunk of frames; and questions that share a clip share its frames.

The bare products have the tower's shapes and weights: one product per linear layer, one scaled_dot_product_attention
per block, no norms, activations, residuals or reshaping. Run as
`python benchmarks/vision.py [--device cuda --full-size]`.
"""

import json
import sys

import torch
from measuring import MB, in_fresh_process, peak_memory, profile_table, ratios
from mid_size import FRAMES, QUESTION_WORDS, build_inputs, build_model, build_parser, encoded, parse
from reporting import note, report
from torch.nn.functional import linear, scaled_dot_product_attention

from etchat_hf.modeling_etchat import CHUNK_FRAMES, CPU_CHUNK_FRAMES

TIME_LIMIT = 1.25
MEMORY_LIMIT = 1.5  # for 8 times the frames, and 4 times the questions; a few chunks' worth of noise
FEW, MANY, QUESTIONS = 32, 256, 16


def bare_work(model, frames: int):
    """A function that does the tower's matrix products and attention on as many frames, in the tower's chunks."""
    tower = model.model.vision_tower
    settings = tower.config
    width, heads = settings.hidden_size, settings.num_attention_heads
    tokens = (settings.image_size // settings.patch_size) ** 2 + 1
    chunk = min(frames, CPU_CHUNK_FRAMES if model.device.type == "cpu" else CHUNK_FRAMES)
    place = {"device": model.device, "dtype": model.dtype}
    patches = torch.randn(chunk * (tokens - 1), 3 * settings.patch_size**2, **place)
    kernel = tower.embeddings.patch_embedding
    hidden = torch.randn(chunk * tokens, width, **place)
    wide = torch.randn(chunk * tokens, settings.intermediate_size, **place)
    query, key, value = torch.randn(3, chunk, heads, tokens, width // heads, **place)
    weights = [
        (layer.self_attn.qkv, layer.self_attn.projection, layer.mlp.fc1, layer.mlp.fc2)
        for layer in tower.encoder.layers
    ]

    @torch.no_grad()
    def work():
        for _ in range(frames // chunk):
            linear(patches, kernel.weight.flatten(1), kernel.bias)
            for qkv, projection, fc1, fc2 in weights:
                linear(hidden, qkv.weight, qkv.bias)
                scaled_dot_product_attention(query, key, value)
                linear(hidden, projection.weight, projection.bias)
                linear(hidden, fc1.weight, fc1.bias)
                linear(wide, fc2.weight, fc2.bias)

    return work


def measure_encoding(frames: int, full_size: bool, device: str) -> dict:
    """MB that encoding takes at its peak beyond the features that it returns."""
    model = build_model(full_size, device)
    pixels = build_inputs(model, frames=frames)["pixel_values"]
    with peak_memory() as peak:
        features = model.get_vision_features(pixels)
    return {"megabytes": peak.megabytes - size_of(features)}


def measure_questions(questions: int, full_size: bool, device: str) -> dict:
    """MB that the compressor takes at its peak for so many questions about one clip."""
    model = build_model(full_size, device)
    features, arguments = clip_and_questions(model, questions)
    with torch.no_grad(), peak_memory() as peak:
        model.model.get_frame_embeds(features, *arguments)
    return {"megabytes": peak.megabytes}


def size_of(tensor: torch.Tensor) -> float:
    return tensor.numel() * tensor.element_size() / MB


def clip_and_questions(model, questions: int) -> tuple:
    """Features of one clip; the texts and frame numbers of `questions` questions about it."""
    features = encoded(model, build_inputs(model))["vision_features"]
    words = torch.randint(1000, 30000, (questions, QUESTION_WORDS), device=model.device)
    texts = words.repeat_interleave(FRAMES, dim=0)
    index = torch.arange(FRAMES, device=model.device).repeat(questions)
    return features, (texts, torch.ones_like(texts), index)


def main() -> int:
    parser = build_parser(__doc__)
    parser.set_defaults(repeats=3)
    parser.add_argument("--encode", type=int, help="(a child process) measure the memory for so many frames")
    parser.add_argument("--ask", type=int, help="(a child process) measure the memory for so many questions")
    options = parse(parser)
    place = options.full_size, options.device
    if options.encode or options.ask:
        measured = (
            measure_encoding(options.encode, *place) if options.encode else measure_questions(options.ask, *place)
        )
        print(json.dumps(measured))
        return 0
    where = "full size" if options.full_size else "mid-size"
    model = build_model(*place)
    pixels = build_inputs(model)["pixel_values"]

    def tower():
        model.get_vision_features(pixels)

    values = ratios(tower, bare_work(model, FRAMES), options.repeats)
    claim = f"Vision tower on {FRAMES} frames, {where} / its bare matrix products and attention"
    reason = f"Where the tower's time goes:\n\n{profile_table(tower)}"
    held = [report(claim, values, TIME_LIMIT, reason=reason)]

    features, (texts, mask, index) = clip_and_questions(model, QUESTIONS)
    with torch.no_grad():
        values = ratios(
            lambda: model.model.get_frame_embeds(features, texts, mask, index),
            lambda: model.model.get_frame_embeds(features[index], texts, mask),
            options.repeats,
        )
    claim = f"Compressor, {QUESTIONS} questions about one clip / the same with copied frames"
    held.append(report(claim, values, 1.0))

    child = ["--device", options.device] + ["--full-size"] * options.full_size

    def peaks(option: str, number: int) -> list[float]:
        return [in_fresh_process(option, str(number), *child)["megabytes"] for _ in range(options.repeats)]

    few, many = (peaks("--encode", number) for number in (FEW, MANY))
    note(
        f"Memory of the tower beyond the features: {min(few):.0f} MB for {FEW} frames, {min(many):.0f} MB for {MANY}."
    )
    values = [b / a for a, b in zip(few, many, strict=True)]
    held.append(report(f"Memory of the tower, {MANY} frames / {FEW} frames", values, MEMORY_LIMIT))
    few, many = (peaks("--ask", number) for number in (QUESTIONS // 4, QUESTIONS))
    claim = f"Memory of the compressor, {QUESTIONS} questions about one clip / {QUESTIONS // 4} questions"
    held.append(report(claim, [b / a for a, b in zip(few, many, strict=True)], MEMORY_LIMIT))
    return int(not all(held))


if __name__ == "__main__":
    sys.exit(main())
