"""Train one stage of E.T. Chat:

    accelerate launch examples/train.py --config examples/configs/stage3.yaml --model_name_or_path OUT2 \\
        --output_dir OUT3

Every field of the argument classes can stand in the YAML file or on the command line, which wins. A run that was
interrupted goes on with `--resume_from_checkpoint last`.
"""

import os
import sys
from pathlib import Path

from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint

from etchat_hf.data import ETChatDataArguments, ETChatDataCollator, UnusableDataError, build_dataset
from etchat_hf.training import (
    ETChatModelArguments,
    ETChatParser,
    ETChatTrainer,
    ETChatTrainingArguments,
    load_model,
    load_processor,
)


def main() -> None:
    parser = ETChatParser((ETChatDataArguments, ETChatModelArguments, ETChatTrainingArguments))
    data_args, model_args, args = parser.parse_args_and_config()

    stage, eval_stage = data_args.resolve(), data_args.resolve_evaluation()
    processor = load_processor(model_args.model_name_or_path, stage)
    options = {
        "max_length": data_args.max_length,
        "seed": args.seed if args.data_seed is None else args.data_seed,
        "max_failure_rate": data_args.max_failure_rate,
    }
    checkpoint = find_checkpoint(args)
    logs = [Path(args.output_dir, name) for name in ("skipped_samples.jsonl", "skipped_eval_samples.jsonl")]
    if checkpoint is None and args.process_index == 0:
        for log in logs:
            log.unlink(missing_ok=True)
    with args.main_process_first(desc="index of the annotations"):
        dataset = build_dataset(stage, processor, skip_log=logs[0], **options)
        eval_dataset = build_dataset(eval_stage, processor, skip_log=logs[1], **options) if eval_stage else None

    set_seed(args.seed)  # heads and LoRA start fresh, and alike in all processes
    trainer = ETChatTrainer(
        load_model(model_args, processor, stage),
        args,
        processing_class=processor,
        tuning_mode=model_args.tuning_mode,
        base_model=model_args.model_name_or_path,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        data_collator=ETChatDataCollator(processor),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_stage()
    if trainer.is_world_process_zero():
        print(dataset.skips.summary())
        if eval_dataset is not None:
            print("evaluation:", eval_dataset.skips.summary())


def find_checkpoint(args: ETChatTrainingArguments) -> str | None:
    """
    The checkpoint to go on from; `last`, where there is none yet, begins anew and says so.

    Raises:
        ValueError: for checkpoints of an earlier run, which the new ones would be mixed and rotated with.
    """
    last = get_last_checkpoint(args.output_dir) if os.path.isdir(args.output_dir) else None
    if args.resume_from_checkpoint is None and last is not None:
        raise ValueError(
            f"{last} is of an earlier run; go on from it with --resume_from_checkpoint last, or give another "
            "--output_dir."
        )
    if args.resume_from_checkpoint != "last":
        return args.resume_from_checkpoint
    if last is None:
        print(f"train.py: {args.output_dir} holds no checkpoint; beginning anew.", file=sys.stderr)
    return last


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError, UnusableDataError) as error:
        sys.exit(f"train.py: error: {' '.join(str(error).split())}")
