"""Writing a folder completely or not at all, and its weights one tensor at a time."""

import json
import os
import secrets
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from .lazy_tensor import LazyTensor, StoredBytes
from .sources import DTYPES

DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
# Elements cast at once: the copy stays small however large the tensor.
CHUNK = 1 << 24
# Bytes written at once: for larger writes some kernels gather large pages, which takes them three times as long.
PIECE = 1 << 16


def check_destination(destination: str | Path, sources: list[Path]):
    """
    Raises:
        FileExistsError: `destination` is a file or a folder that holds something.
        ValueError: it is, or lies in, one of the `sources`.
    """
    destination = Path(destination).resolve()
    for source in sources:
        if destination == source.resolve() or source.resolve() in destination.parents:
            raise ValueError(f"{destination}: the destination is the source {source}, or lies in it.")
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise FileExistsError(f"{destination}: exists already; give a new or empty folder.")


@contextmanager
def appearing_at_once(destination: str | Path) -> Iterator[Path]:
    """A temporary folder that becomes `destination` when the block ends well and disappears when it does not."""
    destination = Path(destination).resolve()
    # In the nearest folder that exists: the same file system, and nothing to remove but the folder itself.
    parent = next(folder for folder in destination.parents if folder.is_dir())
    folder = parent / f".{destination.name}.{secrets.token_hex(4)}.partial"
    folder.mkdir()
    try:
        yield folder
        destination.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder, destination)
    except BaseException:
        shutil.rmtree(folder)
        raise


def write_json(path: Path, content: dict):
    """Write `content` as transformers writes its JSON files."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_weights(
    folder: Path, tensors: dict[str, LazyTensor], dtype: torch.dtype | None, max_shard_size: str
) -> tuple[str, ...]:
    """
    Write tensors as safetensors, sharded with an index if they exceed `max_shard_size`.

    Args:
        folder (`Path`): an existing folder.
        tensors (`dict[str, LazyTensor]`): names -> tensors.
        dtype (`torch.dtype`, *optional*): dtype of the floating ones; by default each keeps its own.
        max_shard_size (`str`): such as `"5GB"`.

    Returns:
        The names of the weight files.

    Raises:
        ValueError: an unreadable size, or a tensor that is not what it was said to be.
    """
    dtypes = {name: stored_dtype(tensor, dtype) for name, tensor in tensors.items()}
    sizes = {name: torch.Size(t.shape).numel() * dtypes[name].itemsize for name, t in tensors.items()}
    split = split_state_dict_into_shards_factory(
        {name: sizes[name] for name in sorted(tensors)},
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        _write_safetensors(folder / file, {name: tensors[name] for name in names}, dtypes)
    if split.is_sharded:
        parameters = sum(torch.Size(tensor.shape).numel() for tensor in tensors.values())
        index = {
            "metadata": {"total_parameters": parameters, **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        write_json(folder / "model.safetensors.index.json", index)
    return tuple(split.filename_to_tensors)


def stored_dtype(tensor: LazyTensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype in which `tensor` is written if floating ones are to become `dtype`."""
    return dtype if dtype is not None and tensor.dtype.is_floating_point else tensor.dtype


def _write_safetensors(path: Path, tensors: dict[str, LazyTensor], dtypes: dict[str, torch.dtype]):
    # Wide elements first: that keeps every tensor aligned to its element size.
    names = sorted(tensors, key=lambda name: (-dtypes[name].itemsize, name))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        start, end = end, end + torch.Size(tensors[name].shape).numel() * dtypes[name].itemsize
        entry = {"dtype": DTYPE_CODES[dtypes[name]], "shape": list(tensors[name].shape), "data_offsets": [start, end]}
        header[name] = entry
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in names:
            written = sum(file.write(piece) for piece in _pieces_of(tensors[name], dtypes[name]))
            start, end = header[name]["data_offsets"]
            if written != end - start:
                raise ValueError(f"{tensors[name].file}: {name}: {written} bytes, {end - start} expected.")


def _pieces_of(tensor: LazyTensor, dtype: torch.dtype) -> Iterator[memoryview]:
    for block in _bytes_of(tensor, dtype):
        yield from (block[start : start + PIECE] for start in range(0, len(block), PIECE))


def _bytes_of(tensor: LazyTensor, dtype: torch.dtype) -> Iterator[memoryview]:
    if isinstance(tensor.row_blocks, StoredBytes) and dtype == tensor.dtype:
        yield from tensor.row_blocks.read()
        return
    for block in tensor.row_blocks():
        for chunk in block.contiguous().reshape(-1).split(CHUNK):
            yield memoryview(chunk.to(dtype).view(torch.uint8).numpy())
