"""Checkpoints appear whole, load on their own, and are gone on from exactly."""

import json
import random

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, TrainerCallback
from transformers.utils import logging

from etchat_hf import ETChatConfig, ETChatForConditionalGeneration
from etchat_hf.training import ETChatTrainer, merge_checkpoint

from .runs import build_trainer, run, run_until_killed

LORA = {"tuning_mode": "attention", "lora_targets": "linear", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.2}


class SpoilFrom(TrainerCallback):
    """Makes a model worse before each step from a given one on."""

    def __init__(self, trainer, step):
        self.trainer, self.step = trainer, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 >= self.step:
            for group in self.trainer.optimizer.param_groups:
                group["lr"] = 1.0


@pytest.fixture(scope="module")
def stage(start, toy_data, tmp_path_factory):
    """A finished LoRA stage that turned matching on."""
    output = tmp_path_factory.mktemp("stage")
    trainer = build_trainer(start, toy_data, output, model_options=LORA | {"bi_attention": True}, learning_rate=1e-2)
    trainer.train()
    trainer.save_stage()
    return trainer


@pytest.fixture(scope="module")
def batch(stage):
    samples = [stage.train_dataset[index] for index in (0, 1)]
    return stage.data_collator(samples)


@torch.no_grad()
def scores(model, batch) -> torch.Tensor:
    outputs = model.eval()(**batch)
    return torch.cat([outputs.logits.flatten(), outputs.match_scores.flatten()]).nan_to_num(neginf=0.0)


def checkpoint_of(stage):
    return f"{stage.args.output_dir}/checkpoint-3"


def test_a_checkpoint_loads_by_from_pretrained(stage, batch, caplog):
    expected = scores(stage.model, batch)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_warning()
    logging.enable_propagation()
    loaded = ETChatForConditionalGeneration.from_pretrained(checkpoint_of(stage))
    logging.disable_propagation()
    logging.set_verbosity(verbosity)
    assert not caplog.messages  # nothing is missing but what the adapter fills
    assert torch.allclose(scores(loaded, batch), expected, atol=1e-5)


def test_a_checkpoint_loads_by_the_auto_classes(stage, batch):
    loaded = AutoModelForImageTextToText.from_pretrained(checkpoint_of(stage))
    assert torch.allclose(scores(loaded, batch), scores(stage.model, batch), atol=1e-5)
    assert AutoProcessor.from_pretrained(checkpoint_of(stage)).chat_template == stage.processing_class.chat_template


def test_a_checkpoint_loads_by_peft(stage, start, batch):
    config = ETChatConfig.from_pretrained(checkpoint_of(stage))
    base = ETChatForConditionalGeneration.from_pretrained(start, config=config)
    loaded = PeftModel.from_pretrained(base, checkpoint_of(stage))
    assert torch.allclose(scores(loaded, batch), scores(stage.model, batch), atol=1e-5)


def test_a_stage_ends_with_a_merged_model(stage, batch):
    folder = stage.args.output_dir
    loaded, info = ETChatForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.allclose(scores(loaded, batch), scores(stage.model, batch), atol=1e-4)
    assert loaded.config.use_matching and loaded.config.bi_attention
    # The stage's own, not that of the model it started from
    assert loaded.generation_config.eos_token_id == stage.model.generation_config.eos_token_id
    assert loaded.generation_config.eos_token_id != GenerationConfig.from_pretrained(stage.base_model).eos_token_id
    card = open(f"{folder}/README.md", encoding="utf-8").read()
    assert "LoRA of rank 4" in card and "3 steps" in card


@pytest.mark.parametrize("model_options", [{"tuning_mode": "projector"}, LORA])
def test_a_stage_ends_with_the_best_checkpoint(start, toy_data, tmp_path, model_options):
    trainer = build_trainer(
        start,
        toy_data,
        tmp_path,
        model_options=model_options,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        warmup_steps=0,
        save_steps=1,
        eval_steps=1,
        eval_strategy="steps",
        load_best_model_at_end=True,
    )
    trainer.add_callback(SpoilFrom(trainer, 2))
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[0] < min(losses[1:])
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    trainer.save_stage()
    trainer.model = trainer.model_wrapped = ETChatForConditionalGeneration.from_pretrained(tmp_path)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[0], rel=1e-3)
    assert "Trained for 1 steps" in (tmp_path / "README.md").read_text()


