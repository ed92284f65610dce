"""Tensors that are read only while they are written, and the operations on them.

A 5-billion-parameter checkpoint passes through as memory-mapped views; only what an operation computes takes memory.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

READ_AT_ONCE = 1 << 21  # bytes read at once: what is read is still in the processor's cache when it is written


@dataclass(frozen=True)
class StoredBytes:
    """
    The `row_blocks` of a tensor that a file holds as it is.

    Args:
        path (`str`): the file.
        offset, size (`int`): where its bytes are.
        view (`Callable[[], Tensor]`): maps it.
    """

    path: str
    offset: int
    size: int
    view: Callable[[], Tensor]

    def __call__(self) -> tuple[Tensor]:
        return (self.view(),)

    def read(self) -> Iterator[memoryview]:
        """Its bytes, chunk by chunk, each valid until the next; twice as fast as through the mapping."""
        buffer = memoryview(bytearray(min(READ_AT_ONCE, self.size)))
        left = self.size
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset)
            while left and (count := file.readinto(buffer[:left])):
                yield buffer[:count]
                left -= count


@dataclass(frozen=True)
class LazyTensor:
    """
    A tensor of a checkpoint, not read yet.

    Args:
        keys (`tuple[str, ...]`): keys of the source files that it is made of.
        file (`str`): where it comes from, for messages.
        shape (`tuple[int, ...]`): its shape.
        dtype (`torch.dtype`): its dtype.
        row_blocks (`Callable[[], Iterable[Tensor]]`): reads it, as blocks of rows: they are concatenated along
            dimension 0 where they are written, so that a large tensor with a few new rows is never copied.
    """

    keys: tuple[str, ...]
    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    row_blocks: Callable[[], Iterable[Tensor]]

    def load(self) -> Tensor:
        """The whole tensor; a view of the file where nothing has to be computed."""
        blocks = list(self.row_blocks())
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def in_memory(tensor: Tensor, origin: str) -> LazyTensor:
    """A tensor that no source key holds; `origin` says where it comes from."""
    return LazyTensor((), origin, tuple(tensor.shape), tensor.dtype, lambda: (tensor,))


def join_qkv_bias(query: LazyTensor, value: LazyTensor) -> LazyTensor:
    """The bias (3 * C,) of a joint projection from those of query and value, (C,) each; the key has none."""

    def row_blocks():
        bias = query.load()
        return bias, torch.zeros_like(bias), value.load()

    shape = (2 * query.shape[0] + value.shape[0],)
    return LazyTensor(query.keys + value.keys, query.file, shape, query.dtype, row_blocks)


def split_qkv_bias(bias: LazyTensor) -> tuple[LazyTensor, LazyTensor]:
    """
    The biases of query and value, (C,) each, from that of the joint projection (3 * C,).

    Raises:
        ValueError: when read, if the key's third is not zero: the original layout cannot hold it.
    """

    def part(index: int) -> Tensor:
        thirds = bias.load().chunk(3)
        if thirds[1].any():
            raise ValueError(f"{bias.file}: {bias.keys[0]}: the key has a bias, which an original checkpoint has not.")
        return thirds[index]

    third = replace(bias, shape=(bias.shape[0] // 3,))
    return replace(third, row_blocks=lambda: (part(0),)), replace(third, row_blocks=lambda: (part(2),))


def append_mean_rows(weight: LazyTensor, rows: int) -> LazyTensor:
    """`weight` (n, d) with `rows` new rows, each the mean of the n."""

    def row_blocks():
        stored = weight.load()
        mean = stored.mean(0, keepdim=True, dtype=torch.float32).to(stored.dtype)
        return stored, mean.expand(rows, -1)

    return replace(weight, shape=(weight.shape[0] + rows, *weight.shape[1:]), row_blocks=row_blocks)


def first_rows(weight: LazyTensor, rows: int) -> LazyTensor:
    """The first `rows` rows of `weight` (n, d)."""
    return replace(weight, shape=(rows, *weight.shape[1:]), row_blocks=lambda: (weight.load()[:rows],))


def merge_lora(weight: LazyTensor, lora_a: LazyTensor, lora_b: LazyTensor, scaling: float) -> LazyTensor:
    """`weight + scaling * B @ A`, computed in float32 and kept in the dtype of `weight` (out, in)."""

    def row_blocks():
        update = scaling * (lora_b.load().float() @ lora_a.load().float())
        return (weight.load().float().add_(update).to(weight.dtype),)

    return replace(weight, keys=weight.keys + lora_a.keys + lora_b.keys, row_blocks=row_blocks)


def interpolate_positions(positions: LazyTensor, grid: int) -> LazyTensor:
    """Learned positions (1, 1 + n * n, C), class token first, resampled (bicubic) to (1, 1 + grid * grid, C)."""
    _, tokens, width = positions.shape
    side = math.isqrt(tokens - 1)

    def row_blocks():
        stored = positions.load()
        patches = stored[:, 1:].float().reshape(1, side, side, width).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
        patches = patches.permute(0, 2, 3, 1).reshape(1, grid * grid, width)
        return (torch.cat((stored[:, :1], patches.to(stored.dtype)), dim=1),)

    return replace(positions, shape=(1, 1 + grid * grid, width), row_blocks=row_blocks)
