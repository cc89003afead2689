"""The Triton twin of ``csrc/formula/scalars.h``: a step's scalars, derived on the device.

Importing this imports Triton, which is slow: :mod:`.backend` does so on first use.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...core.scalars import COUNT_BITS, StepScalars
from .element import ROWS_HEADER
from .tables import OptionEntry, ScalarSource

__all__ = ["TENSORS_PER_PROGRAM", "derive_kernel"]

TENSORS_PER_PROGRAM = 256
"""Tensors whose scalars a program derives: one a thread."""

_TENSORS = tl.constexpr(TENSORS_PER_PROGRAM)
_SCALARS = tl.constexpr(len(StepScalars._fields))
_ROWS_HEADER = tl.constexpr(ROWS_HEADER)
_SOURCE_WORDS = tl.constexpr(len(ScalarSource._fields))
_OPTION_WORDS = tl.constexpr(len(OptionEntry._fields))
_COUNT_BITS = tl.constexpr(COUNT_BITS)
_CLIP_EPS = tl.constexpr(1e-6)  # as torch.nn.utils.clip_grad_norm_ has it
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _float64(word, mask):
    return tl.load(word, mask, other=0).to(tl.float64, bitcast=True)


@triton.jit
def _float32_at(address, otherwise):
    number = tl.load(address.to(tl.pointer_type(tl.float32)), address != 0, other=otherwise)
    return number.to(tl.float64)


@triton.jit
def _number(number, address, mask):
    """Return numbers of rows of options, each from the address beside it where there is one."""
    there = tl.load(address, mask, other=0)
    is_float64 = tl.load(address + 1, mask, other=0) != 0
    wide = tl.load(there.to(tl.pointer_type(tl.float64)), (there != 0) & is_float64, other=0.0)
    narrow = tl.load(there.to(tl.pointer_type(tl.float32)), (there != 0) & ~is_float64, other=0.0)
    found = tl.where(is_float64, wide, narrow.to(tl.float64))
    return tl.where(there != 0, found, _float64(number, mask))


@triton.jit
def _beta_power(beta, exponent):
    """Twin of ``scalars.beta_power``: the same products in the same order."""
    result = tl.full(beta.shape, 1.0, tl.float64)
    square = beta
    for bit in tl.static_range(_COUNT_BITS):
        result = tl.where((exponent >> bit) & 1 != 0, result * square, result)
        square = square * square
    return result


@triton.jit
def _gradient_factor(source):
    """Twin of ``scalars.gradient_factor``; the second result tells a step not skipped."""
    factor = 1.0 / _float32_at(tl.load(source + 2), 1.0)
    taken = _float32_at(tl.load(source + 3), 0.0) == 0
    address = tl.load(source + 4)
    norm = tl.load(address.to(tl.pointer_type(tl.float64)), address != 0, other=0.0)
    clip = tl.load(source + 5).to(tl.float64, bitcast=True) / (norm + _CLIP_EPS)
    factor = tl.where((address != 0) & (clip < 1.0), factor * clip, factor)
    return factor, taken & (norm < _INFINITY)  # NaN is not less


@triton.jit
def derive_kernel(inputs, source, scalars):
    """Derive the scalars of the tensors that take a step, and count it, or else count it skipped.

    All in float64, where no operation of Triton's is approximate, rounded once at the end.
    ``inputs`` is as in :func:`.step_kernel`, its rows those of the options; ``source`` is a
    ScalarSource, then OptionEntry rows, all as int64 words; ``scalars`` is what the step kernel
    reads: 1 where the step is taken and 0 where it is skipped, ``ROWS_HEADER`` elements further
    StepScalars of every tensor. A skipped step leaves those and the counts as they are.
    """
    COMPUTE: tl.constexpr = scalars.dtype.element_ty
    factor, taken = _gradient_factor(source)
    is_first = tl.program_id(0) == 0
    tl.store(scalars, taken.to(COMPUTE), is_first)
    address = tl.load(source + 6)
    skipped_steps = address.to(tl.pointer_type(tl.int64))
    counts_skipped = is_first & (taken == 0) & (address != 0)
    skipped = tl.load(skipped_steps, counts_skipped, other=0)
    tl.store(skipped_steps, skipped + 1, counts_skipped)

    index = tl.program_id(0) * _TENSORS + tl.arange(0, _TENSORS)
    in_step = index < tl.where(taken, tl.load(source), 0)
    steps = tl.load(inputs + 2 * index, in_step, other=0) != 0
    option_row = tl.load(inputs + 2 * index + 1, steps, other=0)
    option = source + _SOURCE_WORDS + _OPTION_WORDS * option_row
    lr = _number(option + 0, option + 10, steps)
    beta1 = _number(option + 1, option + 12, steps)
    beta2 = _number(option + 2, option + 14, steps)
    eps = _float64(option + 3, steps)
    weight_decay = _float64(option + 4, steps)
    lower = _float64(option + 5, steps)
    upper = _float64(option + 6, steps)
    decoupled = tl.load(option + 7, steps, other=0) != 0
    maximize = tl.load(option + 8, steps, other=0) != 0
    bias_correction = tl.load(option + 9, steps, other=0) != 0

    counts = tl.load(source + 1).to(tl.pointer_type(tl.float32)) + index
    step = tl.load(counts, steps, other=0.0).to(tl.int64) + 1
    bias1 = 1.0 - _beta_power(beta1, step)
    bias2 = 1.0 - _beta_power(beta2, step)
    row = scalars + _ROWS_HEADER + _SCALARS * index
    tl.store(row + 0, (1.0 - beta1).to(COMPUTE), steps)
    tl.store(row + 1, (1.0 - beta2).to(COMPUTE), steps)
    tl.store(row + 2, beta2.to(COMPUTE), steps)
    tl.store(row + 3, tl.where(bias_correction, lr / bias1, lr).to(COMPUTE), steps)
    tl.store(row + 4, tl.where(bias_correction, tl.sqrt(bias2), 1.0).to(COMPUTE), steps)
    tl.store(row + 5, eps.to(COMPUTE), steps)
    tl.store(row + 6, tl.where(decoupled, 0.0, weight_decay).to(COMPUTE), steps)
    tl.store(row + 7, tl.where(decoupled, 1.0 - lr * weight_decay, 1.0).to(COMPUTE), steps)
    # Not negated: Triton subtracts from 0, which makes 0 of 0 where it should be -0.
    tl.store(row + 8, tl.where(maximize, -1.0 * factor, factor).to(COMPUTE), steps)
    # A step with a learning rate of 0 does not project.
    tl.store(row + 9, tl.where(lr == 0, -_INFINITY, lower).to(COMPUTE), steps)
    tl.store(row + 10, tl.where(lr == 0, _INFINITY, upper).to(COMPUTE), steps)
    tl.store(counts, step.to(tl.float32), steps)
