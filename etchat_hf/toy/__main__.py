"""From nothing to a model that says when: `python -m etchat_hf.toy` (or `make toy`) in a clone of the repository.

Draws the toy world, trains the three stages by `accelerate launch examples/train.py`, and asks the result about videos
that it has never seen. Under ten minutes on two CPU cores; the same seed gives the same model.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers.utils import logging

from . import bundled_checkpoint
from .annotations import SPAN_TASKS
from .evaluate import answer_rows, score_rows
from .generate import generate
from .tiny_model import build_model, build_processor

REPOSITORY = Path(__file__).resolve().parents[2]
STAGES = ("stage1", "stage2", "stage3")
USE = """from etchat_hf.inference import ask, load
from etchat_hf.toy import bundled_checkpoint

model, processor = load(bundled_checkpoint())
print(ask(model, processor, "video.mp4", "When is the red square visible?")["answer"])
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m etchat_hf.toy", description="Draw, train and score the toy world."
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("out/toy"),
        help="folder of data and models (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything (default: %(default)s)")
    parser.add_argument("--train-videos", type=int, default=500, help="videos of training (default: %(default)s)")
    parser.add_argument("--unseen-videos", type=int, default=120, help="videos of the score (default: %(default)s)")
    parser.add_argument("--max-steps", type=int, help="steps of every stage, for a quick look that learns nothing")
    parser.add_argument("--bundle", action="store_true", help="make the result the model that the package brings")
    args = parser.parse_args()
    script = REPOSITORY / "examples" / "train.py"
    if not script.is_file():
        sys.exit(f"{script}: no such file; run the toy in a clone of the repository.")
    logging.set_verbosity_error()
    console = Console()
    began = time.perf_counter()

    data = args.output / "data"
    for name in ("data", "start", *STAGES):
        shutil.rmtree(args.output / name, ignore_errors=True)
    generate(data, args.seed, args.train_videos, args.unseen_videos, _track)
    model = start(args.output / "start", args.seed)
    console.print(f"data and a fresh model: {time.perf_counter() - began:.0f} s")
    for stage in STAGES:
        stage_began = time.perf_counter()
        output = args.output / stage
        run_stage(script, stage, data, model, output, args.seed, args.max_steps)
        model = output
        console.print(f"{stage}: {last_figures(output)} in {time.perf_counter() - stage_began:.0f} s")

    rows = json.loads((data / "unseen.json").read_text(encoding="utf-8"))
    answers = answer_rows(model, rows, data / "videos", _track)
    scores = score_rows(rows, answers)
    console.print(_table(scores["tasks"]))
    if args.bundle:
        bundle(model)
    console.print(f"{time.perf_counter() - began:.0f} s in all")
    videos = len({row["video"] for row in rows})
    print(f"toy world: mIoU {scores['mIoU']:.3f} R@0.7 {scores['R@0.7']:.3f} on {videos} unseen videos")


def start(folder: Path, seed: int) -> Path:
    """Saves a fresh tiny model and its processor."""
    torch.manual_seed(seed)
    processor = build_processor()
    build_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def run_stage(
    script: Path, stage: str, data: Path, model: Path, output: Path, seed: int, max_steps: int | None
) -> None:
    """Runs a stage in its own process; `subprocess.CalledProcessError` if it fails."""
    config = script.parent / "configs" / "toy" / f"{stage}.yaml"
    options = {
        "config": config,
        "annotations": data / f"{stage}.json",
        "image_root": data / "images",
        "video_root": data / "videos",
        "model_name_or_path": model,
        "output_dir": output,
        "seed": seed,
    }
    if stage == "stage3":
        options["eval_annotations"] = data / "unseen.json"
    if max_steps is not None:
        options |= {"max_steps": max_steps, "eval_steps": max_steps}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--cpu", "--quiet", str(script)]
    # One thread: at this size more of them wait for each other, and sums keep their order on every machine.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path])}
    subprocess.run(
        launch + [word for key, value in options.items() for word in (f"--{key}", str(value))],
        check=True,
        env=environment,
    )


def last_figures(folder: Path) -> str:
    """The last losses, and IoU where it was measured, of a stage."""
    checkpoint = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    history = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    last = {key: value for entry in history for key, value in entry.items()}
    keys = ("lm_loss", "match_loss", "eval_mIoU")
    return ", ".join(f"{key} {last[key]:.3f}" for key in keys if key in last)


def bundle(model: Path) -> None:
    """Copies a model into the package, without what only training needs and without the code, which is beside it."""
    target = bundled_checkpoint()
    shutil.rmtree(target, ignore_errors=True)
    ignored = shutil.ignore_patterns("checkpoint-*", "*.jsonl", "runs", ".*", "*.py")
    shutil.copytree(model, target, ignore=ignored, copy_function=shutil.copyfile)
    for path in target.rglob("*config.json"):
        content = _without_auto_map(json.loads(path.read_text(encoding="utf-8")))
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    card = target / "README.md"
    text = re.sub(r"```python\n.*?```", f"```python\n{USE}```", card.read_text(encoding="utf-8"), flags=re.DOTALL)
    card.write_text(text, encoding="utf-8")


def _without_auto_map(content: dict) -> dict:
    """The Auto classes would look for code files where there are none."""
    return {
        key: _without_auto_map(value) if isinstance(value, dict) else value
        for key, value in content.items()
        if key != "auto_map"
    }


def _track(values, description: str):
    return track(values, description=description, console=Console())


def _table(tasks: dict[str, tuple[int, float]]) -> Table:
    table = Table("task", "questions", "score", "measure")
    for task, (number, score) in sorted(tasks.items()):
        table.add_row(task, str(number), f"{score:.3f}", "IoU" if task in SPAN_TASKS else "right")
    return table


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"{Path(error.cmd[error.cmd.index('--config') + 1]).stem} failed; the reason is above.")
