"""The Triton twin of ``csrc/formula/norm.h``: squares added in the order of ``core/norm.py``.

Importing this imports Triton, which is slow: :mod:`.backend` does so on first use.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...core.bucket import BucketKey
from ...core.norm import LANES, chunk_elements
from .element import BLOCK, DTYPES, elements
from .tables import TENSOR_WORDS

__all__ = [
    "chunk_levels",
    "constants",
    "item_sums_kernel",
    "tensor_sums_kernel",
    "total_kernel",
]

_BLOCK = tl.constexpr(BLOCK)
_BLOCK_LEVELS = tl.constexpr(BLOCK.bit_length() - 1)
_LANES = tl.constexpr(LANES)
_LANE_LEVELS = tl.constexpr(LANES.bit_length() - 1)
_TENSOR_WORDS = tl.constexpr(len(TENSOR_WORDS))
_NUMEL = tl.constexpr(TENSOR_WORDS["numel"])
_ROWS_IN_FLIGHT = tl.constexpr(4)
_TENSORS_IN_FLIGHT = tl.constexpr(32)


def constants(key: BucketKey, *, aligned: bool) -> dict[str, object]:
    """Return the compile-time arguments of :func:`item_sums_kernel`.

    ``aligned`` promises, unchecked, that every gradient starts at a multiple of 16 bytes.
    """
    return {
        "GRAD": DTYPES[key.format.grad],
        "COMPUTE": DTYPES[key.format.compute],
        "ALIGNED": aligned,
    }


def chunk_levels(compute_dtype: torch.dtype) -> int:
    """Return how many levels of a chunk's tree are above those of a work item's.

    Example:
        >>> chunk_levels(torch.float32), chunk_levels(torch.float64)
        (1, 0)
    """
    return (chunk_elements(compute_dtype) // BLOCK).bit_length() - 1


@triton.jit
def _add_neighbours(values, COUNT: tl.constexpr, LEVELS: tl.constexpr):
    """Return ``COUNT`` values after so many levels of the tree."""
    for level in tl.static_range(LEVELS):
        # A sum of two has one order; one of more is added in whichever order suits the compiler.
        values = tl.sum(tl.reshape(values, [COUNT >> (level + 1), 2]), axis=1)
    return values


@triton.jit
def _add_tree(values, COUNT: tl.constexpr, LEVELS: tl.constexpr):
    return tl.sum(_add_neighbours(values, COUNT, LEVELS - 1), axis=0)


@triton.jit
def item_sums_kernel(
    tensors,
    items,
    inputs,
    first_items,
    item_sums,
    GRAD: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Add up the squares of each work item's gradient, 0 without one.

    ``tensors``, ``items`` and ``inputs`` are as in :func:`.step_kernel`; the sum of a tensor's
    block is that of ``item_sums``, float64, at the tensor's of ``first_items`` plus the block.
    """
    item = items + 2 * tl.program_id(0)
    index = tl.load(item)
    block = tl.load(item + 1).to(tl.int64)
    start = block * _BLOCK
    address = tl.load(inputs + 2 * index)
    remaining = tl.where(address == 0, 0, tl.load(tensors + _TENSOR_WORDS * index + _NUMEL) - start)
    grad = elements(address, start, GRAD, ALIGNED)
    if remaining >= _BLOCK:
        g = tl.load(grad)
    else:
        g = tl.load(grad, tl.arange(0, _BLOCK) < remaining, other=0.0)
    value = g.to(COMPUTE).to(tl.float64)
    total = _add_tree(value * value, _BLOCK, _BLOCK_LEVELS)
    tl.store(item_sums + tl.load(first_items + index) + block, total)


@triton.jit
def tensor_sums_kernel(tensors, first_items, item_sums, tensor_sums, CHUNK_LEVELS: tl.constexpr):
    """Add up the items' sums of each tensor: by chunks, lanes, and the tree of the lanes."""
    WIDTH: tl.constexpr = _LANES << CHUNK_LEVELS
    index = tl.program_id(0)
    items = tl.cdiv(tl.load(tensors + _TENSOR_WORDS * index + _NUMEL), _BLOCK)
    sums = item_sums + tl.load(first_items + index)
    lanes = tl.zeros([_LANES], tl.float64)
    first = items * 0
    # Not a range: the interpreter of Triton 3.6 takes no bound that is known only here.
    while first < items:
        for row in tl.static_range(_ROWS_IN_FLIGHT):
            at = first + row * WIDTH + tl.arange(0, WIDTH)
            values = tl.load(sums + at, at < items, other=0.0)
            lanes = lanes + _add_neighbours(values, WIDTH, CHUNK_LEVELS)
        first += _ROWS_IN_FLIGHT * WIDTH
    tl.store(tensor_sums + index, _add_tree(lanes, _LANES, _LANE_LEVELS))


@triton.jit
def total_kernel(tensor_sums, tensor_count, total):
    """Add up the tensors' sums, one after another, in one program."""
    count = tl.load(tensor_count)
    added = tl.load(tensor_sums)
    first = count * 0 + 1
    while first < count:
        for i in tl.static_range(_TENSORS_IN_FLIGHT):
            added = added + tl.load(tensor_sums + first + i, first + i < count, other=0.0)
        first += _TENSORS_IN_FLIGHT
    tl.store(total, added)
