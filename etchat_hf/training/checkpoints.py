"""Folders on disk: complete or not there at all, and each of them loadable on its own."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from transformers import GenerationConfig
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.trainer import TRAINER_STATE_NAME

from .. import modeling_etchat
from ..configuration_etchat import ETChatConfig
from ..data.settings_file import differences
from ..modeling_etchat import ETChatForConditionalGeneration

ADAPTER_CONFIG = "adapter_config.json"
SETTINGS = "training_settings.json"
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "adapter_model*", ADAPTER_CONFIG)


def write_model_files(model: ETChatForConditionalGeneration, folder: str | Path) -> None:
    """Adds what an adapter folder lacks to be a model repository: config.json, generation_config.json and the code."""
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    code = modeling_etchat.__file__
    for file in (code, *get_relative_import_files(code)):
        shutil.copyfile(file, Path(folder) / Path(file).name)


def write_settings(checkpoint: Path, settings: dict) -> None:
    """Notes what training was done with; only in checkpoints that it can go on from."""
    (checkpoint / SETTINGS).write_text(json.dumps(settings, indent=1), encoding="utf-8")


def check_same_training(checkpoint: Path, settings: dict) -> None:
    """
    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if training cannot go on from it with these settings, naming those that differ.
    """
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        raise FileNotFoundError(f"{checkpoint}: no checkpoint of a training run (no {TRAINER_STATE_NAME}).")
    if not (checkpoint / SETTINGS).is_file():
        raise ValueError(
            f"{checkpoint}: holds a model only (save_only_model), so training cannot go on from it; begin anew in "
            "another --output_dir."
        )
    changed = differences(json.loads((checkpoint / SETTINGS).read_text(encoding="utf-8")), settings)
    if changed:
        raise ValueError(
            f"{checkpoint}: was trained with {changed}. Go on with the same, or begin anew in another --output_dir."
        )


@contextmanager
def replaced_at_once(destination: str | Path) -> Iterator[Path]:
    """
    A folder beside `destination`'s files which replace them, one rename each, when the block ends well; weights and
    adapters that were there before go. Until all is done the destination has no config.json: it is no model.
    """
    destination = Path(destination)
    aside = destination / ".writing"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    yield aside
    (destination / "config.json").unlink(missing_ok=True)
    for pattern in WEIGHTS:
        for outdated in destination.glob(pattern):
            outdated.unlink()
    for entry in sorted(aside.iterdir(), key=lambda path: path.name == "config.json"):
        target = destination / entry.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(entry, target)
    aside.rmdir()


def merge_checkpoint(checkpoint: str | Path, destination: str | Path, dtype: torch.dtype | None = None) -> None:
    """
    Writes the model of a training checkpoint as one without PEFT.

    Args:
        checkpoint (`str` or `Path`): a `checkpoint-N`, of LoRA training or not.
        destination (`str` or `Path`): folder; a model or an adapter in it is replaced.
        dtype (`torch.dtype`, *optional*): of the floating parameters; by default float32.

    Raises:
        FileNotFoundError: if the checkpoint, or the base that its adapter names, is not there.
    """
    checkpoint = Path(checkpoint)
    if not (checkpoint / "config.json").is_file():
        raise FileNotFoundError(
            f"{checkpoint}: no checkpoint (no config.json); give a checkpoint-N of a training run."
        )
    config = ETChatConfig.from_pretrained(checkpoint)
    if (checkpoint / ADAPTER_CONFIG).is_file():
        base = PeftConfig.from_pretrained(checkpoint).base_model_name_or_path
        model = ETChatForConditionalGeneration.from_pretrained(
            base, config=config, dtype=torch.float32, ignore_mismatched_sizes=True
        )
        model = PeftModel.from_pretrained(model, checkpoint).merge_and_unload()
        # The base's tells of the end of a turn in the conversation type that came before
        model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    else:
        model = ETChatForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    with replaced_at_once(destination) as folder:
        # The original format: names that transformers took for those of BERT in TensorFlow, as under ZeRO-3
        model.to(dtype or torch.float32).save_pretrained(folder, save_original_format=False)
