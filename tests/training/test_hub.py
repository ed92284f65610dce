"""A stage goes to the Hub when it ends, and the next one starts from there, on annotations and videos of the Hub."""

import json
from pathlib import Path

import pytest
from hub_server import running_hub

from etchat_hf.data.pack import pack

from .runs import run

MODEL, DATA = "someone/etchat-toy", "someone/toy-data"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with running_hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HF_TOKEN", "hf_loopback")
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        yield server


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_stage_is_pushed_and_is_gone_on_from_with_data_of_the_hub(hub, start, toy_data, tmp_path):
    lora = {"tuning_mode": "attention", "lora_targets": "attention", "lora_r": 2}
    pushing = {"push_to_hub": True, "hub_model_id": MODEL, "max_steps": 2, "save_steps": 1}
    run(start, toy_data, tmp_path / "one", **lora, **pushing)
    files = hub.repos[f"models/{MODEL}"]
    assert {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    } <= files.keys()
    assert {"processor_config.json", "chat_template.jinja", "qformer_tokenizer/tokenizer.json"} <= files.keys()
    for reference in json.loads(files["config.json"])["auto_map"].values():
        assert f"{reference.split('.')[0]}.py" in files
    unwanted = [
        name for name in files if "checkpoint" in name or "adapter" in name or name.endswith((".jsonl", ".pt"))
    ]
    assert not unwanted
    local = content_of(tmp_path / "one")
    assert all(local[name] == content for name, content in files.items())
    assert f'from_pretrained("{MODEL}"' in files["README.md"].decode()
    assert hub.commits == [f"Stage of 2 steps from {start.name}"]
    assert not [name for name, content in files.items() if str(tmp_path.parent).encode() in content], (
        "paths of this machine"
    )

    rows = json.loads((toy_data / "stage3.json").read_text())
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    videos = {f"videos/{name}": content for name, content in content_of(toy_data / "videos").items()}
    pack(str(toy_data / "unseen.json"), str(toy_data / "videos"), tmp_path / "packed")
    hub.repos[f"datasets/{DATA}"] = {"train.jsonl": lines} | videos
    hub.repos["datasets/someone/packed"] = content_of(tmp_path / "packed")
    options = {"video_root": f"hf://datasets/{DATA}/videos", "eval_annotations": "someone/packed"}
    options |= {"max_steps": 1, "eval_strategy": "steps"}
    run(MODEL, toy_data, tmp_path / "two", rows=DATA, **lora, **options)
    assert not (tmp_path / "two" / "skipped_samples.jsonl").exists()
    state = json.loads((tmp_path / "two" / "checkpoint-1" / "trainer_state.json").read_text())
    assert any("eval_loss" in entry for entry in state["log_history"])
    card = (tmp_path / "two" / "README.md").read_text()
    assert f"base_model: {MODEL}" in card and f"from `{MODEL}`" in card
