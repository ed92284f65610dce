"""`examples/train.py`: what users can get wrong ends in one line that says where, before or during training."""

import json
import re
import runpy
import shutil
import sys

import pytest

from .runs import DEFAULTS, REPOSITORY


@pytest.fixture
def train(start, toy_data, tmp_path, monkeypatch):
    """Runs the script in this process; returns its message, or `None` if it went well."""
    monkeypatch.chdir(tmp_path)

    def run(*words, **options) -> str | None:
        options = {
            "annotations": toy_data / "stage3.json",
            "image_root": toy_data / "images",
            "video_root": toy_data / "videos",
            "use_matching": True,
            "max_length": 512,
            "model_name_or_path": start,
            "output_dir": tmp_path / "out",
            **DEFAULTS,
        } | options
        given = [word for key, value in options.items() if value is not None for word in (f"--{key}", str(value))]
        monkeypatch.setattr(sys, "argv", ["train.py", *given, *map(str, words)])
        try:
            runpy.run_path(str(REPOSITORY / "examples" / "train.py"), run_name="__main__")
        except SystemExit as stop:
            return stop.code
        return None

    return run


@pytest.mark.parametrize("content, message", [
    ("learning_rate: [1]", "stage.yaml: learning_rate is [1]; it must be a number."),
    ("max_steps: many", "stage.yaml: max_steps is 'many'; it must be a whole number."),
    ("lora_targets: 3", "stage.yaml: lora_targets is 3; it must be a text."),
    ("save_strategy: no", "stage.yaml: save_strategy is False; it must be a text; put it in quotes"),
    ("learning_rte: 1", "stage.yaml: learning_rte: no such option; did you mean learning_rate?"),
    ("fps: 0", "fps is 0"),
    ("- 1", "stage.yaml: not a mapping"),
    ("a: [", "stage.yaml: not valid YAML"),
])  # fmt: skip
def test_configurations(train, tmp_path, content, message):
    (tmp_path / "stage.yaml").write_text(content)
    given = dict.fromkeys([content.partition(":")[0]]) if not content.startswith("-") else {}
    assert message in train("--config", "stage.yaml", **given)


def test_no_configuration(train):
    assert "gone.yaml" in train("--config", "gone.yaml")
    assert "--config needs a YAML file" in train("--config")


def test_numbers_and_single_values_as_yaml_reads_them(train, tmp_path, toy_data):
    (tmp_path / "stage.yaml").write_text(
        f"learning_rate: 1e-3\nannotations: {toy_data / 'stage3.json'}\nmax_steps: 1\nsave_strategy: 'no'\n"
    )
    options = dict.fromkeys(("learning_rate", "annotations", "max_steps"))
    assert train("--config", "stage.yaml", **options) is None
    assert '"learning rate"' not in (tmp_path / "out" / "README.md").read_text()
    assert "| learning rate | 0.001 |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("options, message", [
    ({"lora_targets": "mlp"}, "lora_targets is 'mlp'; it must be one of attention, linear."),
    ({"lora_learning_rate": 1e-4}, "lora_learning_rate is 0.0001, but there is no LoRA; set lora_targets too."),
    ({"tuning_mode": "llm", "lora_targets": "linear"}, "leave lora_targets out"),
    ({"global_batch_size": 6}, "global_batch_size 6 is no multiple of 1 processes x per_device_train_batch_size 4"),
    ({"accelerator_config": '{"split_batches": true}'}, "would deal rows out twice or lose their place"),
    ({"ignore_data_skip": True}, "would deal rows out twice or lose their place"),
    ({"average_tokens_across_devices": False}, "would change one part of the loss and not the other"),
    ({"label_smoothing_factor": 0.1}, "would change one part of the loss and not the other"),
    ({"global_batch_size": 0}, "global_batch_size is 0; it must be at least 1."),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0"),
    ({"lora_learning_rate": -1, "lora_targets": "linear"}, "lora_learning_rate is -1.0"),
    ({"tuning_mode": "projector", "dtype": "float16", "bf16": True}, "set bf16 or fp16, or dtype to float32."),
    ({"annotations": "gone/rows.json"}, "gone/rows.json: no such annotation file"),
    ({"video_root": "gone"}, "gone: no such folder; it is the video_root of"),
    ({"annotations": None}, "Nothing to train on"),
    ({"model_name_or_path": "gone/at/all"}, "gone/at/all does not exist"),
    ({"model_name_or_path": REPOSITORY / "tests/golden/phi3_stage3/original"}, "convert it first: etchat convert"),
    ({"resume_from_checkpoint": "gone"}, "gone"),
    ({"max_failure_rate": 2}, "max_failure_rate is 2.0; it must be between 0 and 1."),
    ({"max_length": 0}, "max_length is 0"),
    ({"eval_strategy": "epoch"}, "eval"),
    ({"attn_implementation": "nothing"}, "nothing"),
    ({"dtype": "float99"}, "dtype is 'float99'"),
    ({"lora_targets": "linear", "lora_r": 0}, "lora_r is 0"),
])  # fmt: skip
def test_options(train, options, message):
    found = train(**options)
    assert isinstance(found, str) and found.startswith("train.py: error: ") and message in found
    assert "\n" not in found


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_unusable_samples(train, tmp_path, toy_data, workers):
    rows = [row | {"tgt": [-1.0]} for row in json.loads((toy_data / "stage3.json").read_text())]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = train(annotations="rows.json", dataloader_num_workers=workers)
    assert found.startswith("train.py: error: ") and "rows.json row" in found and "Traceback" not in found
    assert "etchat data check" in found
    reasons = [json.loads(line)["reason"] for line in open(tmp_path / "out" / "skipped_samples.jsonl")]
    assert reasons and all("tgt" in reason for reason in reasons)


