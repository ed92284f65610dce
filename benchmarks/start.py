"""Claims: `import etchat_hf` takes at most 1.1 times as long as `import transformers`, its classes at most 1.1 times
as long as the classes of transformers that they build on, and loading a checkpoint maps it instead of copying it, and
makes no random weights first: either would be anonymous memory of the checkpoint's size.

Everything runs in fresh processes, in turns. The time is the processor's (user and system), which other programs on
the machine disturb less: imports use one core. Loading is of the mid-size model; a language model of transformers with
as many weights is loaded beside it, as a measure of its time: that one has far fewer tensors and modules, each of
which takes its time, whatever its size.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from measuring import in_fresh_process, peak_memory, seconds
from mid_size import build_model
from reporting import note, report
from transformers import AutoModelForCausalLM, Phi3Config
from transformers.utils import logging

from etchat_hf import ETChatForConditionalGeneration

LIMIT, MEMORY_LIMIT = 1.1, 0.1
OUR_CLASSES = "from etchat_hf import ETChatConfig, ETChatForConditionalGeneration, ETChatProcessor"
THEIR_CLASSES = """
from transformers import AutoConfig, AutoModel, AutoTokenizer, BatchFeature, GenerationMixin, PreTrainedModel
from transformers import InstructBlipQFormerModel, InstructBlipVisionModel, ProcessorMixin
from transformers.video_processing_utils import VideoProcessorMixin
"""


def processor_seconds(code: str) -> float:
    """User and system time of a fresh interpreter that runs `code`."""
    process = subprocess.Popen([sys.executable, "-c", code])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {code}")
    return usage.ru_utime + usage.ru_stime


def import_ratios(ours: str, theirs: str, repeats: int) -> list[float]:
    processor_seconds(ours), processor_seconds(theirs)  # from the disk
    return [processor_seconds(ours) / processor_seconds(theirs) for _ in range(repeats)]


def write_checkpoints(folder: Path) -> None:
    """The mid-size model, and Phi-3 of so many layers that it has as many weights."""
    model = build_model()
    model.save_pretrained(folder / "ours")
    settings = model.config.text_config.to_dict()
    rest = count(model) - count(model.model.language_model) - count(model.lm_head)
    settings["num_hidden_layers"] += round(rest / count(model.model.language_model.layers[0]))
    AutoModelForCausalLM.from_config(Phi3Config(**settings)).save_pretrained(folder / "theirs")


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def load(folder: Path) -> dict:
    """Seconds, the most anonymous memory above that before, in MB, and the number of tensors."""
    loader = ETChatForConditionalGeneration if folder.name == "ours" else AutoModelForCausalLM
    models = []
    with peak_memory() as peak:
        elapsed = seconds(lambda: models.append(loader.from_pretrained(folder)))
    return {"seconds": elapsed, "megabytes": peak.megabytes, "tensors": len(models[0].state_dict())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    if arguments.load:
        print(json.dumps(load(arguments.load)))
        return 0
    held = [
        report(
            "import etchat_hf / import transformers",
            import_ratios("import etchat_hf", "import transformers", arguments.repeats),
            LIMIT,
        ),
        report(
            "importing its classes / those of transformers they build on",
            import_ratios(OUR_CLASSES, THEIR_CLASSES, arguments.repeats),
            LIMIT,
        ),
    ]
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoints(Path(folder))
        size = Path(folder, "ours", "model.safetensors").stat().st_size / 1e6
        loads = [
            [in_fresh_process("--load", str(Path(folder, whose))) for whose in ("ours", "theirs")]
            for _ in range(arguments.repeats)
        ]
    memory = [ours["megabytes"] / size for ours, _ in loads]
    claim = "anonymous memory of loading a checkpoint / its size: mapped, and random weights never made"
    held.append(report(claim, memory, MEMORY_LIMIT))
    for whose, *results in zip(("the mid-size model", "a language model of its size"), *loads, strict=True):
        best = min(results, key=lambda result: result["seconds"])
        note(
            f"Loading {whose} ({size:.0f} MB in {best['tensors']} tensors): {best['seconds']:.2f} s, "
            f"{best['megabytes']:.0f} MB anonymous memory."
        )
    return int(not all(held))


if __name__ == "__main__":
    sys.exit(main())
