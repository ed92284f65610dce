"""A tiny random model on disk, H.264 videos, and both benchmarks, where the environment variables say."""

import json
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

from etchat_hf import ETChatForConditionalGeneration
from etchat_hf.chat_templates import load_chat_template
from etchat_hf.evaluation.etbench import TASKS
from etchat_hf.toy.tiny_model import build_model, build_processor

torch.set_num_threads(1)
FPS = 5
NUM_VIDEOS = 4
MAX_NEW_TOKENS = 16
QUESTIONS = {
    "rar": "Which shape is shown at <vid>?\n(A) a red circle (B) a blue square",
    "gvq": "Which shape is visible? (A) a red circle (B) a blue square",
    "tem": "It is visible from <vid> to <vid>. When is it visible again?",
}
TIMES = {"rar": [2.4], "tem": [0.5, 3.0]}


def write_video(path: Path, num_frames: int) -> None:
    """An H.264 file of coloured blocks that differ from frame to frame."""
    blocks = np.random.default_rng(num_frames).integers(0, 256, (num_frames, 8, 8, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS))
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for picture in blocks.repeat(8, 1).repeat(8, 2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def make_row(index: int, task: str) -> dict:
    turn = index // len(TASKS)
    video = (index + turn) % NUM_VIDEOS
    row = {"version": 1.0, "idx": index, "task": task, "source": f"toy{index % 2}", "video": f"{video}.mp4"}
    row |= {"duration": 3.0 + video, "q": QUESTIONS.get(task, "When is the red circle visible?")}
    if task in TIMES:
        row["src"] = TIMES[task]
    if task in ("rar", "eca", "rvq", "gvq"):
        row |= {"o": ["a red circle", "a blue square"], "p": turn % 2}
    if task in ("tal", "evs", "vhd", "dvc", "slc", "tem"):
        row["tgt"] = [[0.0, 1.0], [1.5, 2.5]]
    elif task in ("tvg", "epm", "gvq"):
        row["tgt"] = [1.0, 3]
    if task in ("dvc", "slc"):
        row["g"] = ["a red circle", "a blue square"]
    return row


def build_speaker():
    """A random model whose answers are varied and full of `<vid>`, and its processor."""
    torch.manual_seed(0)
    processor = build_processor()
    processor.chat_template = load_chat_template("phi3")
    template = build_model(processor)
    config = template.config
    config.use_matching = config.bi_attention = True
    model = ETChatForConditionalGeneration(config).eval()
    model.generation_config = template.generation_config
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.3)
        model.lm_head.weight[processor.match_token_id] *= 2
        model.lm_head.weight[model.generation_config.eos_token_id] *= 1.2
    return model, processor


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """`model` and `videos` (folders), `etbench` and `charades` (annotation files), `rows` of E.T. Bench."""
    folder = tmp_path_factory.mktemp("world")
    for part in build_speaker():
        part.save_pretrained(folder / "model")
    (folder / "videos").mkdir()
    for index in range(NUM_VIDEOS):
        write_video(folder / "videos" / f"{index}.mp4", num_frames=FPS * (3 + index))
    rows = [make_row(index, task) for index, task in enumerate([*TASKS] * 3)]
    (folder / "etbench.json").write_text(json.dumps(rows))
    lines = [f"{index % NUM_VIDEOS} 0.5 {1 + index}.0##a person opens door {index}.\n" for index in range(6)]
    (folder / "charades.txt").write_text("".join(lines))
    return SimpleNamespace(
        model=folder / "model",
        videos=folder / "videos",
        etbench=folder / "etbench.json",
        charades=folder / "charades.txt",
        rows=rows,
    )


@pytest.fixture
def environment(world, tmp_path, monkeypatch):
    """The environment variables that the tasks read."""
    variables = {
        "ETBENCH_ANNOTATIONS": world.etbench,
        "ETBENCH_VIDEOS": world.videos,
        "ETBENCH_SIMILARITY": "jaccard",
        "CHARADES_STA_ANNOTATIONS": world.charades,
        "CHARADES_STA_VIDEOS": world.videos,
        "HF_HOME": tmp_path / "hf",
        "HF_DATASETS_CACHE": tmp_path / "hf" / "datasets",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