def test_merging_says_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json"):
        merge_checkpoint(tmp_path, tmp_path / "merged")


def test_merging_replaces_another_model_whole_or_leaves_none(start, tmp_path, monkeypatch):
    model = ETChatForConditionalGeneration.from_pretrained(start)
    merged = tmp_path / "merged"
    model.save_pretrained(merged, max_shard_size="1MB")
    (merged / "adapter_config.json").write_text("{}")
    assert len(list(merged.glob("model-*.safetensors"))) > 1
    (merged / "notes.txt").write_text("kept")

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("etchat_hf.training.checkpoints.os.replace", stop)
        merge_checkpoint(start, merged)
    assert not (merged / "config.json").exists()
    merge_checkpoint(start, merged)
    names = {path.name for path in merged.iterdir() if path.suffix != ".py"}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "notes.txt"}


def test_tied_embeddings_stay_tied_through_lora(start, toy_data, tmp_path):
    base = tmp_path / "tied"
    model = ETChatForConditionalGeneration.from_pretrained(start)
    model.config.text_config.tie_word_embeddings = model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(base)
    AutoProcessor.from_pretrained(start).save_pretrained(base)
    trainer = build_trainer(base, toy_data, tmp_path / "out", model_options=LORA, learning_rate=1e-2)
    trainer.train()
    inner = trainer.model.get_base_model()
    assert inner.lm_head.weight is inner.get_input_embeddings().weight
    assert inner.lm_head.weight.requires_grad
    trainer.save_stage()
    loaded = ETChatForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert torch.allclose(loaded.lm_head.weight, inner.lm_head.weight)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_full_weights_are_gone_on_from_bit_for_bit(start, toy_data, tmp_path):
    options = {"model_options": {"tuning_mode": "llm"}, "max_steps": 6, "save_steps": 3, "save_total_limit": 2}
    whole = build_trainer(start, toy_data, tmp_path / "whole", **options)
    whole.train()
    resumed = build_trainer(start, toy_data, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_killed_run_goes_on_bit_for_bit(start, toy_data, tmp_path):
    options = LORA | {
        "max_steps": 12,
        "save_steps": 3,
        "dataloader_num_workers": 1,
        "per_device_train_batch_size": 2,
    }
    run(start, toy_data, tmp_path / "whole", **options)
    delay = random.uniform(0, 1.0)
    killed = tmp_path / "killed"
    run_until_killed(killed / "checkpoint-3", delay, start, toy_data, killed, **options)
    assert not (killed / "model.safetensors").exists()
    run(start, toy_data, killed, resume_from_checkpoint="last", **options)
    whole, resumed = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", killed))
    assert whole.keys() == resumed.keys()
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), f"{name} differs (killed after {delay:.3f} s)"
    histories = [
        json.loads((folder / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
        for folder in (tmp_path / "whole", killed)
    ]
    for name in ("loss", "lm_loss", "match_loss"):
        assert [entry[name] for entry in histories[0]] == [entry[name] for entry in histories[1]]


def test_an_interrupted_write_leaves_no_checkpoint(start, toy_data, tmp_path, monkeypatch):
    trainer = build_trainer(start, toy_data, tmp_path, save_steps=2)

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_save_rng_state", fail)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_finished_run_is_not_trained_further(start, toy_data, tmp_path):
    build_trainer(start, toy_data, tmp_path, max_steps=2).train()
    before = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    again = build_trainer(start, toy_data, tmp_path, max_steps=2)
    assert again.train(resume_from_checkpoint=True).global_step == 2
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    again.save_stage()
    after = load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    longer = build_trainer(start, toy_data, tmp_path, max_steps=3)
    assert longer.train(resume_from_checkpoint=True).global_step == 3


def test_resuming_from_nothing_is_refused(start, toy_data, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: holds no checkpoint to go on from"):
        build_trainer(start, toy_data, tmp_path).train(resume_from_checkpoint=True)


def test_metrics_that_want_logits_are_refused(stage):
    options = {"tuning_mode": "projector", "base_model": "x", "compute_metrics": lambda prediction: {}}
    with pytest.raises(ValueError, match="compute_metrics and preprocess_logits_for_metrics want logits"):
        ETChatTrainer(stage.model, stage.args, processing_class=stage.processing_class, **options)
