"""Rows of one or several sources by position, filtered, encoded; unreadable ones replaced."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch

from etchat_hf.data.annotations import MEDIA_COLUMN, AnnotationFile, open_annotations
from etchat_hf.data.encoding import SampleEncoder
from etchat_hf.data.media import HUB_PREFIX, fetch, locate, opened_clip
from etchat_hf.data.row_index import RowIndex
from etchat_hf.data.rows import MODALITIES, modality_of
from etchat_hf.data.skips import SkipReport, UnusableDataError
from etchat_hf.data.stages import DataSource, StageData
from etchat_hf.video_decoding_etchat import is_url

MAX_TRIES = 10

# What a bad row or file can cause; anything else is a mistake in the code and stops the run.
UNREADABLE = (ValueError, OSError, PIL.Image.DecompressionBombError)


class SampleKey(NamedTuple):
    """What a batch sampler asks for: a row, the epoch it is for, and the rows that may stand in for it."""

    row: int
    epoch: int
    spares: tuple[int, ...]


class SourceRows:
    """
    The rows of one [`DataSource`] that pass its filters; `len`, `modality` `(n,)` `uint8`, `describe`, `read`.

    Raises:
        FileNotFoundError: if annotations are missing.
        ValueError: if they are malformed.
    """

    def __init__(self, source: DataSource):
        self.source = source
        self.files: list[AnnotationFile] = open_annotations(source.annotations)
        kept = [_kept(file.index, source) for file in self.files]
        self.num_before_filters = sum(len(file.index) for file in self.files)
        self.file_of = np.repeat(np.arange(len(kept), dtype=np.int32), [len(rows) for rows in kept])
        self.row_of = np.concatenate(kept).astype(np.int32)
        modalities = [file.index.modality[rows] for file, rows in zip(self.files, kept, strict=True)]
        self.modality = np.concatenate(modalities)

    def __len__(self) -> int:
        return len(self.row_of)

    def describe(self, position: int) -> str:
        return f"{self.files[self.file_of[position]].name} row {self.row_of[position]}"

    def read(self, position: int) -> tuple[dict, str | bytes | None]:
        """The row and its media: a path, bytes, or `None` for text alone. ValueError or OSError if unreadable."""
        row = self.files[self.file_of[position]].read(int(self.row_of[position]))
        packed = row.pop(MEDIA_COLUMN, None)
        modality = modality_of(row)
        if modality == "text" or packed is not None:
            return row, packed
        place = locate(self._root(modality), row[modality])
        return row, fetch(place) if place.startswith(HUB_PREFIX) else place

    def missing_roots(self) -> dict[str, str]:
        """Modality -> what is wrong, where the folder of its media is not there."""
        loose = np.array([not file.is_packed for file in self.files])[self.file_of]
        needed = [MODALITIES[kind] for kind in np.unique(self.modality[loose])]
        roots = {modality: root for modality in needed if (root := self._root(modality)) is not None}
        return {
            modality: f"{root}: no such folder; it is the {modality}_root of {self.source.annotations}"
            for modality, root in roots.items()
            if not is_url(root) and not os.path.isdir(root)
        }

    def _root(self, modality: str) -> str | None:
        return {"image": self.source.image_root, "video": self.source.video_root}.get(modality)


def _kept(index: RowIndex, source: DataSource) -> np.ndarray:
    """Rows that pass the filters; comparisons with a missing duration (NaN) are false, so they pass."""
    dropped = np.zeros(len(index), dtype=bool)
    if source.min_duration is not None:
        dropped |= index.duration < source.min_duration
    if source.max_duration is not None:
        dropped |= index.duration > source.max_duration
    if source.max_words is not None:
        dropped |= index.words > source.max_words
    return np.flatnonzero(~dropped)


class ETChatDataset(torch.utils.data.Dataset):
    """
    Encoded samples of all sources, one source after the other.

    A row that cannot be used is counted, logged and replaced by the next of the key's spares, so that every process
    sees as many batches as planned, and the position alone says what comes next.

    Args:
        sources (sequence of [`DataSource`]): where the rows are.
        encoder ([`SampleEncoder`]): makes samples of them.
        pad_to_square (`bool`, *optional*, defaults to `False`): pad images to squares.
        group_by_modality (`bool`, *optional*, defaults to `False`): whether samplers fill batches from one modality.
        seed (`int`, *optional*, defaults to 0): of everything random, with the epoch and the row.
        max_failure_rate (`float`, *optional*, defaults to 0.05): share of unusable samples above which it stops.
        skip_log (`str` or `Path`, *optional*): JSON Lines file that the skipped ones are appended to.

    Raises:
        FileNotFoundError: if annotations or the folders of their media are missing.
        ValueError: if they are malformed, or no row passes a source's filters.
    """

    def __init__(
        self,
        sources: Sequence[DataSource],
        encoder: SampleEncoder,
        pad_to_square: bool = False,
        group_by_modality: bool = False,
        seed: int = 0,
        max_failure_rate: float = 0.05,
        skip_log: str | Path | None = None,
    ):
        self.sources = [SourceRows(source) for source in sources]
        for rows in self.sources:
            if not len(rows):
                raise ValueError(
                    f"{rows.source.annotations}: none of its {rows.num_before_filters} rows passes the filters."
                )
            if missing := rows.missing_roots():
                raise FileNotFoundError("; ".join(missing.values()))
        self.encoder = encoder
        self.group_by_modality = group_by_modality
        self.seed = seed
        self.epoch = 0
        self.skips = SkipReport(max_failure_rate, skip_log)
        self.modality = np.concatenate([rows.modality for rows in self.sources])
        self._ends = np.cumsum([len(rows) for rows in self.sources])
        self.pad_to_square = pad_to_square

    def __len__(self) -> int:
        return len(self.modality)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate in the main process; workers learn of it from the keys."""
        self.epoch = epoch

    def source_of(self, row: int) -> tuple[SourceRows, int]:
        """The source of a row, and its position there."""
        number = int(np.searchsorted(self._ends, row, side="right"))
        return self.sources[number], row - (int(self._ends[number - 1]) if number else 0)

    def __getitem__(self, key: int | SampleKey) -> dict:
        """
        A sample as [`SampleEncoder`] makes it.

        Raises:
            UnusableDataError: if neither the row nor its spares can be used, or too many could not be used by now.
        """
        if not isinstance(key, SampleKey):
            spares = (np.arange(1, MAX_TRIES) + key) % len(self)
            key = SampleKey(key, self.epoch, tuple(spares.tolist()))
        for row in (key.row, *key.spares):
            sample = self._try(row, key.epoch)
            if sample is not None:
                return sample
        source, position = self.source_of(key.row)
        raise UnusableDataError(
            f"{source.describe(position)} and the {len(key.spares)} rows that could stand in for it are all unusable; "
            f"the last: {self.skips.last_skip}. Run `etchat data check`."
        )

    def _try(self, row: int, epoch: int) -> dict | None:
        source, position = self.source_of(row)
        annotation = {}
        try:
            annotation, media = source.read(position)
            sample = self._encode(annotation, media, np.random.default_rng([self.seed, epoch, row]))
        except UNREADABLE as error:
            self.skips.add_skip(source.describe(position), annotation.get("id"), str(error))
            return None
        self.skips.add_sample(sample.pop("was_cut"))
        return sample

    def _encode(self, row: dict, media: str | bytes | None, rng: np.random.Generator) -> dict:
        if media is None:
            return self.encoder(row, None, rng)
        square_colour = self.encoder.processor.video_processor.image_mean if self.pad_to_square else None
        with opened_clip(media, modality_of(row) == "image", square_colour) as clip:
            return self.encoder(row, clip, rng)

    def counts(self) -> dict[str, int]:
        """Rows per modality."""
        numbers = np.bincount(self.modality, minlength=len(MODALITIES)).tolist()
        return dict(zip(MODALITIES, numbers, strict=True))


def build_dataset(
    stage: StageData,
    processor,
    max_length: int = 2048,
    seed: int = 0,
    max_failure_rate: float = 0.05,
    skip_log: str | Path | None = None,
) -> ETChatDataset:
    """A stage's [`ETChatDataset`]; `processor` must have been through `stage.configure`."""
    encoder = SampleEncoder(processor, max_length, stage.use_matching)
    return ETChatDataset(
        stage.sources, encoder, stage.pad_to_square, stage.group_by_modality, seed, max_failure_rate, skip_log
    )
