"""Annotation files as sequences of rows, read by position; only their index is in memory.

A plain streaming reader takes 30 s and 5 GB before the first row of a 600 MB JSON array, and cannot shuffle a file
without losing rows when it resumes. One pass for an index (3 s, kept for the next time) makes both easy.
"""

import functools
import glob
import json
import os
import re
from collections.abc import Iterator
from typing import BinaryIO, Protocol

import fsspec

from etchat_hf.data.media import HUB_PREFIX, fetch
from etchat_hf.data.row_index import RowIndex, cached_index

MEDIA_COLUMN = "media"
CHUNK_BYTES = 8 << 20
MAX_ROW_BYTES = 64 << 20  # a row that is not over by then is broken, and searching on would fill the memory
OPENING = re.compile(r"(?:\xef\xbb\xbf)?\s*(?P<array>\[)?")  # after an optional byte order mark
COMMA = re.compile(r"\s*,\s*")
SPACE = re.compile(r"\s*")
CLOSING = re.compile(r"\s*\]\s*")
SUFFIXES = (".json", ".jsonl", ".parquet")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class AnnotationFile(Protocol):
    """Rows of one file: `index` says where they are, `is_packed` whether they carry their clips' bytes as `media`."""

    name: str
    index: RowIndex
    is_packed: bool

    def read(self, position: int) -> dict:
        """The row; ValueError or OSError if it is not readable."""

    def read_all(self) -> Iterator[dict | ValueError]:
        """Every row in order, without `media`; for one that is not readable its error, which is raised if of many."""


def open_annotations(annotations: str) -> list[AnnotationFile]:
    """
    The files that `DataSource.annotations` names, in the order of their names.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if one is malformed, or is neither JSON nor parquet.
    """
    return [_open_file(path) for path in list_files(annotations)]


def list_files(annotations: str) -> list[str]:
    """Paths and `hf://` URLs; raises as [`open_annotations`]."""
    if annotations.startswith(HUB_PREFIX):
        return [annotations]
    found = [annotations] if os.path.isfile(annotations) else sorted(glob.glob(annotations, recursive=True))
    files = [path for path in found if os.path.isfile(path)]
    if files:
        return files
    is_id = HUB_ID.fullmatch(annotations) and not annotations.endswith(SUFFIXES)
    if is_id or os.path.isdir(annotations):
        return _files_of_dataset(annotations)
    raise FileNotFoundError(
        f"{annotations}: no such annotation file; check the path (or data_root), or give a Hub dataset id."
    )


def _files_of_dataset(name: str) -> list[str]:
    # Heavy, and needed for nothing else
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetNotFoundError

    try:
        data_files = load_dataset_builder(name).config.data_files
    except DatasetNotFoundError as error:
        raise FileNotFoundError(f"{name}: neither an annotation file nor a dataset on the Hub ({error}).") from error
    # Loose videos may be in the same repository
    files = sorted(path for path in map(str, (data_files or {}).get("train", ())) if path.endswith(SUFFIXES))
    if not files:
        raise ValueError(
            f"{name}: this dataset has no annotations for a train split; name a file as hf://datasets/{name}/FILE."
        )
    return files


def _open_file(path: str) -> AnnotationFile:
    if path.endswith(".parquet"):
        return ParquetRows(path)
    if path.endswith(SUFFIXES):
        return JsonRows(fetch(path) if path.startswith(HUB_PREFIX) else path)
    raise ValueError(f"{path}: annotations must be {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} files.")


