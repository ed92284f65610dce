"""Packs annotations and their media into parquet shards, which stream from a disk or the Hub without loose files."""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath
from typing import NamedTuple

import fsspec
import pyarrow
import pyarrow.parquet

from etchat_hf.data.annotations import MEDIA_COLUMN, AnnotationFile, open_annotations
from etchat_hf.data.compress import check_shard
from etchat_hf.data.media import URL_PREFIXES, locate
from etchat_hf.data.rows import modality_of
from etchat_hf.data.settings_file import keep_settings
from etchat_hf.video_decoding_etchat import Source

ROW_GROUP_BYTES = 1 << 20  # what reading one row costs
ROW_GROUP_ROWS = 256
DICTIONARY_BYTES = 1 << 30

Place = tuple[AnnotationFile, int]  # of a row

_TURN = pyarrow.struct({"from": pyarrow.string(), "value": pyarrow.string()})
SCHEMA = pyarrow.schema(
    {
        "id": pyarrow.string(),
        "image": pyarrow.string(),
        "video": pyarrow.string(),
        "duration": pyarrow.float64(),
        "task": pyarrow.string(),
        "source": pyarrow.string(),
        "src": pyarrow.list_(pyarrow.float64()),
        "tgt": pyarrow.list_(pyarrow.float64()),
        "conversations": pyarrow.list_(_TURN),
        "other": pyarrow.string(),  # all further fields, as JSON
        MEDIA_COLUMN: pyarrow.binary(),
    }
)


class Packed(NamedTuple):
    """What became of the rows: how many were packed, how many shards skipped (there already), which rows left out."""

    rows: int
    skipped_shards: int
    problems: list[str]


def pack(
    annotations: str,
    media_root: str,
    destination: Path,
    num_shards: int = 1,
    shard: int | None = None,
    image_root: str | None = None,
    progress: Callable[[Iterable, int], Iterable] = lambda rows, total: rows,
) -> Packed:
    """
    Writes `destination/NAME-00000-of-0000N.parquet`. Each shard appears when it is complete. Shards that are there are
    passed over, unless rows were left out of them: these are packed again. Within a shard rows are sorted by media,
    and rows that share media share the stored bytes.

    Args:
        annotations (`str`): as of [`DataSource`].
        media_root (`str`): folder or URL that videos, and images if there is no `image_root`, are relative to; rows
            that name URLs must name some that begin with it, such as `https://`.
        num_shards (`int`): shards of the whole.
        shard (`int`, *optional*): which of them to write; default: all.
        progress: wraps the iterator over a shard's rows; called with their number.

    Raises:
        FileNotFoundError: if there are no annotations, or no folder of media.
        ValueError: if they are malformed, a shard does not exist, or the destination holds shards of that name that
            were made of something else.
    """
    check_shard(shard, num_shards)
    files = open_annotations(annotations)
    for root in filter(None, (media_root, image_root)):
        if not root.startswith(URL_PREFIXES) and not Path(root).is_dir():
            raise FileNotFoundError(f"{root}: no such folder of media")
    stem = Path(files[0].name).stem
    settings = {
        "num_shards": num_shards,
        "annotations": [_digest(file) for file in files],
        # Only the last part: a folder may be elsewhere on another machine, and its place there is nobody's business
        "media": [root and PurePath(root).name for root in (media_root, image_root)],
    }
    keep_settings(destination / f".{stem}.pack.json", settings)
    roots = {"video": media_root, "image": image_root or media_root}
    packed, num_skipped, problems = 0, 0, []
    for number in range(num_shards) if shard is None else [shard]:
        path = destination / f"{stem}-{number:05d}-of-{num_shards:05d}.parquet"
        if path.exists() and not _problems_file(path).exists():
            num_skipped += 1
            continue
        places = [(file, position) for file in files for position in range(len(file.index))][number::num_shards]
        places.sort(key=_media_name)
        left_out = _write_shard(path, progress(places, len(places)), roots)
        packed += len(places) - len(left_out)
        problems += left_out
    return Packed(packed, num_skipped, problems)


def _digest(file: AnnotationFile) -> str:
    """Tells other content apart."""
    with fsspec.open(file.name, "rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


def _media_name(place: Place) -> str:
    """What rows are sorted by; they are read again when it is their turn, for all of them may not fit in memory."""
    file, position = place
    try:
        row = file.read(position)
    except ValueError:
        return ""
    return str(row.get(modality_of(row), ""))


def _read(places: Iterable[Place], problems: list[str]) -> Iterator[tuple[str, dict]]:
    for file, position in places:
        name = f"{file.name} row {position}"
        try:
            yield name, file.read(position)
        except ValueError as error:
            problems.append(f"{name}: {error}")


def _write_shard(path: Path, places: Iterable[Place], roots: dict[str, str]) -> list[str]:
    problems = []
    rows = _read(places, problems)
    partial = path.with_name(f".{path.name}.partial")
    try:
        # A dictionary stores equal bytes of a row group once
        with pyarrow.parquet.ParquetWriter(
            partial,
            SCHEMA,
            use_dictionary=[MEDIA_COLUMN],
            dictionary_pagesize_limit=DICTIONARY_BYTES,
            compression="zstd",
        ) as writer:
            for group in _groups(_with_media(rows, roots, problems)):
                writer.write_table(pyarrow.Table.from_pylist(group, schema=SCHEMA), row_group_size=len(group))
        _problems_file(path).write_text("\n".join(problems), encoding="utf-8", errors="backslashreplace")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    if not problems:
        _problems_file(path).unlink()
    return problems


def _problems_file(shard: Path) -> Path:
    """Beside the shard and hidden: it names folders of this machine, which a published shard must not."""
    return shard.with_name(f".{shard.name}.left-out.txt")


def _with_media(rows: Iterable[tuple[str, dict]], roots: dict[str, str], problems: list[str]) -> Iterator[dict]:
    by_name = itertools.groupby(rows, key=lambda entry: (modality_of(entry[1]), entry[1].get(modality_of(entry[1]))))
    for (modality, name), entries in by_name:
        try:
            content = None if modality == "text" else _content(locate(roots[modality], name))
        except (ValueError, OSError) as error:
            problems += [f"{place}: {error}" for place, _ in entries]
            continue
        for place, row in entries:
            try:
                yield _columns(row) | {MEDIA_COLUMN: content}
            except ValueError as error:
                problems.append(f"{place}: {error}")


def _content(place: str) -> bytes:
    with Source(place).open() as file:
        return file.read()


def _columns(row: dict) -> dict:
    """The row as the schema has it; ValueError if a field does not fit."""
    known = {name: row.get(name) for name in SCHEMA.names if name not in ("other", MEDIA_COLUMN)}
    other = {name: value for name, value in row.items() if name not in known}
    known["id"] = None if row.get("id") is None else str(row["id"])
    known["other"] = json.dumps(other) if other else None
    try:
        pyarrow.Table.from_pylist([known], schema=SCHEMA)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise ValueError(f"a field is of another type than the others' ({error})") from error
    return known


def _groups(rows: Iterable[dict]) -> Iterator[list[dict]]:
    """Row groups of about `ROW_GROUP_BYTES`, in which shared bytes count once."""
    group, size, last = [], 0, None
    for row in rows:
        content = row[MEDIA_COLUMN]
        added = 0 if content is last or content is None else len(content)
        if group and (size + added > ROW_GROUP_BYTES or len(group) == ROW_GROUP_ROWS):
            yield group
            group, size, added = [], 0, len(content or b"")
        group.append(row)
        size, last = size + added, content
    if group:
        yield group
