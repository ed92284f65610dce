"""Train one stage of E.T. Chat:

    accelerate launch examples/train.py --config examples/configs/stage3.yaml --model_name_or_path OUT2 \\
        --output_dir OUT3

Every field of the argument classes can stand in the YAML file or on the command line, which wins. A run that was
interrupted goes on with `--resume_from_checkpoint last`.
"""

import sys
from dataclasses import dataclass, field, replace

from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import TrlParser

from etchat_hf import ETChatProcessor
from etchat_hf.data import ETChatDataArguments, ETChatDataCollator, build_dataset
from etchat_hf.training import ETChatModelArguments, ETChatTrainer, ETChatTrainingArguments, load_model


@dataclass
class EvaluationDataArguments:
    """Annotations to evaluate on, with the media of the training data."""

    eval_annotations: str | None = field(default=None, metadata={"help": "File of annotations to evaluate on."})


def main() -> None:
    parser = TrlParser((ETChatDataArguments, ETChatModelArguments, ETChatTrainingArguments, EvaluationDataArguments))
    data_args, model_args, args, eval_args = parser.parse_args_and_config()

    stage = data_args.resolve()
    processor = ETChatProcessor.from_pretrained(model_args.model_name_or_path)
    stage.configure(processor)
    set_seed(args.seed)  # heads and LoRA start fresh, and alike in all processes
    model = load_model(model_args, processor, stage)

    seed = args.seed if args.data_seed is None else args.data_seed
    options = {"max_length": data_args.max_length, "seed": seed, "max_failure_rate": data_args.max_failure_rate}
    with args.main_process_first(desc="index of the annotations"):
        log = f"{args.output_dir}/skipped_samples.jsonl"
        dataset = build_dataset(stage, processor, skip_log=log, **options)
        eval_dataset = None
        if eval_args.eval_annotations is not None:
            eval_stage = replace(data_args, annotations=[eval_args.eval_annotations], weights=None).resolve()
            eval_dataset = build_dataset(eval_stage, processor, **options)

    trainer = ETChatTrainer(
        model,
        args,
        processing_class=processor,
        tuning_mode=model_args.tuning_mode,
        base_model=model_args.model_name_or_path,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        data_collator=ETChatDataCollator(processor),
    )
    checkpoint = args.resume_from_checkpoint
    if checkpoint == "last":
        checkpoint = get_last_checkpoint(args.output_dir)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_stage()
    if trainer.is_world_process_zero():
        print(dataset.skips.summary())


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: error: {' '.join(str(error).split())}")