def test_broken_and_unfit_base_models(train, tmp_path, start):
    cut = shutil.copytree(start, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((start / "model.safetensors").read_bytes()[:5000])
    assert "cut cannot be loaded" in train(model_name_or_path=cut)
    assert train(lora_targets="linear", lora_r=2, max_steps=1) is None
    assert "a LoRA checkpoint; start from the stage's merged model" in train(
        model_name_or_path=tmp_path / "out" / "checkpoint-1"
    )
    trained = {"model_name_or_path": tmp_path / "out", "output_dir": tmp_path / "next"}
    assert "matches <vid>, but the data have none" in train(**trained, use_matching=False)


def test_a_folder_with_checkpoints_is_not_trained_over(train, tmp_path):
    assert train(max_steps=1) is None
    assert "checkpoint-1 is of an earlier run; go on from it with --resume_from_checkpoint last" in train(max_steps=1)
    assert (tmp_path / "out" / "checkpoint-1" / "config.json").is_file()


def test_resuming_where_there_is_nothing_says_so(train, capsys):
    assert train(resume_from_checkpoint="last", max_steps=1) is None
    assert "holds no checkpoint; beginning anew" in capsys.readouterr().err


def test_skipped_samples_are_of_this_run_and_those_it_goes_on_from(train, tmp_path, capsys):
    log = tmp_path / "out" / "skipped_samples.jsonl"
    log.parent.mkdir()
    log.write_text(json.dumps({"sample": "a row", "id": 0, "reason": "of an earlier run"}) + "\n")
    assert train(max_steps=1) is None and not log.exists()
    log.write_text(json.dumps({"sample": "a row", "id": 0, "reason": "before the stop"}) + "\n")
    assert train(max_steps=2, resume_from_checkpoint="last") is None
    assert "1 x before the stop" in capsys.readouterr().out


@pytest.mark.parametrize(("changes", "message"), [
    ({"weights": 2}, r"weights \[1.0\], not \[2.0\]"),
    ({"group_by_modality": True}, "grouped by modality False, not True"),
    ({"learning_rate": 0.5}, r"learning rates \[0.001, None\], not \[0.5, None\]"),
    ({"data_seed": 7}, "seed of the order 1, not 7"),
    ({"per_device_train_batch_size": 2}, "samples per step 4, not 2"),
    ({"tuning_mode": "attention"}, "tuning_mode projector, not attention"),
    ({"lora_r": 3}, "'r': 2, 'alpha': 256}, not {'targets'"),
    ({"lora_targets": "linear"}, "self_attn.*mlp"),
    ({"annotations": "fewer.json"}, r"rows \[\d+\], not \[9\]"),
])  # fmt: skip
def test_a_run_goes_on_as_it_began_or_not_at_all(train, tmp_path, toy_data, changes, message):
    lora = {"lora_targets": "attention", "lora_r": 2}
    assert train(max_steps=1, **lora) is None
    (tmp_path / "fewer.json").write_text(json.dumps(json.loads((toy_data / "stage3.json").read_text())[:9]))
    found = train(max_steps=2, resume_from_checkpoint="last", **lora | changes)
    assert found.startswith("train.py: error: ") and "checkpoint-1: was trained with" in found
    assert re.search(message, found), found
    assert train(max_steps=2, resume_from_checkpoint="last", **lora) is None


def test_a_run_does_not_go_on_from_a_model_alone(train):
    assert train(max_steps=1, save_only_model=True) is None
    found = train(max_steps=2, resume_from_checkpoint="last")
    assert "checkpoint-1: holds a model only (save_only_model)" in found


def test_skipped_samples_of_evaluation_are_told_of(train, tmp_path, toy_data, capsys):
    rows = json.loads((toy_data / "stage3.json").read_text())[:3]
    rows[1]["video"] = "gone.mp4"
    (tmp_path / "eval.json").write_text(json.dumps(rows))
    options = {"max_steps": 1, "eval_annotations": "eval.json", "eval_strategy": "steps", "max_failure_rate": 1}
    assert train(**options) is None
    assert "evaluation: 3 samples read, 1 skipped" in capsys.readouterr().out
    (line,) = (tmp_path / "out" / "skipped_eval_samples.jsonl").read_text().splitlines()
    assert "gone.mp4: no such file" in json.loads(line)["reason"]
