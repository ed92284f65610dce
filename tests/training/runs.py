"""Tiny training runs, in this process or by `examples/train.py`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from transformers import set_seed

from etchat_hf import ETChatProcessor
from etchat_hf.data import ETChatDataArguments, ETChatDataCollator, build_dataset
from etchat_hf.training import ETChatModelArguments, ETChatTrainer, ETChatTrainingArguments, load_model

REPOSITORY = Path(__file__).parents[2]
DEFAULTS = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "dataloader_num_workers": 0,
    "activation_checkpointing": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 1,
}


def build_trainer(base, data, output, matching=True, rows=None, model_options=None, **options) -> ETChatTrainer:
    stage = ETChatDataArguments(
        annotations=[str(rows or data / ("stage3.json" if matching else "stage2.json"))],
        image_root=str(data / "images"),
        video_root=str(data / "videos"),
        use_matching=matching,
    ).resolve()
    processor = ETChatProcessor.from_pretrained(base)
    stage.configure(processor)
    arguments = ETChatModelArguments(model_name_or_path=str(base), **(model_options or {}))
    args = ETChatTrainingArguments(output_dir=str(output), **(DEFAULTS | options))
    set_seed(args.seed)
    dataset = build_dataset(stage, processor, max_length=512, seed=args.seed)
    return ETChatTrainer(
        load_model(arguments, processor, stage),
        args,
        processing_class=processor,
        tuning_mode=arguments.tuning_mode,
        base_model=str(base),
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=ETChatDataCollator(processor),
    )


def command(base, data, output, processes=1, rows=None, script=REPOSITORY / "examples" / "train.py", **options):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    launch = launch if processes > 1 else []
    options = DEFAULTS | {
        "annotations": rows or data / "stage3.json",
        "image_root": data / "images",
        "video_root": data / "videos",
        "conv_type": "phi3",
        "use_matching": True,
        "max_length": 512,
        "model_name_or_path": base,
        "output_dir": output,
    } | options  # fmt: skip
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return [sys.executable, *launch, str(script), *words]


def environment(**more) -> dict:
    return (
        os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "TOKENIZERS_PARALLELISM": "false"} | more
    )


def run(*args, **options) -> None:
    result = subprocess.run(
        command(*args, **options), env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]


def run_until_killed(checkpoint: Path, delay: float, *args, **options) -> None:
    """SIGKILLs a run some time after a checkpoint has appeared."""
    process = subprocess.Popen(command(*args, **options), env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not checkpoint.is_dir() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    errors = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, errors[-3000:]
