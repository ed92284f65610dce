"""The smaller parts of training: fresh heads, the vision cache, evaluation, configuration files."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from trl import TrlParser

from etchat_hf import ETChatForConditionalGeneration, ETChatProcessor
from etchat_hf.data import DataSource, ETChatDataArguments, StageData
from etchat_hf.evaluation import evaluate_etbench
from etchat_hf.inference import ask
from etchat_hf.toy import bundled_checkpoint
from etchat_hf.training import ETChatModelArguments, ETChatTrainingArguments, load_model

from .runs import REPOSITORY, build_trainer

CONFIGS = sorted((REPOSITORY / "examples" / "configs").rglob("*.yaml"))
ACCELERATE = sorted((REPOSITORY / "examples" / "accelerate").glob("*.yaml"))


@pytest.fixture(scope="module")
def model(start):
    return ETChatForConditionalGeneration.from_pretrained(start).eval()


def test_matching_gets_fresh_heads_and_a_mean_row(start):
    model = ETChatForConditionalGeneration.from_pretrained(start)
    rows = model.config.text_config.vocab_size
    embeddings = model.get_input_embeddings().weight.detach().clone()
    model.enable_matching(rows + 1)
    assert model.config.use_matching and model.config.text_config.vocab_size == rows + 2
    for weight in (model.get_input_embeddings().weight, model.lm_head.weight):
        assert weight.shape[0] == rows + 2
        assert torch.allclose(weight[rows + 1], weight[:rows].mean(0))
    assert torch.equal(model.get_input_embeddings().weight[:rows], embeddings)
    assert 0.05 < model.vid_head[1].weight.std() < 0.2  # initializer_range is 0.1
    with pytest.raises(ValueError, match="on already"):
        model.enable_matching(3)


def test_a_vid_token_of_another_model_is_refused(start):
    processor = ETChatProcessor.from_pretrained(start)
    arguments = ETChatModelArguments(model_name_or_path=str(start))
    vocabulary = processor.tokenizer.get_vocab() | {"<vid>": 5}
    processor.tokenizer.get_vocab = lambda: vocabulary
    stage = StageData((DataSource("unread"),), use_matching=True)
    with pytest.raises(ValueError, match="match_token_id is .*, but its tokenizer gives <vid> the id 5"):
        load_model(arguments, processor, stage)
    del vocabulary["<vid>"]
    with pytest.raises(ValueError, match="its tokenizer lacks <vid>"):
        load_model(arguments, processor, stage)


def test_training_skips_logits_and_keeps_the_loss(model, start, toy_data, tmp_path):
    trainer = build_trainer(start, toy_data, tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(3)])
    full = trainer.model.eval()(**batch)
    lean = trainer.model(**batch, skip_logits=True)
    assert lean.logits is None and full.logits is not None
    assert torch.allclose(lean.loss, full.loss, atol=1e-6)
    with pytest.raises(ValueError, match="skip_logits"):
        trainer.model(**{key: value for key, value in batch.items() if key != "labels"}, skip_logits=True)


def test_training_with_the_cache_changes_nothing(start, toy_data, tmp_path):
    plain = build_trainer(start, toy_data, tmp_path / "plain", save_strategy="no")
    plain.train()
    cached = build_trainer(start, toy_data, tmp_path / "out", save_strategy="no", vision_cache_dir=str(tmp_path / "c"))
    cached.train()
    for ours, theirs in zip(cached.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert list((tmp_path / "c").glob("*.safetensors"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_changes_nothing_under_mixed_precision(start, toy_data, tmp_path, dtype):
    histories = []
    for cache in (None, str(tmp_path / "c"), str(tmp_path / "c")):
        trainer = build_trainer(
            start,
            toy_data,
            tmp_path / "out",
            model_options={"dtype": dtype},
            save_strategy="no",
            bf16=True,
            vision_cache_dir=cache,
        )
        trainer.train()
        histories.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert histories[0] == histories[1] == histories[2]


def test_half_precision_trains_and_evaluates(start, toy_data, tmp_path):
    options = {"tuning_mode": "attention", "lora_targets": "attention", "lora_r": 4, "dtype": "bfloat16"}
    trainer = build_trainer(
        start, toy_data, tmp_path, model_options=options, bf16=True, eval_span_samples=2, eval_max_new_tokens=4
    )
    dtypes = {p.requires_grad: set() for p in trainer.model.parameters()}
    for parameter in trainer.model.parameters():
        dtypes[parameter.requires_grad].add(parameter.dtype)
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    with pytest.raises(ValueError, match="set bf16 or fp16, or dtype to float32"):
        build_trainer(start, toy_data, tmp_path, model_options=options)


def test_evaluation_reports_losses_apart_and_iou(start, toy_data, tmp_path):
    trainer = build_trainer(start, toy_data, tmp_path, eval_span_samples=4, eval_max_new_tokens=8)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(
        trainer.state.log_history[-2]["eval_lm_loss"] + trainer.state.log_history[-2]["eval_match_loss"], rel=0.05
    )
    assert {"eval_mIoU", "eval_R@0.7", "eval_TVG"} <= set(metrics)


def test_evaluation_gives_the_scores_of_etbench_for_the_answers_of_inference(toy_data, tmp_path):
    trainer = build_trainer(bundled_checkpoint(), toy_data, tmp_path, eval_span_samples=12, eval_max_new_tokens=64)
    metrics = trainer.evaluate()
    rows, answered = json.loads((toy_data / "stage3.json").read_text())[:12], []
    for number, row in enumerate(rows):
        question, answer = (turn["value"].replace("<image>", "").strip() for turn in row["conversations"])
        if row["task"] in ("tvg", "tal", "tem", "dvc"):
            spans = [row["tgt"][i : i + 2] for i in range(0, len(row["tgt"]), 2)]
            clip = toy_data / "videos" / row["video"]
            said = ask(trainer.model, trainer.processing_class, clip, question, src=row.get("src"))["answer"]
            task = "tvg" if len(spans) == 1 else "tal"
            answered.append(
                {"task": task, "source": "toy", "video": row["video"], "idx": number, "tgt": spans, "a": said}
            )
    scores = evaluate_etbench(answered, "jaccard")
    grounding = scores["by_source"]["tvg"]["toy"]
    assert metrics["eval_TVG"] == scores["overall"]["TVG"] > 0.5
    assert metrics["eval_TAL"] == scores["overall"]["TAL"]
    assert (metrics["eval_mIoU"], metrics["eval_R@0.7"]) == (grounding["mIoU"], grounding["F1@0.7"])


def test_several_evaluation_sets_are_scored_each(start, toy_data, tmp_path):
    trainer = build_trainer(start, toy_data, tmp_path, eval_span_samples=2, eval_max_new_tokens=4)
    trainer.eval_dataset = {"one": trainer.eval_dataset, "two": trainer.eval_dataset}
    metrics = trainer.evaluate()
    assert {"eval_one_loss", "eval_one_match_loss", "eval_two_mIoU"} <= set(metrics)


def test_nothing_is_scored_where_no_answer_is_a_span(toy_data, tmp_path):
    rows = [row for row in json.loads((toy_data / "stage3.json").read_text()) if row["task"] in ("vhd", "rar")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    options = {"rows": tmp_path / "rows.json", "eval_span_samples": 3, "eval_max_new_tokens": 4}
    metrics = build_trainer(bundled_checkpoint(), toy_data, tmp_path / "out", **options).evaluate()
    assert "eval_loss" in metrics and not any("IoU" in name or "TVG" in name for name in metrics)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_configurations_hold_known_fields(path, tmp_path):
    fields = yaml.safe_load(path.read_text())
    extra = {"model_name_or_path": "x", "output_dir": str(tmp_path), "use_cpu": True}
    words = [word for key, value in extra.items() for word in (f"--{key}", str(value))]
    parser = TrlParser((ETChatDataArguments, ETChatModelArguments, ETChatTrainingArguments))
    data, model, training = parser.parse_args_and_config([*words, "--config", str(path)])
    for key, value in fields.items():
        found = next(getattr(group, key) for group in (data, model, training) if hasattr(group, key))
        assert str(getattr(found, "value", found)) == str(value), key


@pytest.mark.parametrize(
    "stage, mode, rate, lora_rate, batch",
    [
        ("stage1", "projector", 1e-3, None, 256),
        ("stage2", "qformer", 2e-5, 2e-4, 128),
        ("stage3", "attention", 2e-5, 5e-5, 32),
    ],
)
def test_published_hyperparameters(stage, mode, rate, lora_rate, batch):
    fields = yaml.safe_load((REPOSITORY / "examples" / "configs" / f"{stage}.yaml").read_text())
    assert fields["tuning_mode"] == mode and fields["learning_rate"] == rate
    assert fields.get("lora_learning_rate") == lora_rate and fields["global_batch_size"] == batch
    assert fields["warmup_steps"] == 0.03 and fields["weight_decay"] == 0 and fields["num_train_epochs"] == 1
    assert ("lora_r" in fields) == (lora_rate is not None)


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.name)
def test_accelerate_reads_its_configurations(path):
    config = load_config_from_file(str(path))
    assert config.num_machines == 1


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_takes_batch_accumulation_and_clipping_from_the_training_arguments(stage, monkeypatch):
    """As far as a CPU without DeepSpeed goes: the way of `accelerate launch` from the file to DeepSpeed's settings."""
    path = REPOSITORY / "examples" / "accelerate" / f"deepspeed_zero{stage}.yaml"
    options = launch_command_parser().parse_args(["--config_file", str(path), "examples/train.py"])
    options, defaults, _ = _validate_launch_command(options)
    assert options.use_deepspeed
    options.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    for name, value in prepare_deepspeed_cmd_env(options)[1].items():
        monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision(os.environ["ACCELERATE_MIXED_PRECISION"])
    settings = plugin.deepspeed_config
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert settings[name] == "auto"
    assert settings["gradient_clipping"] == "auto" and settings["bf16"]["enabled"]
    assert settings["zero_optimization"]["stage"] == stage
    # Checkpoints must hold whole tensors, and models are loaded by transformers in one piece
    assert settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] == (stage == 3)
    assert not plugin.zero3_init_flag


def test_train_py_is_short_and_opens_with_its_command():
    lines = Path(REPOSITORY / "examples" / "train.py").read_text().splitlines()
    assert len(lines) <= 120 and "accelerate launch examples/train.py" in "\n".join(lines[:4])
