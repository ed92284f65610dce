"""FSDP2 on two processes: shards, trains as one process does, saves, and goes on."""

import json
import subprocess
import sys

import torch
from safetensors.torch import load_file

from .runs import REPOSITORY, build_trainer, command, environment

LORA = {"tuning_mode": "attention", "lora_targets": "attention", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


def launch(start, toy_data, output, **options):
    words = command(start, toy_data, output, processes=2, script="tests/training/fsdp_worker.py", **options)
    fsdp = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "Phi3DecoderLayer,InstructBlipQFormerLayer,InstructBlipEncoderLayer",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    }
    result = subprocess.run(
        words, env=environment(**fsdp), cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def test_fsdp2_shards_trains_saves_and_resumes(start, toy_data, tmp_path):
    options = LORA | {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "save_total_limit": 2}
    printed = launch(start, toy_data, tmp_path / "fsdp", **options)
    sharded = json.loads(next(line for line in printed.splitlines() if line.startswith("sharded:"))[8:])
    assert sharded["local"] < 0.6 * sharded["full"]

    alone = build_trainer(start, toy_data, tmp_path / "alone", model_options=LORA, max_steps=4)
    alone.train()
    alone.save_stage()
    history = json.loads((tmp_path / "fsdp" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    for ours, theirs in zip(history, alone.state.log_history, strict=False):
        if "loss" in theirs:
            assert abs(ours["loss"] - theirs["loss"]) < 1e-4
    merged, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("fsdp", "alone"))
    assert merged.keys() == expected.keys()
    for name in merged:
        assert torch.allclose(merged[name], expected[name], atol=1e-3), name

    again = tmp_path / "again"
    checkpoint = tmp_path / "fsdp" / "checkpoint-2"
    launch(start, toy_data, again, resume_from_checkpoint=checkpoint, **options)
    resumed = load_file(again / "model.safetensors")
    for name in merged:
        assert torch.allclose(resumed[name], merged[name], atol=1e-6), name


GENERATING = """
import sys
import torch.distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from etchat_hf import ETChatForConditionalGeneration, ETChatProcessor
from etchat_hf.toy import bundled_checkpoint

torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=0, world_size=1)
processor = ETChatProcessor.from_pretrained(bundled_checkpoint())
content = [{"type": "video", "path": sys.argv[1]}, {"type": "text", "text": "When is the red square visible?"}]
inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
                                       tokenize=True, return_dict=True)
answers = []
for is_sharded in (False, True):
    model = ETChatForConditionalGeneration.from_pretrained(bundled_checkpoint()).eval()
    if is_sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)), reshard_after_forward=True)
    # Answers that end after <vid> and elsewhere
    outputs = [model.generate(**inputs, max_new_tokens=n, return_dict_in_generate=True) for n in range(1, 9)]
    answers.append([[(match.position, match.frame) for match in output.matches[0]] for output in outputs])
assert answers[0] == answers[1] and any(answers[0]), answers
torch.distributed.destroy_process_group()
"""


def test_a_sharded_model_matches_the_same_frames(toy_data, tmp_path):
    video = next((toy_data / "videos").iterdir())
    command = [sys.executable, "-c", GENERATING, str(video), str(tmp_path / "store")]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