class JsonRows:
    """
    A JSON array of objects, or JSON Lines.

    Raises:
        ValueError: if it is neither, naming the row.
    """

    is_packed = False

    def __init__(self, path: str):
        self.name = path
        status = os.stat(path)
        self.index = cached_index(path, f"{status.st_size} {status.st_mtime_ns}", self._scan())

    def read(self, position: int) -> dict:
        with open(self.name, "rb") as file:
            return self._read_from(file, position)

    def read_all(self) -> Iterator[dict | ValueError]:
        with open(self.name, "rb") as file:
            for position in range(len(self.index)):
                try:
                    yield self._read_from(file, position)
                except ValueError as error:
                    yield error

    def _read_from(self, file: BinaryIO, position: int) -> dict:
        file.seek(self.index.start[position])
        content = file.read(self.index.extent[position])
        try:
            return json.loads(content)
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 (byte {self.index.start[position] + error.start} of {self.name})") from error
        except ValueError as error:
            raise ValueError(f"not where the index says; {self.name} has changed while it was in use") from error

    def _scan(self) -> Iterator[tuple[int, int, dict]]:
        """Yield (first byte, bytes, row). Read as Latin-1, in which places are bytes; texts come out wrong."""
        decode = json.JSONDecoder().raw_decode
        buffer, base, position, number = "", 0, 0, 0  # base: the byte of the file that the buffer begins with
        separator = None
        with open(self.name, encoding="latin-1", newline="") as file:
            while chunk := file.read(CHUNK_BYTES):
                buffer, base, position = buffer[position:] + chunk, base + position, 0
                if separator is None:
                    opening = OPENING.match(buffer)
                    if opening.end() == len(buffer) and not opening["array"]:
                        continue  # nothing but space yet
                    position = opening.end()
                    separator = COMMA if opening["array"] else SPACE
                while gap := (separator if number else SPACE).match(buffer, position):
                    try:
                        row, end = decode(buffer, gap.end())
                    except (ValueError, RecursionError):
                        break  # broken, or not all there yet
                    if not isinstance(row, dict):
                        raise ValueError(f"{self.name}: row {number} (from 0) is {row!r:.40}, not an object.")
                    yield base + gap.end(), end - gap.end(), row
                    position, number = end, number + 1
                if len(buffer) - position > MAX_ROW_BYTES:
                    break
        self._check_end(buffer[position:], base + position, number, separator)

    def _check_end(self, rest: str, offset: int, number: int, separator: re.Pattern | None) -> None:
        """What is left behind the last row may only close the file."""
        if (CLOSING if separator is COMMA else SPACE).fullmatch(rest) and separator is not None:
            return
        gap = (separator if separator and number else SPACE).match(rest)
        reason, place = "a comma or ] is missing", offset
        if gap:
            try:
                json.JSONDecoder().raw_decode(rest, gap.end())
            except json.JSONDecodeError as error:
                reason, place = error.msg, offset + error.pos
            except RecursionError:
                reason = "nested too deeply"
        raise ValueError(
            f"{self.name}: row {number} (from 0) is not valid JSON ({reason}, byte {place}); repair it or download it "
            "again."
        )


class ParquetRows:
    """
    A parquet file with a column per field of the rows and, if packed (`etchat pack`), `media`; local or `hf://`.

    Raises:
        ValueError: if it is not a parquet file or has no `conversations`.
    """

    def __init__(self, path: str):
        self.name = path
        self.index = cached_index(path, self._key(), self._scan())

    def read(self, position: int) -> dict:
        group, place = int(self.index.start[position]), int(self.index.extent[position])
        return _without_nulls(self._read_group(group).slice(place, 1).to_pylist()[0])

    def read_all(self) -> Iterator[dict]:
        columns = [name for name in self._file.schema_arrow.names if name != MEDIA_COLUMN]
        yield from (row for _, _, row in self._rows(columns))

    def _read_group(self, group: int, columns: list[str] | None = None):
        try:
            # Arrow's threads are gone in loader workers, which are forked
            return self._file.read_row_group(group, columns, use_threads=False)
        except OSError as error:  # of Arrow, too
            raise ValueError(f"{self.name}: row group {group} is damaged ({error}); download it again") from error

    @property
    def is_packed(self) -> bool:
        return MEDIA_COLUMN in self._file.schema_arrow.names

    @property
    def _file(self):
        return _opened_parquet(self.name, os.getpid())

    def _key(self) -> str:
        filesystem, path = fsspec.core.url_to_fs(self.name)
        info = filesystem.info(path)
        return " ".join(str(info.get(name)) for name in ("size", "mtime", "blob_id"))

    def _scan(self) -> Iterator[tuple[int, int, dict]]:
        columns = set(self._file.schema_arrow.names)
        if "conversations" not in columns:
            raise ValueError(f"{self.name}: there is no column conversations; it has {', '.join(sorted(columns))}.")
        yield from self._rows(sorted(columns & {"conversations", "image", "video", "duration"}))

    def _rows(self, columns: list[str]) -> Iterator[tuple[int, int, dict]]:
        for group in range(self._file.num_row_groups):
            rows = self._read_group(group, columns).to_pylist()
            yield from ((group, place, _without_nulls(row)) for place, row in enumerate(rows))


# A process that was forked would share the file's position with its parent: one open file per process.
@functools.lru_cache(maxsize=16)
def _opened_parquet(path: str, process: int):
    # Comes with the optional datasets
    import pyarrow
    import pyarrow.parquet

    filesystem, inner = fsspec.core.url_to_fs(path)
    try:
        return pyarrow.parquet.ParquetFile(filesystem.open(inner))
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a readable parquet file ({error}); download it again.") from error


def _without_nulls(row: dict) -> dict:
    return {name: value for name, value in row.items() if value is not None}
