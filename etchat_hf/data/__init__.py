"""Training data: what the stages train on, and the way of a row from its annotation file into a batch.

    DataSource -> annotations (row index) -> ETChatDataset -> SampleEncoder -> ETChatDataCollator -> model
                                                ^ ETChatBatchSampler: which rows, in which order

Only an index of the annotations is held in memory (30 bytes a row), so the dataset is a *map-style* one: rows are
read by position, and everything that a stream makes hard is arithmetic. A `Trainer` shards, skips and resumes it
exactly by index, without reading what was consumed, and knows its length. What a trainer does:

    data_args: ETChatDataArguments              # TrlParser((ETChatDataArguments, ETChatTrainingArguments, ...))
    stage = data_args.resolve()                 # StageData; ValueError, FileNotFoundError on impossible options
    stage.configure(processor)                  # chat template of conv_type, and fps; saved with the processor
    with training_args.main_process_first():    # the first process writes the index, the others read it
        dataset = build_dataset(stage, processor, max_length=data_args.max_length, seed=training_args.data_seed,
                                max_failure_rate=data_args.max_failure_rate,
                                skip_log=f"{output_dir}/skipped_samples.jsonl")
    collator = ETChatDataCollator(processor)

    def get_train_dataloader(self):             # in the Trainer; everything else of it stays as it is
        args = self.args
        sampler = ETChatBatchSampler(
            self.train_dataset, batch_size=self._train_batch_size, world_size=args.world_size,
            global_batch_size=self._train_batch_size * args.world_size * args.gradient_accumulation_steps,
        )
        loader = DataLoader(self.train_dataset, batch_sampler=sampler, collate_fn=self.data_collator,
                            num_workers=args.dataloader_num_workers, pin_memory=args.dataloader_pin_memory)
        return self.accelerator.prepare(loader) # accelerate deals the whole batches out to the processes

    dataset.skips.summary()                     # text: samples read, skipped (by reason), answers cut

`stage.use_matching` says whether rows hold `<vid>` with times; it must equal `model.config.use_matching`. Set
`remove_unused_columns=False`, and leave `ignore_data_skip`, `dispatch_batches` and `split_batches` at False: then
`Trainer` resumes exactly, with any number of loader workers, and global batches of equal size hold the same rows
whatever the number of processes. `dataset[i]` with a plain `int` works too, so that stock evaluation loaders do.

A batch holds what `ETChatForConditionalGeneration.forward` takes: `input_ids`, `attention_mask`, `labels`, and where
there are clips `pixel_values`, `frame_times`, `placeholder_clips`, `qformer_input_ids`, `qformer_attention_mask`, and
where there are `<vid>` `vid_times`.
"""

from typing import TYPE_CHECKING

from ..lazy_names import lazy_names

if TYPE_CHECKING:
    from .collator import ETChatDataCollator
    from .dataset import ETChatDataset, SampleKey, build_dataset
    from .encoding import SampleEncoder
    from .sampler import ETChatBatchSampler
    from .skips import UnusableDataError
    from .stages import STAGES, DataSource, ETChatDataArguments, StageData

__all__ = [
    "STAGES",
    "DataSource",
    "ETChatBatchSampler",
    "ETChatDataArguments",
    "ETChatDataCollator",
    "ETChatDataset",
    "SampleEncoder",
    "SampleKey",
    "StageData",
    "UnusableDataError",
    "build_dataset",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "DataSource": "stages",
        "ETChatBatchSampler": "sampler",
        "ETChatDataArguments": "stages",
        "ETChatDataCollator": "collator",
        "ETChatDataset": "dataset",
        "STAGES": "stages",
        "SampleEncoder": "encoding",
        "SampleKey": "dataset",
        "StageData": "stages",
        "UnusableDataError": "skips",
        "build_dataset": "dataset",
    },
)
