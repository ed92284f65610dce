"""The index of an annotation file: where its rows are, and what filters need to know of them; cached."""

import hashlib
import logging
import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from huggingface_hub.constants import HF_HOME

from etchat_hf.data.rows import MODALITIES, duration_of, modality_of, words_of_first_answer

logger = logging.getLogger(__name__)
VERSION = 1  # of the layout below


@dataclass
class RowIndex:
    """
    One entry per row, `(n,)`:

    - **start** (`int64`): the byte that a JSON row begins at, or the row group that a parquet row is in.
    - **extent** (`int32`): the JSON row's length in bytes, or the parquet row's place in its group.
    - **duration** (`float32`): seconds; NaN where there is none.
    - **words** (`int32`): of the first answer.
    - **modality** (`uint8`): index into `MODALITIES`.
    """

    start: np.ndarray
    extent: np.ndarray
    duration: np.ndarray
    words: np.ndarray
    modality: np.ndarray

    def __len__(self) -> int:
        return len(self.start)

    @classmethod
    def collect(cls, located_rows: Iterable[tuple[int, int, dict]]) -> "RowIndex":
        """From (start, extent, row) of each row, of which none is kept."""
        blocks, block = [], []
        for start, extent, row in located_rows:
            kind = MODALITIES.index(modality_of(row))
            block.append((start, extent, duration_of(row), words_of_first_answer(row), kind))
            if len(block) == 1 << 14:
                blocks.append(np.array(block, _RECORD))
                block = []
        table = np.concatenate([*blocks, np.array(block, _RECORD)])
        return cls(**{name: table[name].copy() for name in _RECORD.names})

    def save(self, path: Path, key: str) -> None:
        """Atomically: another process sees the whole file or none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        with open(partial, "wb") as file:
            np.savez(file, key=key, **{field.name: getattr(self, field.name) for field in fields(self)})
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path, key: str) -> "RowIndex | None":
        """`None` if there is no index, it is one of other contents, or it is damaged."""
        if not path.is_file():
            return None
        try:
            with np.load(path) as stored:
                if str(stored["key"]) != key:
                    return None
                return cls(**{field.name: stored[field.name] for field in fields(cls)})
        except (ValueError, EOFError, KeyError, zipfile.BadZipFile):
            logger.warning("%s is damaged; making it again", path)
            return None


_RECORD = np.dtype([("start", "i8"), ("extent", "i4"), ("duration", "f4"), ("words", "i4"), ("modality", "u1")])


def cached_index(source: str, key: str, rows: Iterable[tuple[int, int, dict]]) -> RowIndex:
    """
    The index of a file from its cache, or from `rows` where there is none.

    Args:
        source (`str`): path or URL of the annotations. The cache is beside a local file where that is possible,
            otherwise under `HF_HOME`.
        key (`str`): changes when the contents do.
        rows: iterated only if there is no cache.
    """
    path = _cache_path(source)
    key = f"{VERSION} {key}"
    index = RowIndex.load(path, key)
    if index is None:
        logger.info("indexing %s", source)
        index = RowIndex.collect(rows)
        index.save(path, key)
    return index


def _cache_path(source: str) -> Path:
    folder = Path(source).parent
    if "://" not in source and os.access(folder, os.W_OK):
        return folder / f".{Path(source).name}.index.npz"
    name = source if "://" in source else os.path.abspath(source)
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return Path(HF_HOME) / "etchat_hf" / f"{digest}.index.npz"
