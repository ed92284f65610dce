"""Claims: quantised to 8 or 4 bits by torchao, the toy matches the frames of full precision in at least 98 % of its
questions; at mid-size the weights of the linear layers take at most 0.3 times what they take in float32.

Unseen videos of the toy world, all questions of each. Without torchao (`pip install -e .[quantised]`) nothing is run.
On CPUs torchao computes with 4-bit weights that it holds in 8 bits each, so 4 bits save no memory there.
"""

import argparse
import json
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from mid_size import build_model
from reporting import not_run, report
from transformers import TorchAoConfig
from transformers.utils import logging

from etchat_hf import ETChatForConditionalGeneration
from etchat_hf.inference import ask, load
from etchat_hf.toy import bundled_checkpoint
from etchat_hf.toy.generate import generate

LIMIT, SIZE_LIMIT = 98.0, 0.3


def settings(bits: int) -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    if bits == 8:
        return TorchAoConfig(Int8WeightOnlyConfig())
    # Groups of 32 or 128 are usual; the toy's layers, 32 to 192 inputs wide, all divide by 16.
    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)))


def agreement(bits: int, questions: list, expected: list) -> float:
    _, processor = load(bundled_checkpoint())
    model = ETChatForConditionalGeneration.from_pretrained(bundled_checkpoint(), quantization_config=settings(bits))
    found = [ask(model.eval(), processor, *question)["frames"] for question in questions]
    return 100 * sum(ours == theirs for ours, theirs in zip(found, expected, strict=True)) / len(questions)


def linear_bytes(model: torch.nn.Module) -> int:
    """Of the linear layers' weights, but the output's and the match heads'."""
    total = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.startswith(("lm_head", "vid_head", "frm_head")):
            total += sum(part.untyped_storage().nbytes() for part in parts(module.weight.data))
    return total


def parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in parts(getattr(tensor, name))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=80)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    claims = {bits: f"questions whose matches agree with full precision, {bits} bits" for bits in (8, 4)}
    size_claim = "weights of linear layers in 8 bits / in float32, mid-size"
    if find_spec("torchao") is None:
        for claim in (*claims.values(), size_claim):
            not_run(claim, "torchao is not installed")
        return 0
    held = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        generate(folder, seed=77, num_train=0, num_unseen=arguments.videos, track=lambda values, description: values)
        model, processor = load(bundled_checkpoint())
        questions = [
            (
                str(folder / "videos" / row["video"]),
                row["conversations"][0]["value"].removeprefix("<image>\n"),
                row.get("src"),
            )
            for row in json.loads((folder / "unseen.json").read_text())
        ]
        expected = [ask(model, processor, *question)["frames"] for question in questions]
        for bits, claim in claims.items():
            held.append(report(claim, [agreement(bits, questions, expected)], LIMIT, at_most=False, unit="%"))
        full = build_model()
        full.save_pretrained(folder / "mid")
        small = ETChatForConditionalGeneration.from_pretrained(folder / "mid", quantization_config=settings(8))
        held.append(report(size_claim, [linear_bytes(small) / linear_bytes(full)], SIZE_LIMIT))
    return int(not all(held))


if __name__ == "__main__":
    sys.exit(main())
