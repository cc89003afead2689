"""The watched Triton step, the twin of ``csrc/formula/watch.h``: a kernel of its own.

Importing this imports Triton, which is slow: :mod:`.backend` does so on first use.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from ...core.stats import WORDS
from .element import BLOCK, divide, multiply, sqrt, step_item

__all__ = ["watched_step_kernel"]

_BLOCK = tl.constexpr(BLOCK)
_WORDS = tl.constexpr(WORDS)
_INFINITY = tl.constexpr(math.inf)


@triton.jit
def _load(word, COMPUTE: tl.constexpr):
    return tl.load(word).to(tl.float64, bitcast=True).to(COMPUTE)


@triton.jit
def _store(word, value):
    tl.store(word, value.to(tl.float64).to(tl.int64, bitcast=True))


@triton.jit
def _denominator(key, COMPUTE: tl.constexpr, bias2_sqrt, eps):
    return divide(key.to(COMPUTE, bitcast=True), bias2_sqrt) + eps


@triton.jit
def watched_step_kernel(
    tensors,
    items,
    inputs,
    scalars,
    records,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    EXP_AVG: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    SECOND_MOMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    DEVICE_SCALARS: tl.constexpr,
    PACKS: tl.constexpr,
):
    """Step as :func:`.step_kernel` does, and record what it came to.

    ``records`` are int64, for each tensor the address of its items' records
    (:class:`adamal_kernels.core.stats.Record`), in the order of its blocks.
    """
    before, after, count, row = step_item(
        tensors,
        items,
        inputs,
        scalars,
        PARAM,
        GRAD,
        EXP_AVG,
        EXP_AVG_SQ,
        SECOND_MOMENT,
        ALIGNED,
        DEVICE_SCALARS,
        PACKS,
    )
    COMPUTE: tl.constexpr = scalars.dtype.element_ty
    if count > 0:
        item = items + 2 * tl.program_id(0)
        record = tl.load(records + tl.load(item)).to(tl.pointer_type(tl.int64))
        record += _WORDS * tl.load(item + 1)
        step_size = tl.load(row + 3)
        bias2_sqrt = tl.load(row + 4)
        eps = tl.load(row + 5)
        one = tl.full([], 1.0, COMPUTE)
        # Not a global: Triton compares those at every launch, and NaN is not equal to itself.
        nan = float("nan")
        scale = tl.where(step_size > 0, divide(one, multiply(bias2_sqrt, step_size, PACKS)), nan)
        offset = tl.where(step_size > 0, divide(eps, step_size), nan)
        last_scale = _load(record + 7, COMPUTE)
        scale_change = scale - last_scale
        offset_change = offset - _load(record + 8, COMPUTE)

        exists = tl.arange(0, _BLOCK) < count
        grown = tl.sum((exists & (after > before)).to(tl.int32), axis=0).to(tl.int64)
        root = sqrt(after)
        # Numbers that are not negative as integers of the same order; NaN is the largest.
        KEY: tl.constexpr = tl.int64 if tl.float64 == COMPUTE else tl.int32
        MAX: tl.constexpr = 0x7FFFFFFFFFFFFFFF if tl.float64 == COMPUTE else 0x7FFFFFFF
        key = root.to(KEY, bitcast=True) & MAX
        smallest = tl.min(tl.where(exists, key, MAX), axis=0)
        largest = tl.max(tl.where(exists, key, 0), axis=0)
        change = multiply(root, scale_change, PACKS) + offset_change
        change = change + multiply(last_scale, root - sqrt(before), PACKS)
        least = tl.min(tl.where(exists & (change == change), change, _INFINITY), axis=0)

        smallest = _denominator(smallest, COMPUTE, bias2_sqrt, eps)
        largest = _denominator(largest, COMPUTE, bias2_sqrt, eps)
        since = tl.load(record + 1)
        since = tl.where(grown > 0, 0, tl.where(since < 0, since, since + 1))
        tl.store(record, tl.load(record) + 1)
        tl.store(record + 1, since)
        tl.store(record + 2, grown)
        _store(record + 3, tl.where(largest == largest, smallest, largest))
        _store(record + 4, largest)
        _store(record + 5, tl.where(scale_change == scale_change, least, nan))
        _store(record + 6, step_size)
        _store(record + 7, scale)
        _store(record + 8, offset)
