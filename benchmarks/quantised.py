"""Claims: quantised to 8 or 4 bits by torchao, the toy matches the frames of full precision in at least 98 % of its
questions; at mid-size the weights of the linear layers take at most 0.3 times what they take in float32, in the 4 bits
(nf4) of bitsandbytes at most 0.2 times.

Unseen videos of the toy world, all questions of each. Without torchao and bitsandbytes (`pip install -e .[quantised]`)
nothing is run. torchao holds 4-bit weights in 8 bits each, so that they save no memory over 8 bits.
bitsandbytes' kernels for CPUs take no layer of fewer than 32 outputs or parts of 32, such as the toy has.
"""

import argparse
import json
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from mid_size import build_inputs, build_model, encoded
from reporting import not_run, note, report
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.utils import logging

from etchat_hf import ETChatForConditionalGeneration
from etchat_hf.inference import ask, load
from etchat_hf.toy import bundled_checkpoint
from etchat_hf.toy.generate import generate

LIMIT = 98.0
EIGHT, FOUR, NF4 = "8 bits (torchao)", "4 bits (torchao)", "4 bits (bitsandbytes)"
SIZE_LIMITS = {EIGHT: 0.3, NF4: 0.2}


def settings(kind: str) -> TorchAoConfig | BitsAndBytesConfig:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    if kind == NF4:
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    if kind == EIGHT:
        return TorchAoConfig(Int8WeightOnlyConfig())
    # Groups of 32 or 128 are usual; the toy's layers, 32 to 192 inputs wide, all divide by 16.
    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)))


def agreement(kind: str, questions: list, expected: list) -> float:
    _, processor = load(bundled_checkpoint())
    model = ETChatForConditionalGeneration.from_pretrained(bundled_checkpoint(), quantization_config=settings(kind))
    found = [ask(model.eval(), processor, *question)["frames"] for question in questions]
    return 100 * sum(ours == theirs for ours, theirs in zip(found, expected, strict=True)) / len(questions)


def linear_bytes(model: torch.nn.Module) -> int:
    """Of the linear layers' weights, but the output's and the match heads'."""
    total = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.startswith(("lm_head", "vid_head", "frm_head")):
            scales = [state.absmax] if (state := getattr(module.weight, "quant_state", None)) else []
            total += sum(part.untyped_storage().nbytes() for part in (*parts(module.weight.data), *scales))
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
    claims = {kind: f"questions whose matches agree with full precision, {kind}" for kind in (EIGHT, FOUR)}
    size_claims = {kind: f"weights of linear layers in {kind} / in float32, mid-size" for kind in SIZE_LIMITS}
    if missing := [name for name in ("torchao", "bitsandbytes") if find_spec(name) is None]:
        for claim in (*claims.values(), *size_claims.values()):
            not_run(claim, f"{' and '.join(missing)} not installed")
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
        for kind, claim in claims.items():
            held.append(report(claim, [agreement(kind, questions, expected)], LIMIT, at_most=False, unit="%"))
        full = build_model()
        full.save_pretrained(folder / "mid")
        for kind, claim in size_claims.items():
            small = ETChatForConditionalGeneration.from_pretrained(folder / "mid", quantization_config=settings(kind))
            small(**encoded(small, build_inputs(small)))  # some kernels store weights anew when they first run
            held.append(report(claim, [linear_bytes(small) / linear_bytes(full)], SIZE_LIMITS[kind]))
    note(
        f"{len(questions)} questions. All figures are counts, the same in each run. torchao holds 4-bit weights in 8 "
        "bits each, so that on a CPU its 4 bits save no memory over 8 bits; bitsandbytes packs two in a byte. The "
        "toy's layers are too narrow for the kernels that bitsandbytes has for CPUs."
    )
    return int(not all(held))


if __name__ == "__main__":
    sys.exit(main())
