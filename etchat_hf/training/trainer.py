"""`Trainer` for E.T. Chat: one loss of two parts, few overridden hooks."""

import os
import shutil
from pathlib import Path

import torch
from accelerate.utils import gather_object
from huggingface_hub import HfApi
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, get_last_checkpoint, rotate_checkpoints
from transformers.utils import logging

from ..clip_encoder import ClipEncoder
from ..data import ETChatBatchSampler, ETChatDataset
from ..data.encoding import IGNORED
from ..loader_workers import leave_with_parent
from .arguments import ETChatTrainingArguments
from .checkpoints import check_same_training, merge_checkpoint, write_model_files, write_settings
from .model import check_vid_token, stored_dtype
from .model_card import public_name, write_model_card
from .span_evaluation import answer_sample, score_samples
from .tuning import set_trained

logger = logging.get_logger(__name__)

LOSS_PARTS = ("lm_loss", "match_loss")


class ETChatTrainer(Trainer):
    """
    Trains [`ETChatForConditionalGeneration`], or a `PeftModel` around it, as [`load_model`] returned it.

    Beyond `Trainer`: the match loss is normalised by the samples with targets of all processes and accumulation
    steps, as the LM loss is by their tokens; both are logged apart; LoRA has its own learning rate; checkpoints appear
    at once and load on their own; [`save_stage`] writes the merged model.

    Args:
        model: see above.
        args ([`ETChatTrainingArguments`]): see there.
        processing_class ([`ETChatProcessor`]): saved with every checkpoint.
        tuning_mode (`str`): which parameters are trained; see [`ETChatModelArguments`].
        base_model (`str`): folder or Hub id that training started from.
        kwargs: those of `Trainer`, but for `compute_metrics` and `preprocess_logits_for_metrics`: there are no logits.
            With an [`ETChatDataset`] as `train_dataset` its batch sampler is used.

    Raises:
        ValueError: if the processor's `<vid>` is not the model's, or arguments do not suit the model.
    """

    def __init__(self, model, args: ETChatTrainingArguments, *, processing_class, tuning_mode, base_model, **kwargs):
        self.tuning_mode = tuning_mode
        self.base_model = base_model
        self._aside = None
        self._num_matched = None
        self._parts = {}
        self._parts_since = 0
        super().__init__(model, args, processing_class=processing_class, **kwargs)
        if self.compute_metrics is not None or self.preprocess_logits_for_metrics is not None:
            raise ValueError(
                "compute_metrics and preprocess_logits_for_metrics want logits, which are not computed; set "
                "eval_span_samples for scores of answers."
            )
        if model.config.use_matching:
            check_vid_token(model.config, processing_class, base_model)
        if args.lora_learning_rate is not None and not hasattr(model, "peft_config"):
            raise ValueError(
                f"lora_learning_rate is {args.lora_learning_rate}, but there is no LoRA; set lora_targets too."
            )
        self._check_precision()
        self._check_sharding()
        self._vision_cache = None
        if args.vision_cache_dir is not None:
            self._vision_cache = ClipEncoder(
                self._etchat, processing_class, args.vision_cache_dir, args.vision_cache_gib
            )

    def _check_precision(self) -> None:
        frozen = {
            parameter.dtype
            for parameter in self.model.parameters()
            if not parameter.requires_grad and parameter.is_floating_point()  # quantised ones are not
        }
        mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision, torch.float32)
        if frozen - {torch.float32, mixed}:
            raise ValueError(
                f"{self.base_model}: frozen parameters are {', '.join(map(str, frozen))}, trained ones float32, and "
                f"mixed precision is {self.accelerator.mixed_precision!r}; set bf16 or fp16, or dtype to float32."
            )

    def _check_sharding(self) -> None:
        sharded = self.is_fsdp_enabled or self._zero_stage == 3
        for name in ("eval_span_samples", "vision_cache_dir"):
            if sharded and getattr(self.args, name):
                raise ValueError(
                    f"{name} lets each process run the model at its own pace, which sharded parameters rule out; "
                    "leave it out or train by DDP or ZeRO-2."
                )

    @property
    def _zero_stage(self) -> int:
        return self.accelerator.deepspeed_plugin.zero_stage if self.is_deepspeed_enabled else 0

    @property
    def _etchat(self):
        """The model inside PEFT and the wrappers of distributed training."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "peft_config") else model

    # ---- Data ----

    def get_train_dataloader(self) -> DataLoader:
        args = self.args
        sampler = ETChatBatchSampler(
            self.train_dataset,
            batch_size=self._train_batch_size,
            world_size=args.world_size,
            global_batch_size=self._train_batch_size * args.world_size * args.gradient_accumulation_steps,
        )
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            worker_init_fn=leave_with_parent,
        )
        return self.accelerator.prepare(loader)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        loader = super().get_eval_dataloader(eval_dataset)
        loader.worker_init_fn = leave_with_parent
        return loader

    def _prepare_inputs(self, inputs: dict) -> dict:
        inputs = super()._prepare_inputs(inputs)
        if self._vision_cache is not None and "pixel_values" in inputs:
            pixels = inputs.pop("pixel_values")
            inputs["vision_features"] = self._vision_cache.encode_frames(pixels, inputs["frame_times"])
        return inputs

    # ---- Loss ----

    def _get_num_items_in_batch(self, batch_samples: list, device) -> torch.Tensor | int | None:
        self._num_matched = None
        if self.model.config.use_matching and batch_samples:
            token = self.model.config.match_token_id
            matched = sum(_num_matched(batch["labels"], token) for batch in batch_samples).to(device)
            # Without any target the sum is 0 as well
            self._num_matched = self.accelerator.gather(matched).sum().clamp(min=1)
        return super()._get_num_items_in_batch(batch_samples, device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {**inputs, "skip_logits": True}
        if self._num_matched is not None:
            inputs = {**inputs, "num_matched_samples_in_batch": self._num_matched}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if not self._parts:  # the first batch since the last entry of the log, also after a resume
            self._parts_since = self.state.global_step
        for name in LOSS_PARTS:
            if (part := outputs[name] if name in outputs else None) is not None:
                # Like the loss itself: the mean over processes of what each one counts for.
                self._parts[name] = self._parts.get(name, 0.0) + part.detach().float() * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            steps = max(self.state.global_step - self._parts_since, 1)
            logs |= {name: self.accelerator.gather(total).mean().item() / steps for name, total in self._parts.items()}
            self._parts = {}
        super().log(logs, start_time)

    # ---- Optimizer ----

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        model = self.model if model is None else model
        if self.optimizer is None:
            groups = parameter_groups(model, self.get_decay_parameter_names(model), self.args)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    # ---- Evaluation ----

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self._evaluated = torch.zeros(len(LOSS_PARTS), 2, device=self.args.device)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        # Once for the whole set: means of batches would depend on how it is split, and on batches without targets
        sums, counts = self.accelerator.reduce(self._evaluated, "sum").T
        losses = dict(zip(LOSS_PARTS, (sums / counts.clamp(min=1)).tolist(), strict=True))
        if not self.model.config.use_matching:
            del losses["match_loss"]
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in losses.items()})
        output.metrics[f"{metric_key_prefix}_loss"] = sum(losses.values())
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        labels = self._without_copies(inputs["labels"])
        # Divided by 1, the losses are sums over tokens and over samples with targets
        inputs |= {"labels": labels, "num_items_in_batch": 1, "num_matched_samples_in_batch": 1, "skip_logits": True}
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        parts = [(outputs["lm_loss"], (labels[:, 1:] != IGNORED).sum())]
        if self.model.config.use_matching:
            parts.append((outputs["match_loss"], _num_matched(labels, self.model.config.match_token_id)))
        for row, part in enumerate(parts):
            self._evaluated[row] += torch.stack([value.float() for value in part])
        return outputs["loss"].detach(), None, None

    def _without_copies(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels of no row that fills up the last batch of several processes: it is counted in another place."""
        state = self.accelerator.gradient_state
        if not (state.end_of_dataloader and state.remainder > 0):
            return labels
        first = self.args.process_index * len(labels)
        places = torch.arange(first, first + len(labels), device=labels.device)
        return labels.masked_fill(places[:, None] >= state.remainder, IGNORED)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if self.args.eval_span_samples and not isinstance(dataset, dict):  # of several, each is evaluated by its name
            spans = self._score_spans(self.eval_dataset[dataset] if isinstance(dataset, str) else dataset)
            spans = {f"{metric_key_prefix}_{name}": value for name, value in spans.items()}
            self.log(spans)
            metrics |= spans
        return metrics

    def _score_spans(self, dataset) -> dict[str, float]:
        """Answers by generation, every process its share."""
        number = min(self.args.eval_span_samples, len(dataset))
        model = self.accelerator.unwrap_model(self.model)
        answered = []
        with self.accelerator.autocast():
            for index in range(self.args.process_index, number, self.args.world_size):
                batch = self._prepare_inputs(self.data_collator([dataset[index]]))
                row = answer_sample(model, self.processing_class, batch, self.args.eval_max_new_tokens)
                if row is not None:
                    answered.append(row | {"idx": index, "video": f"sample {index}"})
        return score_samples(gather_object(answered))

    # ---- Checkpoints ----

    def _get_output_dir(self, trial) -> str:
        return self._aside or super()._get_output_dir(trial)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """
        As `Trainer.train`; of a run that was finished already nothing is trained.

        Raises:
            FileNotFoundError: if there is no such checkpoint.
            ValueError: if training cannot go on from it exactly: it holds a model only, or what `_settings` tells has
                changed.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise FileNotFoundError(f"{self.args.output_dir}: holds no checkpoint to go on from.")
        if resume_from_checkpoint:
            check_same_training(Path(resume_from_checkpoint), self._settings())
            state = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME))
            if self._is_finished(state):  # Trainer would take one more step
                logger.warning("%s: this run is finished; nothing is trained", resume_from_checkpoint)
                self.state = state
                return TrainOutput(state.global_step, 0.0, {})
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _is_finished(self, state: TrainerState) -> bool:
        if self.args.max_steps > 0:
            return state.global_step >= self.args.max_steps
        return state.global_step >= state.max_steps and state.num_train_epochs >= self.args.num_train_epochs

    def _settings(self) -> dict:
        """What trained parameters, optimizer and the order of the rows depend on; of the rows only their numbers."""
        args = self.args
        settings = {
            "tuning_mode": self.tuning_mode,
            "lora": None,
            "learning rates": [args.learning_rate, args.lora_learning_rate],
            "samples per step": args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps,
        }
        if hasattr(self.model, "peft_config"):
            lora = self.model.peft_config["default"]
            settings["lora"] = {"targets": lora.target_modules, "r": lora.r, "alpha": lora.lora_alpha}
        if isinstance(self.train_dataset, ETChatDataset):
            settings["seed of the order"] = self.train_dataset.seed
            settings["grouped by modality"] = self.train_dataset.group_by_modality
            settings["rows"] = [len(rows) for rows in self.train_dataset.sources]
            settings["weights"] = [rows.source.weight for rows in self.train_dataset.sources]
        return settings

    def _save_checkpoint(self, model, trial) -> None:
        folder = super()._get_output_dir(trial)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        aside = os.path.join(folder, ".writing")
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._aside = aside
        super()._save_checkpoint(model, trial)
        self._aside = None
        self.accelerator.wait_for_everyone()
        if self.state.best_model_checkpoint == os.path.join(aside, name):
            self.state.best_model_checkpoint = os.path.join(folder, name)
            if self.args.should_save:
                self.state.save_to_json(os.path.join(aside, name, TRAINER_STATE_NAME))
        if self.args.should_save:
            if not self.args.save_only_model:
                write_settings(Path(aside, name), self._settings())
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
            os.replace(os.path.join(aside, name), os.path.join(folder, name))
            os.rmdir(aside)
            rotate_checkpoints(folder, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not (self._zero_stage == 3 and hasattr(self.model, "peft_config")):
            return super().save_model(output_dir, _internal_call)
        # Trainer would leave frozen parameters out, of which some belong to modules that PEFT saves whole
        self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.deepspeed))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            write_model_files(self._etchat, output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        # PEFT marks whole modules as trained when it loads them.
        set_trained(self.model if model is None else model, self.tuning_mode)

    def save_stage(self) -> Path:
        """
        Writes the stage's result into `output_dir`: the last checkpoint (with `load_best_model_at_end` the best one)
        merged into one model, the processor, the code and a model card; and pushes it with `push_to_hub`. To be called
        by all processes.

        Returns:
            `Path`: `output_dir`.
        """
        folder = Path(self.args.output_dir)
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            checkpoint = Path(self.state.best_model_checkpoint)
        elif not checkpoint.is_dir():
            self._save_checkpoint(self.model_wrapped, None)
        steps = int(checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"))
        unset_hf_deepspeed_config()  # with it, ZeRO-3 would wait for the others while this process loads the model
        if self.is_world_process_zero():
            name = self.args.save_dtype
            dtype = stored_dtype(self.base_model) if name == "auto" else getattr(torch, name)
            merge_checkpoint(checkpoint, folder, dtype)
            self.processing_class.save_pretrained(folder)
            write_model_card(folder, self, steps)
            if self.args.push_to_hub:
                self._push_stage(folder, steps)
        self.accelerator.wait_for_everyone()
        return folder

    def _push_stage(self, folder: Path, steps: int) -> None:
        HfApi(token=self.args.hub_token).upload_folder(
            repo_id=self.hub_model_id,
            folder_path=folder,
            ignore_patterns=[f"{PREFIX_CHECKPOINT_DIR}-*", ".*", "runs/*", "*.jsonl"],
            commit_message=f"Stage of {steps} steps from {public_name(self.base_model)}",
            revision=self.args.hub_revision,
        )


def _num_matched(labels: torch.Tensor, match_token_id: int) -> torch.Tensor:
    """How many samples have a `<vid>` to match."""
    return (labels[:, 1:] == match_token_id).any(1).sum()


def parameter_groups(model, decayed: list[str], args: ETChatTrainingArguments) -> list[dict]:
    """Trained parameters by learning rate (LoRA has its own) and weight decay (none on biases and norms)."""
    lora_rate = args.learning_rate if args.lora_learning_rate is None else args.lora_learning_rate
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = []
    for is_lora, rate in ((False, args.learning_rate), (True, lora_rate)):
        for is_decayed, decay in ((True, args.weight_decay), (False, 0.0)):
            parameters = [p for n, p in trained if ("lora_" in n) == is_lora and (n in decayed) == is_decayed]
            if parameters:
                groups.append({"params": parameters, "lr": rate, "weight_decay": decay})
    return groups
