"""The model card that a stage ends with."""

import json
from pathlib import Path

CARD = """---
library_name: transformers
pipeline_tag: video-text-to-text
{base_line}tags:
- etchat
- video
- temporal-grounding
---

# {title}

An [E.T. Chat](https://arxiv.org/abs/2409.18111) model: it answers questions about a video and says when, in seconds.
Trained for {steps} steps from `{base}`: tuning mode `{tuning_mode}`{lora}, matching of `<vid>` {matching}.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{place}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{place}", trust_remote_code=True)
content = [{{"type": "video", "path": "video.mp4"}}, {{"type": "text", "text": "When does it happen?"}}]
messages = [{{"role": "user", "content": content}}]
inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
answer = processor.post_process(model.generate(**inputs, return_dict_in_generate=True))[0]
```

| | |
|---|---|
{rows}
"""


def public_name(model: str) -> str:
    """A Hub id as it is; of a folder only the last part, since paths of this machine say nothing elsewhere."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def write_model_card(folder: Path, trainer, steps: int) -> None:
    """Writes README.md about what [`ETChatTrainer`] `trainer` did in its first `steps` steps."""
    args = trainer.args
    lora = trainer.model.peft_config["default"] if hasattr(trainer.model, "peft_config") else None
    history = [entry for entry in trainer.state.log_history if entry["step"] <= steps]
    last = {key: value for entry in history for key, value in entry.items()}
    facts = {
        "samples per step": args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps,
        "learning rate": args.learning_rate,
        "LoRA learning rate": args.lora_learning_rate if lora else None,
        "schedule": f"{args.lr_scheduler_type.value}, warm-up {args.warmup_steps}",
        "epochs": last.get("epoch"),
        **{key: round(last[key], 4) for key in ("lm_loss", "match_loss", "eval_mIoU", "eval_R@0.7") if key in last},
    }
    is_folder = Path(trainer.base_model).is_dir()
    text = CARD.format(
        base=public_name(trainer.base_model),
        base_line="" if is_folder else f"base_model: {trainer.base_model}\n",
        title=args.hub_model_id or args.run_name or public_name(str(folder)),
        place=args.hub_model_id or "path/to/this/folder",
        steps=steps,
        tuning_mode=trainer.tuning_mode,
        lora=f", LoRA of rank {lora.r}" if lora else "",
        matching="on" if trainer.model.config.use_matching else "off",
        rows="\n".join(f"| {key} | {json.dumps(value)} |" for key, value in facts.items() if value is not None),
    )
    (Path(folder) / "README.md").write_text(text, encoding="utf-8")
