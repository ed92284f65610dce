"""What is trained, from what, and how: the two dataclasses behind a training configuration."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..clip_encoder import DEFAULT_MAX_GIB
from .tuning import LORA_TARGETS, TUNING_MODES

DTYPES = ("auto", "float32", "float16", "bfloat16")


@dataclass
class ETChatModelArguments:
    """
    Which model is trained and which of its parameters.

    Args:
        model_name_or_path (`str`):
            Folder or Hub id of a converted checkpoint, of `etchat convert`, or of the previous stage's output.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Dtype of the frozen parameters; `"auto"`: as stored. Trained parameters are held in float32.
        attn_implementation (`str`, *optional*):
            Attention backend of transformers.
        bi_attention (`bool`, *optional*):
            Whether the frames of a placeholder see each other in both directions; by default as the model has it.
        use_time_tag (`bool`, *optional*):
            Whether the Q-Former reads each frame's time; by default as the model has it.
        tuning_mode (`str`, *optional*, defaults to `"projector"`):
            `"projector"`: aggregator and projector; `"attention"`: also the rest of the frame compressor but of the
            Q-Former only attention; `"qformer"`: the whole frame compressor; `"llm"`: all but the vision encoder.
            Where `<vid>` is matched its two heads, the token embeddings and the language-model head are trained too.
        lora_targets (`str`, *optional*):
            `"attention"` or `"linear"`: LoRA on these layers of the language model. By default none.
        lora_r, lora_alpha (`int`, *optional*, default to 128 and 256), lora_dropout (`float`, defaults to 0.05):
            LoRA's rank, scale and dropout.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Whether the language model is frozen in 4 bits by bitsandbytes (QLoRA); needs `lora_targets`.

    Raises:
        ValueError: for options that do not exist or exclude each other.
    """

    model_name_or_path: str = field(metadata={"help": "Folder or Hub id of a converted checkpoint."})
    dtype: str = field(default="auto", metadata={"help": "Dtype of the frozen parameters."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention backend."})
    bi_attention: bool | None = field(default=None, metadata={"help": "Frames see each other in both directions."})
    use_time_tag: bool | None = field(default=None, metadata={"help": "The Q-Former reads each frame's time."})
    tuning_mode: str = field(default="projector", metadata={"help": f"One of {', '.join(TUNING_MODES)}."})
    lora_targets: str | None = field(default=None, metadata={"help": f"One of {', '.join(LORA_TARGETS)}."})
    lora_r: int = field(default=128, metadata={"help": "LoRA's rank."})
    lora_alpha: int = field(default=256, metadata={"help": "LoRA's scale."})
    lora_dropout: float = field(default=0.05, metadata={"help": "LoRA's dropout."})
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: the language model is frozen in 4 bits."})

    def __post_init__(self):
        if self.tuning_mode not in TUNING_MODES:
            raise ValueError(f"tuning_mode is {self.tuning_mode!r}; it must be one of {', '.join(TUNING_MODES)}.")
        if self.lora_targets is not None and self.lora_targets not in LORA_TARGETS:
            raise ValueError(f"lora_targets is {self.lora_targets!r}; it must be one of {', '.join(LORA_TARGETS)}.")
        if self.lora_targets is not None and self.tuning_mode == "llm":
            raise ValueError("tuning_mode 'llm' trains the language model itself; leave lora_targets out.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}.")
        for name in ("lora_r", "lora_alpha"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}; it must be at least 0 and less than 1.")
        if self.load_in_4bit and self.lora_targets is None:
            raise ValueError("load_in_4bit freezes the language model in 4 bits; give lora_targets to train it.")


@dataclass
class ETChatTrainingArguments(TrainingArguments):
    """
    Arguments of [`ETChatTrainer`]. Differs from `TrainingArguments` in these defaults:

    - `remove_unused_columns=False`: the model's inputs are no columns.
    - `lr_scheduler_type="cosine"`, `warmup_steps=0.03` (a share), `num_train_epochs=1`: as all published stages.
    - `activation_checkpointing=True`: of the language model and the Q-Former; the vision encoder keeps nothing anyway.
    - `logging_steps=1`, `save_steps=500`, `save_total_limit=1`, `dataloader_num_workers=4`.
    - `report_to="none"`, `hub_strategy="end"`: a stage is pushed once, when it ends.
    - `ddp_find_unused_parameters=False`: every trained parameter takes part in every batch.

    Args:
        lora_learning_rate (`float`, *optional*):
            Peak learning rate of the LoRA parameters; by default `learning_rate`.
        global_batch_size (`int`, *optional*):
            Samples per optimizer step over all processes; `gradient_accumulation_steps` follows from it, whatever the
            number of processes.
        save_dtype (`str`, *optional*, defaults to `"auto"`):
            Dtype of the merged model at the end; `"auto"`: that of the model that training started from.
        eval_span_samples (`int`, *optional*, defaults to 0):
            Evaluation samples that are answered by generation and, where their answers are spans, scored as E.T. Bench
            does, beside the losses: `eval_TVG` and `eval_TAL` (F1 of answers with one and with several spans), and of
            the former `eval_mIoU`, `eval_R@0.5` and `eval_R@0.7`.
        eval_max_new_tokens (`int`, *optional*, defaults to 256):
            Longest of these answers, in tokens.
        vision_cache_dir (`str`, *optional*):
            Folder in which vision features are kept between uses of the same clip (0.7 MB per frame of the published
            model in float16). By default they are computed anew.
        vision_cache_gib (`float`, *optional*, defaults to 50):
            Size at which that folder takes no more.

    Raises:
        ValueError: for a global batch that does not divide, and for options that a checkpoint's exactness rules out.
    """

    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the data."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up, a share of all steps if below 1."})
    activation_checkpointing: bool | None = field(
        default=True, metadata={"help": "Compute activations again instead of keeping them."}
    )
    logging_steps: float = field(default=1, metadata={"help": "Optimizer steps between two log entries."})
    save_steps: float = field(default=500, metadata={"help": "Optimizer steps between two checkpoints."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints that are kept."})
    dataloader_num_workers: int = field(default=4, metadata={"help": "Processes that decode video, per process."})
    report_to: None | str | list[str] = field(default="none", metadata={"help": "Loggers, such as tensorboard."})
    hub_strategy: str = field(default="end", metadata={"help": "Must stay 'end'."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Not needed."})

    lora_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of LoRA parameters."})
    global_batch_size: int | None = field(default=None, metadata={"help": "Samples per optimizer step, over all."})
    save_dtype: str = field(default="auto", metadata={"help": "Dtype of the merged model."})
    eval_span_samples: int = field(default=0, metadata={"help": "Evaluation samples answered and scored."})
    eval_max_new_tokens: int = field(default=256, metadata={"help": "Longest generated answer in evaluation."})
    vision_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder that keeps vision features, by pixels."}
    )
    vision_cache_gib: float = field(default=DEFAULT_MAX_GIB, metadata={"help": "Largest size of that folder, in GiB."})

    def __post_init__(self):
        super().__post_init__()
        if self.hub_strategy.value != "end":
            raise ValueError(
                f"hub_strategy is {self.hub_strategy.value!r}; a stage is pushed when it ends: use 'end'."
            )
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns would remove the model's inputs; set it to False.")
        if self.accelerator_config.split_batches or self.accelerator_config.dispatch_batches or self.ignore_data_skip:
            raise ValueError(
                "split_batches, dispatch_batches and ignore_data_skip would deal rows out twice or lose their place; "
                "leave them out."
            )
        if not self.average_tokens_across_devices or self.label_smoothing_factor:
            raise ValueError(
                "average_tokens_across_devices=False and label_smoothing_factor would change one part of the loss and "
                "not the other; leave them out."
            )
        if self.save_dtype not in DTYPES:
            raise ValueError(f"save_dtype is {self.save_dtype!r}; it must be one of {', '.join(DTYPES)}.")
        for name in ("per_device_train_batch_size", "global_batch_size", "gradient_accumulation_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        if self.lora_learning_rate is not None and self.lora_learning_rate < 0:
            raise ValueError(f"lora_learning_rate is {self.lora_learning_rate}; it must not be negative.")
        if self.global_batch_size is not None:
            self._derive_accumulation()

    def _derive_accumulation(self):
        at_once = self.per_device_train_batch_size * self.world_size
        if self.global_batch_size % at_once:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is no multiple of {self.world_size} processes x "
                f"per_device_train_batch_size {self.per_device_train_batch_size}; change one of them."
            )
        self.gradient_accumulation_steps = self.global_batch_size // at_once
