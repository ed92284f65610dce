"""Claim: conversion takes at most 1 GB of memory above the imports, and twice the time of copying the files with `cp`.

Writes a random checkpoint in the original's layout and at its size, float16: 5 billion parameters, some 10 GB, and
twice that is needed on the disk. Memory is anonymous memory: files that are mapped do not count, the system drops them
when it needs to. Run as `python benchmarks/conversion.py [--folder DIR] [--layers 2]`, with fewer layers of the
language model where the disk is small.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measuring import in_fresh_process, peak_memory
from mid_size import config
from reporting import note, report

from etchat_hf.conversion.convert import Options, convert_checkpoint
from etchat_hf.conversion.lazy_tensor import LazyTensor
from etchat_hf.conversion.strict import model_on_meta, target_shapes
from etchat_hf.conversion.weight_map import originals_of
from etchat_hf.conversion.writing import write_weights

MEMORY_LIMIT, TIME_LIMIT = 1000, 2.0  # MB, and times `cp`
GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"


def write_original(folder: Path, layers: int) -> float:
    """A random original checkpoint; returns its size in GB."""
    template = GOLDEN / "phi3_stage3" / "original"
    shutil.copytree(template, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    original = json.loads((template / "config.json").read_text(encoding="utf-8"))
    settings = config(full_size=True)
    text = settings.text_config
    text.num_hidden_layers = layers
    words = len((GOLDEN / "bert" / "vocab.txt").read_text(encoding="utf-8").splitlines()) + 1  # and [DEC]
    settings.qformer_config.vocab_size = words
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    original |= {name: getattr(text, name) for name in (*sizes, "vocab_size", "sliding_window")}
    original |= {"vision_processor": "clip_center_224", "torch_dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(original), encoding="utf-8")
    noise = torch.randn(1 << 24).half()
    tensors = {}
    for name, shape in target_shapes(model_on_meta(settings)).items():
        rule, originals = originals_of(name)
        tensors |= dict(zip(originals, rule.split(random_tensor(name, shape, noise)), strict=True))
    write_weights(folder, tensors, None, "5GB")
    return sum(file.stat().st_size for file in folder.iterdir()) / 1e9


def random_tensor(name: str, shape: tuple[int, ...], noise: torch.Tensor) -> LazyTensor:
    """The same noise over and over: what is in the files costs neither side anything. Key biases are zero."""
    numbers = torch.Size(shape).numel()

    def row_blocks():
        if name.endswith("qkv.bias"):
            return (torch.zeros(shape, dtype=torch.float16),)
        return (noise.repeat(-(-numbers // len(noise)))[:numbers].view(shape),)

    return LazyTensor((name,), "random", shape, torch.float16, row_blocks)


def convert(source: Path, destination: Path) -> dict:
    options = Options(qformer_tokenizer=str(GOLDEN / "bert"))
    start = time.perf_counter()
    with peak_memory() as peak:
        convert_checkpoint(source, destination, options=options)
    return {"seconds": time.perf_counter() - start, "megabytes": peak.megabytes}


def copy(source: Path, destination: Path) -> float:
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(destination)], check=True)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, help="of the language model; the published one has 32")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; a temporary one by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--convert", nargs=2, type=Path, help="(a child process) source and destination")
    options = parser.parse_args()
    if options.convert:
        print(json.dumps(convert(*options.convert)))
        return 0
    ratios, megabytes = [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, destination = Path(folder) / "original", Path(folder) / "written"
        size = write_original(source, options.layers)
        for _ in range(options.repeats):
            os.sync()  # or whoever comes second waits until what was written before is on the disk
            copying = copy(source, destination)
            shutil.rmtree(destination)
            os.sync()
            converted = in_fresh_process("--convert", str(source), str(destination))
            shutil.rmtree(destination)
            ratios.append(converted["seconds"] / copying)
            megabytes.append(converted["megabytes"])
    note(f"A checkpoint of {size:.1f} GB.")
    held = [
        report("Anonymous memory of conversion above the imports", megabytes, MEMORY_LIMIT, unit="MB"),
        report("Time of conversion / cp", ratios, TIME_LIMIT),
    ]
    return int(not all(held))


if __name__ == "__main__":
    sys.exit(main())
