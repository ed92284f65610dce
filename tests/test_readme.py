"""The README tells the truth: its tree is the repository's, and its commands and snippets run."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from etchat_hf import ETChatConfig, ETChatForConditionalGeneration
from etchat_hf.cli import app
from etchat_hf.toy import bundled_checkpoint
from etchat_hf.verification import write_clip

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    return [content for name, content in fenced if name == language]


def tree() -> dict[str, str]:
    """Path -> description, of the file tree's lines; folders end in a slash and indent what they hold."""
    (block,) = [block for block in blocks("") if block.startswith("etchat_hf/\n")]
    files, folders = {}, []
    for line in block.splitlines():
        name, _, description = line.strip().partition("  ")
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        else:
            files["".join(folders) + name] = description.strip()
    return files


def test_the_tree_names_every_file_once_and_says_what_it_is():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    kept = {name for name in tracked if not name.startswith(("tests/golden/", "etchat_hf/toy/checkpoint/"))}
    assert tree().keys() == kept
    assert all(tree().values())


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, converted, golden):
    """A folder in which the README's names mean something."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(golden / "phi3_stage3" / "original", folder / "SRC")
    shutil.copytree(converted, folder / "etchat-phi3")
    for name in ("video.mp4", "long.mp4"):
        write_clip(folder / name, fps=10, size=64)
    return folder


def commands() -> list[str]:
    """What can be run on the bundled files; data sets and other machines' addresses are not there."""
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    runnable = ("etchat ask", "etchat convert SRC", "etchat verify")
    return [line for line in lines if line.startswith(runnable) and "https:" not in line]


@pytest.mark.parametrize("line", [line for block in blocks("bash") for line in block.splitlines()])
def test_every_command_has_its_options(line):
    """Each `etchat` line of the README names commands and options that exist."""
    start = re.match(r"etchat |.*-m etchat_hf\.cli ", line)
    if start is None:
        return
    words = ["etchat", *shlex.split(line.split("#")[0][start.end() :])]
    depth = 3 if words[1] in ("data", "infer", "evaluate") else 2
    runner = CliRunner()
    shown = runner.invoke(app, [*words[1:depth], "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert shown.exit_code == 0, shown.output
    for word in words:
        if word.startswith("--"):
            assert word in shown.output, word


@pytest.mark.parametrize("command", commands())
def test_commands_run(command, workplace, golden):
    arguments = shlex.split(command)[1:]
    if arguments[0] == "convert":  # the tiny checkpoint differs from the published ones in what is not stored
        arguments = ["convert", "SRC", "converted", "--qformer-tokenizer", str(golden / "bert")]
        arguments += ["--vision-heads", "4", "--qformer-heads", "4"]
    if arguments[0] == "ask":
        arguments += ["--max-new-tokens", "4"]
    run = subprocess.run(
        [sys.executable, "-m", "etchat_hf.cli", *arguments], cwd=workplace, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_the_python_example_runs(workplace):
    (example,) = [block for block in blocks("python") if "post_process" in block]
    code = example.replace("max_new_tokens=64", "max_new_tokens=4")
    run = subprocess.run([sys.executable, "-c", code], cwd=workplace, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_scoring_example_runs():
    (example,) = [block for block in blocks("python") if "evaluate_etbench" in block]
    run = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True)
    assert run.stdout == "{'TVG': 1.0} 0.94444\n", run.stderr


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "IntxWeightOnlyConfig"])
def test_the_quantised_examples_run(kind, workplace):
    """With a converted checkpoint and the toy, both narrower than the published model: in the toy's group."""
    pytest.importorskip("torchao")
    (example,) = [block for block in blocks("python") if f"import {kind}" in block]
    example = example.replace("PerGroup(32)", "PerGroup(16)") + QUANTISED_WEIGHT
    for code in (example, "import etchat_hf\n" + example.replace("etchat-phi3", str(bundled_checkpoint()))):
        run = subprocess.run([sys.executable, "-c", code], cwd=workplace, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr


QUANTISED_WEIGHT = """
weight = model.model.language_model.layers[0].mlp.down_proj.weight.data
assert type(weight).__module__.startswith("torchao."), type(weight)
"""


def test_the_groups_of_the_quantised_example_divide_the_widths():
    assert "as 32 does in the published model and 16 in the toy" in " ".join(README.split())
    for config, group in ((ETChatConfig(), 32), (ETChatConfig.from_pretrained(bundled_checkpoint()), 16)):
        with torch.device("meta"):
            model = ETChatForConditionalGeneration(config)
        linear = {name: m.in_features for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        assert not {name for name, width in linear.items() if width % group}
    assert any(width % 32 for width in linear.values())  # or one group would do for both


def test_the_quickstart_runs():
    run = subprocess.run([sys.executable, str(ROOT / "examples" / "quickstart.py")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "answer:" in run.stdout and "<vid> at" in run.stdout
