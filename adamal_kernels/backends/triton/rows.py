"""The Triton kernel that projects rows onto sets which couple their elements.

It follows the step and reads what that stored: a row is projected in the metric ``diag(d)`` of the
step's second moment. Sums are in the order of ``core/norm.py``; the arithmetic is that of
:mod:`.sets`. A program takes one row, or several short ones; those too long for one are
:mod:`.long_rows`'. Importing this imports Triton, which is slow: :mod:`.backend` does so on
first use.

What the functions here call a view is a tuple: the set's kind; pointers to the parameter and to
what its denominator is of; the tensor's entry of ``sets``; the numbers of some rows, an int64
vector; and ``bias2_sqrt`` and ``eps`` of the step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...core.bucket import BucketKey
from ...core.buffers import SecondMoment
from ...core.norm import chunk_elements
from ...core.rows import MOST_RUNS
from ...core.scalars import StepScalars
from .element import DTYPES, ROWS_HEADER, divide, load, sqrt, store
from .sets import (
    FOUND,
    LEAST_METRIC,
    LEFT_ALONE,
    SEARCHING,
    begin_search,
    continue_search,
    projected,
    set_terms,
    size_term,
)
from .tables import SET_WORDS, TENSOR_WORDS, SetEntry

__all__ = [
    "TILES",
    "Tile",
    "add_neighbours",
    "apply",
    "constants",
    "open_rows",
    "part_sizes",
    "part_terms",
    "project_kernel",
    "search",
    "set_of",
]

_AMSGRAD = tl.constexpr(SecondMoment.AMSGRAD.value)
_TENSOR_WORDS = tl.constexpr(len(TENSOR_WORDS))
_EXP_AVG_SQ = tl.constexpr(TENSOR_WORDS["exp_avg_sq"])
_MAX_EXP_AVG_SQ = tl.constexpr(TENSOR_WORDS["max_exp_avg_sq"])
_MULTIPLIER = tl.constexpr(TENSOR_WORDS["multiplier"])
_SET_WORDS = tl.constexpr(SET_WORDS)
_KEPT = tl.constexpr(len(SetEntry._fields))
_REDUCED = tl.constexpr(len(SetEntry._fields) + 2 * MOST_RUNS)
_SCALARS = tl.constexpr(len(StepScalars._fields))
_ROWS_HEADER = tl.constexpr(ROWS_HEADER)
_MOST_LEVELS = tl.constexpr(chunk_elements(torch.float32).bit_length() - 1)
_MOST_RUNS = tl.constexpr(MOST_RUNS)


class Tile(NamedTuple):
    """How a program walks over rows: ``width`` elements of so many rows at a time.

    Each row's parts are added to as many lanes in turn, and lanes by the tree. With one part a
    lane, all of it is one tree, as the order of sums has it for up to ``norm.LANES``
    chunks; with chunks for parts, ``norm.LANES`` lanes are right for any length.
    """

    rows: int
    width: int
    lanes: int


TILES = {32: Tile(32, 32, 1), 256: Tile(4, 256, 1), 16384: Tile(1, 1024, 16)}
"""By the greatest length of rows. More elements at a time would take too many registers."""


def constants(key: BucketKey, tile: Tile) -> dict[str, object]:
    """Return the compile-time arguments of :func:`project_kernel`, for rows of one of ``TILES``."""
    return {
        "PARAM": DTYPES[key.format.param],
        "EXP_AVG_SQ": DTYPES[key.format.exp_avg_sq],
        "SECOND_MOMENT": key.second_moment.value,
        "DEVICE_SCALARS": key.device_scalars,
        "ROWS": tile.rows,
        "WIDTH": tile.width,
        "LANES": tile.lanes,
    }


@triton.jit
def _offset(index, count, runs):
    """Return where ``index`` is, in elements from the first one: as in csrc/formula/rows.h.

    ``runs`` points at ``MOST_RUNS`` sizes, of which ``count`` are used, and as many strides.
    """
    strides = runs + _MOST_RUNS
    offset = index * 0
    digit = count - 1
    while digit > 0:
        size = tl.load(runs + digit)
        offset += index % size * tl.load(strides + digit)
        index = index // size
        digit -= 1
    return offset + index * tl.load(strides)


@triton.jit
def open_rows(
    tensors,
    sets,
    inputs,
    scalars,
    index,
    rows,
    PARAM: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    SECOND_MOMENT: tl.constexpr,
    DEVICE_SCALARS: tl.constexpr,
):
    """Return whether the step of a tensor projects, a view of rows, and pointers to multipliers."""
    projects = tl.load(inputs + 2 * index) != 0
    if DEVICE_SCALARS:
        projects = projects & (tl.load(scalars) != 0)
        step = scalars + _ROWS_HEADER + _SCALARS * index
    else:
        step = scalars + _SCALARS * tl.load(inputs + 2 * index + 1)
    # A step with a learning rate of 0 does not project.
    projects = projects & (tl.load(step + 3) != 0)
    tensor = tensors + _TENSOR_WORDS * index
    param = tl.load(tensor).to(tl.pointer_type(PARAM))
    squares = tl.load(tensor + (_MAX_EXP_AVG_SQ if SECOND_MOMENT == _AMSGRAD else _EXP_AVG_SQ))
    squares = squares.to(tl.pointer_type(EXP_AVG_SQ))
    multipliers = tl.load(tensor + _MULTIPLIER).to(tl.pointer_type(tl.float64)) + rows
    entry = sets + _SET_WORDS * index
    bias2_sqrt = tl.load(step + 4)
    eps = tl.load(step + 5)
    view = (tl.load(entry), param, squares, entry, rows, bias2_sqrt, eps)
    return projects, view, multipliers


@triton.jit
def set_of(entry):
    """Return the kind, size and tolerance of a set."""
    size = tl.load(entry + 1).to(tl.float64, bitcast=True)
    return tl.load(entry), size, tl.load(entry + 2).to(tl.float64, bitcast=True)


@triton.jit
def _places(entry, rows, start, WIDTH: tl.constexpr):
    """Return the offsets of ``WIDTH`` elements of rows, and the mask of those that exist."""
    row_offsets = _offset(rows, tl.load(entry + 5), entry + _KEPT)
    elements = start + tl.arange(0, WIDTH)
    offsets = _offset(elements, tl.load(entry + 6), entry + _REDUCED)
    mask = (rows < tl.load(entry + 3))[:, None] & (elements < tl.load(entry + 4))[None, :]
    return row_offsets[:, None] + offsets[None, :], mask


@triton.jit
def _stored(view, offsets, mask):
    """Return what the step stored, and the metric there."""
    _, param, squares, _, _, bias2_sqrt, eps = view
    COMPUTE: tl.constexpr = eps.dtype
    y = load(param + offsets, mask, COMPUTE, other=0.0).to(tl.float64)
    root = sqrt(load(squares + offsets, mask, COMPUTE, other=0.0))
    d = (divide(root, bias2_sqrt) + eps).to(tl.float64)
    return y, tl.where(d < LEAST_METRIC, LEAST_METRIC, d)


@triton.jit
def add_neighbours(values, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the sums of the rows of ``[ROWS, WIDTH]``, a power of two, by the tree."""
    for level in tl.static_range(_MOST_LEVELS):
        if WIDTH >> level > 1:
            # A sum of two has one order; one of more is added in whichever suits the compiler.
            values = tl.sum(tl.reshape(values, [ROWS, WIDTH >> (level + 1), 2]), axis=2)
    return tl.reshape(values, [ROWS])


