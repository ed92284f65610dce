"""The model that comes with the package answers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from etchat_hf.inference import ask, load
from etchat_hf.toy import bundled_checkpoint
from etchat_hf.toy.evaluate import answer_rows, score_rows
from etchat_hf.toy.generate import generate

REPOSITORY = Path(__file__).parents[2]


def test_it_is_small_and_loads_strictly():
    assert sum(path.stat().st_size for path in bundled_checkpoint().rglob("*") if path.is_file()) <= 4 << 20
    load(bundled_checkpoint())


def test_the_auto_classes_read_it_without_code_files_and_save_it_with_them(tmp_path):
    names = [str(path.relative_to(bundled_checkpoint())) for path in bundled_checkpoint().rglob("*.json")]
    assert not [name for name in names if "auto_map" in (bundled_checkpoint() / name).read_text()]
    model = AutoModelForImageTextToText.from_pretrained(bundled_checkpoint())
    processor = AutoProcessor.from_pretrained(bundled_checkpoint())
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for name in ("config.json", "processor_config.json"):
        for reference in json.loads((tmp_path / name).read_text())["auto_map"].values():
            assert (tmp_path / f"{reference.partition('.')[0]}.py").is_file()


def test_its_card_says_what_it_is_and_how_to_use_it():
    card = (bundled_checkpoint() / "README.md").read_text()
    assert "# E.T. Chat toy, stage 3\n" in card and "bundled_checkpoint()" in card
    assert "trust_remote_code" not in card


def test_it_localizes_in_videos_that_it_has_never_seen(tmp_path):
    generate(tmp_path, seed=77, num_train=0, num_unseen=12, track=lambda values, description: values)
    rows = json.loads((tmp_path / "unseen.json").read_text())
    answers = answer_rows(bundled_checkpoint(), rows, tmp_path / "videos", lambda values, description: values)
    assert score_rows(rows, answers)["mIoU"] > 0.8
    model, processor = load(bundled_checkpoint())
    row = rows[0]
    question = row["conversations"][0]["value"].removeprefix("<image>\n")
    assert ask(model, processor, tmp_path / "videos" / row["video"], question)["spans"] == answers[0]["spans"]


@pytest.mark.parametrize("seed", [5])
def test_the_demo_draws_its_picture(tmp_path, seed):
    words = [sys.executable, str(REPOSITORY / "examples" / "demo.py"), "--seed", str(seed), "--output", str(tmp_path)]
    result = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120, cwd=REPOSITORY)
    assert f"--seed {seed}" in result.stdout and "truth:" in result.stdout
    assert Image.open(tmp_path / "demo.png").width > 300
