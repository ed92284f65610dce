"""The same global batches give the same losses, however they are split; and ranks without a clip keep in step."""

import json

import pytest
import torch

from etchat_hf.data import ETChatBatchSampler
from etchat_hf.toy.annotations import COLOR_QUESTION

from .runs import build_trainer, run

STEPS = 4
OPTIONS = {"max_steps": STEPS, "save_strategy": "no", "model_options": {"tuning_mode": "attention"}}


@pytest.fixture(scope="module")
def mixed_rows(toy_data, tmp_path_factory):
    """Rows with several targets, with none, with images, and with no clip at all."""
    timed = json.loads((toy_data / "stage3.json").read_text())[:9]
    images = json.loads((toy_data / "stage1.json").read_text())[:3]
    text = [
        {
            "conversations": [
                {"from": "human", "value": COLOR_QUESTION},
                {"from": "gpt", "value": " ".join(["red"] * n)},
            ]
        }
        for n in range(1, 13)
    ]
    path = tmp_path_factory.mktemp("rows") / "mixed.json"
    path.write_text(json.dumps(timed + images + text))
    return path


@pytest.fixture(scope="module")
def whole(start, toy_data, mixed_rows, tmp_path_factory):
    trainer = build_trainer(start, toy_data, tmp_path_factory.mktemp("whole"), rows=mixed_rows, **OPTIONS)
    trainer.train()
    return trainer


def losses(history: list[dict]) -> torch.Tensor:
    """(steps, 3): loss and its two parts."""
    return torch.tensor(
        [[entry[key] for key in ("loss", "lm_loss", "match_loss")] for entry in history if "loss" in entry]
    )


def test_the_parts_add_up_to_the_loss(whole):
    parts = losses(whole.state.log_history)
    assert parts.shape == (STEPS, 3)
    assert torch.allclose(parts[:, 0], parts[:, 1] + parts[:, 2], atol=1e-5)
    assert (parts[:, 2] > 0).any()


def test_accumulation_changes_nothing(start, toy_data, mixed_rows, tmp_path, whole):
    options = OPTIONS | {"per_device_train_batch_size": 1, "global_batch_size": 4}
    trainer = build_trainer(start, toy_data, tmp_path, rows=mixed_rows, **options)
    assert trainer.args.gradient_accumulation_steps == 4
    trainer.train()
    assert (losses(trainer.state.log_history) - losses(whole.state.log_history)).abs().max() < 1e-5


def test_two_processes_change_nothing_and_survive_batches_without_a_clip(start, toy_data, mixed_rows, tmp_path, whole):
    sampler = ETChatBatchSampler(whole.train_dataset, batch_size=2, world_size=2)
    batches = [[whole.train_dataset.modality[key.row] == 0 for key in batch] for batch in sampler][: 2 * STEPS]
    alone = [(all(first), all(second)) for first, second in zip(batches[::2], batches[1::2], strict=True)]
    assert any(first != second for first, second in alone), "no step has a clip on one rank only; change the seed"
    run(start, toy_data, tmp_path, processes=2, rows=mixed_rows, max_steps=STEPS, per_device_train_batch_size=2,
        tuning_mode="attention")  # fmt: skip
    history = json.loads((tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    assert (losses(history) - losses(whole.state.log_history)).abs().max() < 1e-5


def eval_losses(metrics: dict) -> torch.Tensor:
    return torch.tensor([metrics[f"eval_{name}"] for name in ("loss", "lm_loss", "match_loss")])


def test_evaluation_is_the_same_however_it_is_split(start, toy_data, mixed_rows, tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(json.loads(mixed_rows.read_text())[3:10:2] + json.loads(mixed_rows.read_text())[9:18]))
    splits = {
        size: build_trainer(start, toy_data, tmp_path / "out", rows=rows, per_device_eval_batch_size=size).evaluate()
        for size in (1, 5, 13)
    }
    whole = eval_losses(splits[13])
    assert whole[2] > 0 and torch.allclose(whole[0], whole[1] + whole[2])
    assert all((eval_losses(split) - whole).abs().max() < 1e-5 for split in splits.values())
    trainer = build_trainer(start, toy_data, tmp_path / "out", rows=rows)
    targets = [torch.tensor(trainer.train_dataset[i].get("vid_times", [])).numel() > 0 for i in range(13)]
    assert 0 < sum(targets) < 13
    options = {"eval_annotations": rows, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2}
    run(start, toy_data, tmp_path / "two", processes=2, rows=rows, max_steps=1, learning_rate=0, **options)
    history = json.loads((tmp_path / "two" / "checkpoint-1" / "trainer_state.json").read_text())["log_history"]
    (metrics,) = (entry for entry in history if "eval_loss" in entry)
    assert (eval_losses(metrics) - whole).abs().max() < 1e-5


def test_a_global_batch_that_does_not_divide_is_refused(start, toy_data, tmp_path):
    with pytest.raises(ValueError, match="global_batch_size 6 is no multiple of 1 processes x .* 4"):
        build_trainer(start, toy_data, tmp_path, global_batch_size=6)


def test_activation_checkpointing_changes_nothing(start, toy_data, mixed_rows, tmp_path, whole):
    trainer = build_trainer(start, toy_data, tmp_path, rows=mixed_rows, activation_checkpointing=True, **OPTIONS)
    trainer.train()
    assert (losses(trainer.state.log_history) - losses(whole.state.log_history)).abs().max() < 1e-5