@triton.jit
def part_sizes(view, start, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the sums of ``size_term`` over ``WIDTH`` elements of rows."""
    kind, _, _, entry, rows, _, _ = view
    offsets, mask = _places(entry, rows, start, WIDTH)
    y, _ = _stored(view, offsets, mask)
    return add_neighbours(tl.where(mask, size_term(kind, y), 0.0), ROWS, WIDTH)


@triton.jit
def part_terms(view, start, multiplier, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the sums of both of ``set_terms`` over ``WIDTH`` elements of rows."""
    kind, _, _, entry, rows, _, _ = view
    offsets, mask = _places(entry, rows, start, WIDTH)
    y, d = _stored(view, offsets, mask)
    first, second = set_terms(kind, y, d, multiplier[:, None])
    first = add_neighbours(tl.where(mask, first, 0.0), ROWS, WIDTH)
    return first, add_neighbours(tl.where(mask, second, 0.0), ROWS, WIDTH)


@triton.jit
def _add_to_lane(lanes, part, number, LANES: tl.constexpr):
    is_lane = tl.arange(0, LANES) == number % LANES
    return lanes + tl.where(is_lane[None, :], part[:, None], 0.0)


@triton.jit
def _row_sizes(view, ROWS: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr):
    """Return the sums of ``size_term`` over rows."""
    length = tl.load(view[3] + 4)
    lanes = tl.zeros([ROWS, LANES], tl.float64)
    start = length * 0
    while start < length:
        part = part_sizes(view, start, ROWS, WIDTH)
        lanes = _add_to_lane(lanes, part, start // WIDTH, LANES)
        start += WIDTH
    return add_neighbours(lanes, ROWS, LANES)


@triton.jit
def _row_terms(view, multiplier, ROWS: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr):
    """Return the sums of both of ``set_terms`` over rows."""
    length = tl.load(view[3] + 4)
    firsts = tl.zeros([ROWS, LANES], tl.float64)
    seconds = tl.zeros([ROWS, LANES], tl.float64)
    start = length * 0
    while start < length:
        first, second = part_terms(view, start, multiplier, ROWS, WIDTH)
        firsts = _add_to_lane(firsts, first, start // WIDTH, LANES)
        seconds = _add_to_lane(seconds, second, start // WIDTH, LANES)
        start += WIDTH
    return add_neighbours(firsts, ROWS, LANES), add_neighbours(seconds, ROWS, LANES)


@triton.jit
def search(
    view,
    multiplier,
    scale,
    state,
    evaluations,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
):
    """Return the multipliers, scales and states at the end of the rows' searches."""
    kind, size, _ = set_of(view[3])
    while tl.max((state == SEARCHING).to(tl.int32), axis=0) > 0:
        first, second = _row_terms(view, multiplier, ROWS, WIDTH, LANES)
        multiplier, scale, state = continue_search(
            kind, size, first, second, multiplier, scale, state, evaluations
        )
        evaluations += 1
    return multiplier, scale, state


@triton.jit
def apply(view, start, multiplier, scale, state, WIDTH: tl.constexpr):
    """Project ``WIDTH`` elements of those rows that were found a multiplier."""
    kind, param, _, entry, rows, _, eps = view
    offsets, mask = _places(entry, rows, start, WIDTH)
    mask = mask & (state == FOUND)[:, None]
    y, d = _stored(view, offsets, mask)
    x = projected(kind, y, d, multiplier[:, None], scale[:, None])
    store(param + offsets, x.to(eps.dtype), mask)


@triton.jit
def project_kernel(
    tensors,
    sets,
    inputs,
    scalars,
    items,
    PARAM: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    SECOND_MOMENT: tl.constexpr,
    DEVICE_SCALARS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
):
    """Project rows from beginning to end.

    ``tensors``, ``inputs`` and ``scalars`` are as in :func:`.step_kernel`, ``sets`` rows of
    SetEntry and its runs; ``items`` are int32 pairs of a tensor and its block of ``ROWS`` rows.
    """
    item = items + 2 * tl.program_id(0)
    index = tl.load(item)
    rows = tl.load(item + 1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    projects, view, multipliers = open_rows(
        tensors,
        sets,
        inputs,
        scalars,
        index,
        rows,
        PARAM,
        EXP_AVG_SQ,
        SECOND_MOMENT,
        DEVICE_SCALARS,
    )
    if projects:
        entry = view[3]
        kind, size, tolerance = set_of(entry)
        exists = rows < tl.load(entry + 3)
        last = tl.load(multipliers, exists, other=0.0)
        size_sum = _row_sizes(view, ROWS, WIDTH, LANES)
        multiplier, state = begin_search(kind, size, tolerance, size_sum, last)
        state = tl.where(exists, state, LEFT_ALONE)
        scale = tl.full([ROWS], 1.0, tl.float64)
        multiplier, scale, state = search(
            view, multiplier, scale, state, index * 0, ROWS, WIDTH, LANES
        )
        tl.store(multipliers, multiplier, exists)
        length = tl.load(entry + 4)
        is_found = tl.max((state == FOUND).to(tl.int32), axis=0) > 0
        start = tl.where(is_found, 0, length)
        while start < length:
            apply(view, start, multiplier, scale, state, WIDTH)
            start += WIDTH
