"""Which rows come in which batch: a seeded order per epoch, computed, not read."""

import math
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from etchat_hf.data.dataset import MAX_TRIES, ETChatDataset, SampleKey

LOOKAHEAD = 8 * MAX_TRIES  # batches of a process among which stand-ins for an unreadable row are looked for


class ETChatBatchSampler(Sampler):
    """
    The batches of *all* processes in turn: batch `k` is for process `k % world_size`, as accelerate deals them out.

    Every global batch is full: rows are repeated at the end where the numbers do not work out, fewer than
    `global_batch_size` of each modality. So process counts and accumulation that lead to the same `global_batch_size`
    lead to the same global batches.

    The position is all there is to know: skipping the first `k` batches (accelerate's `skip_first_batches`) reads none
    of them, and goes on exactly as if they had been read.

    Args:
        dataset ([`ETChatDataset`]): the rows; its `epoch` and `seed` set the order. With its `group_by_modality` each
            global batch is of one modality.
        batch_size (`int`): rows per process and forward pass.
        world_size (`int`, *optional*, defaults to 1): processes.
        global_batch_size (`int`, *optional*): rows per optimizer step, over processes and accumulation; default: one
            forward pass of all processes.
        shuffle (`bool`, *optional*, defaults to `True`): otherwise in the order of the files.

    Raises:
        ValueError: if `global_batch_size` is not a multiple of `batch_size * world_size`.
    """

    def __init__(
        self,
        dataset: ETChatDataset,
        batch_size: int,
        world_size: int = 1,
        global_batch_size: int | None = None,
        shuffle: bool = True,
    ):
        self.global_batch_size = global_batch_size or batch_size * world_size
        if self.global_batch_size % (batch_size * world_size):
            raise ValueError(
                f"global_batch_size ({self.global_batch_size}) must be a multiple of batch_size * world_size "
                f"({batch_size} * {world_size})."
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.world_size = world_size
        self.shuffle = shuffle
        self.drop_last = True  # read by accelerate: there is no incomplete batch to fill up
        self._kinds = dataset.modality if dataset.group_by_modality else np.zeros_like(dataset.modality)
        self._strata = [
            (np.flatnonzero(self._kinds[start:end] == kind) + start, rows.source.weight)
            for rows, start, end in _extents(dataset)
            for kind in np.unique(self._kinds[start:end])
        ]

    def __len__(self) -> int:
        drawn = {}
        for rows, weight in self._strata:
            kind = self._kinds[rows[0]]
            drawn[kind] = drawn.get(kind, 0) + _num_draws(rows, weight)
        steps = sum(math.ceil(number / self.global_batch_size) for number in drawn.values())
        return steps * (self.global_batch_size // self.batch_size)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch = self.dataset.epoch
        batches = self.batches(epoch)
        kinds = self._kinds[batches[:, 0]]
        steps = np.arange(1, LOOKAHEAD) * self.world_size
        for number, batch in enumerate(batches):
            later = (number + steps) % len(batches)
            later = later[kinds[later] == kinds[number]][: MAX_TRIES - 1]
            spares = zip(*batches[later].tolist(), strict=True) if len(later) else [()] * self.batch_size
            yield [SampleKey(row, epoch, stand_ins) for row, stand_ins in zip(batch.tolist(), spares, strict=True)]

    def batches(self, epoch: int) -> np.ndarray:
        """Rows of all batches of an epoch, `int64` `(len(self), batch_size)`."""
        rng = np.random.default_rng([self.dataset.seed, epoch])
        rows = np.concatenate([_draw(rows, weight, rng) for rows, weight in self._strata])
        rows = rng.permutation(rows) if self.shuffle else np.sort(rows, kind="stable")
        steps = []
        for kind in np.unique(self._kinds[rows]):
            of_kind = rows[self._kinds[rows] == kind]
            number = math.ceil(len(of_kind) / self.global_batch_size)
            steps.append(np.resize(of_kind, (number, self.global_batch_size)))
        if self.shuffle and len(steps) > 1:
            steps = [rng.permutation(np.concatenate(steps))]
        return np.concatenate(steps).reshape(-1, self.batch_size)


def _extents(dataset: ETChatDataset):
    start = 0
    for rows in dataset.sources:
        yield rows, start, start + len(rows)
        start += len(rows)


def _num_draws(rows: np.ndarray, weight: float) -> int:
    return max(1, round(len(rows) * weight))


def _draw(rows: np.ndarray, weight: float, rng: np.random.Generator) -> np.ndarray:
    """All rows as often as fits in the weight, and a random part of them for the rest."""
    copies, more = divmod(_num_draws(rows, weight), len(rows))
    return np.concatenate([np.tile(rows, copies), rng.permutation(rows)[:more]])
