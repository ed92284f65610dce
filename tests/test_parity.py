"""The figures of the original come out, and the runner notices when they do not."""

import json
import shutil

import parity
import pytest
from safetensors.torch import load_file, save_file

CASES = ("phi3_stage3", "pieces", "prompts", "frames", "metrics")


def last_line(capsys) -> str:
    return capsys.readouterr().out.strip().splitlines()[-1]


def test_golden_figures_come_out(golden, capsys):
    assert parity.main([str(golden / case) for case in CASES]) == 0
    assert last_line(capsys).endswith("0 failed, 0 files not read")


@pytest.fixture
def case(golden, tmp_path):
    shutil.copytree(golden / "bert", tmp_path / "bert")
    return shutil.copytree(golden / "phi3_stage3", tmp_path / "deep" / "er" / "phi3_stage3")


def test_cases_are_found_at_any_depth(case, capsys):
    assert parity.main([str(case.parents[2])]) == 0
    assert "phi3_stage3/infer_2" in capsys.readouterr().out


def test_a_wrong_figure_fails(case, capsys):
    path = case / "infer_0.safetensors"
    tensors = load_file(path)
    tensors["step_logits"][3, 7] += 1e-3
    save_file(tensors, path)
    assert parity.main([str(case)]) == 1
    output = capsys.readouterr().out
    assert output.count("FAIL") == 1 and "step logits" in output.split("FAIL")[0].splitlines()[-1]


def test_an_unread_file_fails(case, capsys):
    (case / "infer_9.safetensors").write_bytes(b"")
    assert parity.main([str(case)]) == 1
    assert last_line(capsys).endswith("0 failed, 1 files not read")


def test_a_broken_checkpoint_fails_and_the_rest_is_checked(case, golden, capsys):
    config = json.loads((case / "original" / "config.json").read_text())
    (case / "original" / "config.json").write_text(json.dumps(config | {"model_type": "etchat_opt"}))
    assert parity.main([str(case), str(golden / "metrics")]) == 1
    output = capsys.readouterr().out
    assert "etchat_opt" in output and "charades_expected" in output


def test_nothing_to_check_fails(tmp_path, capsys):
    assert parity.main([str(tmp_path)]) == 1
    assert last_line(capsys) == "0 quantities checked, 0 failed, 0 files not read"
