"""The Triton kernels that project rows too long for one program.

Programs share each sum of a row, a chunk each, and launches alternate between sums and what follows
from them, whatever the values are, so that nothing waits for the device. Importing this imports
Triton, which is slow: :mod:`.backend` does so on first use.

All take what :func:`.project_kernel` does, and ``long_rows``, three int64 each: its tensor, its row
there, and the first of its ``long_items``, which are int32 pairs of a long row and a chunk of it.
An item's sums lie at its place in ``firsts`` and ``seconds``, float64. Between launches, a row's
search is in ``states``, int32 pairs of its state and evaluations, in ``scales``, float64, and in
the multiplier of the tensor. A program whose row does not search, or project, returns at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...core.bucket import BucketKey
from ...core.norm import LANES, chunk_elements
from . import rows as triton_rows
from .rows import Tile, add_neighbours, apply, open_rows, part_sizes, part_terms, search, set_of
from .sets import FOUND, LEFT_ALONE, SEARCHING, begin_search, continue_search

__all__ = [
    "apply_kernel",
    "begin_kernel",
    "constants",
    "continue_kernel",
    "evaluate_kernel",
    "finish_kernel",
    "size_kernel",
]

_LANES = tl.constexpr(LANES)
_LONG_ROW_WORDS = tl.constexpr(3)


def constants(key: BucketKey) -> dict[str, object]:
    """Return the compile-time arguments of the kernels here."""
    chunk = chunk_elements(key.format.compute)
    made = triton_rows.constants(key, Tile(1, chunk, LANES))
    return {**{name: made[name] for name in list(made)[:4]}, "CHUNK": chunk}


@triton.jit
def _open(
    tensors,
    sets,
    inputs,
    scalars,
    long_rows,
    number,
    PARAM: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    SECOND_MOMENT: tl.constexpr,
    DEVICE_SCALARS: tl.constexpr,
):
    """Return what :func:`.open_rows` does, of a long row."""
    long_row = long_rows + _LONG_ROW_WORDS * number
    return open_rows(
        tensors,
        sets,
        inputs,
        scalars,
        tl.load(long_row),
        tl.load(long_row + 1) + tl.arange(0, 1),
        PARAM,
        EXP_AVG_SQ,
        SECOND_MOMENT,
        DEVICE_SCALARS,
    )


@triton.jit
def _add_chunks(sums, long_rows, number, view, CHUNK: tl.constexpr):
    """Return the sum of a row's chunks: by lanes, and the tree of the lanes."""
    chunks = tl.cdiv(tl.load(view[3] + 4), CHUNK)
    sums += tl.load(long_rows + _LONG_ROW_WORDS * number + 2)
    lanes = tl.zeros([1, _LANES], tl.float64)
    at = chunks * 0
    while at < chunks:
        chunk = at + tl.arange(0, _LANES)[None, :]
        lanes += tl.load(sums + chunk, chunk < chunks, other=0.0)
        at += _LANES
    return add_neighbours(lanes, 1, _LANES)


@triton.jit
def size_kernel(
    tensors,
    sets,
    inputs,
    scalars,
    long_rows,
    long_items,
    firsts,
    PARAM: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    SECOND_MOMENT: tl.constexpr,
    DEVICE_SCALARS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Add up ``size_term`` of each chunk."""
    item = tl.program_id(0)
    number = tl.load(long_items + 2 * item)
    projects, view, _ = _open(
        tensors,
        sets,
        inputs,
        scalars,
        long_rows,
        number,
        PARAM,
        EXP_AVG_SQ,
        SECOND_MOMENT,
        DEVICE_SCALARS,
    )
    if projects:
        start = tl.load(long_items + 2 * item + 1).to(tl.int64) * CHUNK
        tl.store(firsts + item + tl.arange(0, 1), part_sizes(view, start, 1, CHUNK))


@triton.jit
def begin_kernel(
    tensors,
    sets,
    inputs,
    scalars,
    long_rows,
    states,
    scales,
    firsts,
    PARAM: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    SECOND_MOMENT: tl.constexpr,
    DEVICE_SCALARS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Begin each row's search, or end it at once."""
    number = tl.program_id(0)
    place = number + tl.arange(0, 1)
    projects, view, multipliers = _open(
        tensors,
        sets,
        inputs,
        scalars,
        long_rows,
        number,
        PARAM,
        EXP_AVG_SQ,
        SECOND_MOMENT,
        DEVICE_SCALARS,
    )
    state = tl.full([1], LEFT_ALONE, tl.int32)
    if projects:
        kind, size, tolerance = set_of(view[3])
        size_sum = _add_chunks(firsts, long_rows, number, view, CHUNK)
        last = tl.load(multipliers)
        multiplier, state = begin_search(kind, size, tolerance, size_sum, last)
        tl.store(multipliers, multiplier)
    tl.store(states + 2 * place, state)
    tl.store(states + 2 * place + 1, state * 0)
    tl.store(scales + place, tl.full([1], 1.0, tl.float64))


@triton.jit
def evaluate_kernel(
    tensors,
    sets,
    inputs,
    scalars,
    long_rows,
    long_items,
    states,
    firsts,
    seconds,
    PARAM: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    SECOND_MOMENT: tl.constexpr,
    DEVICE_SCALARS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Add up both of ``set_terms`` of each chunk."""
    item = tl.program_id(0)
    number = tl.load(long_items + 2 * item)
    if tl.load(states + 2 * number) == SEARCHING:
        _, view, multipliers = _open(
            tensors,
            sets,
            inputs,
            scalars,
            long_rows,
            number,
            PARAM,
            EXP_AVG_SQ,
            SECOND_MOMENT,
            DEVICE_SCALARS,
        )
        start = tl.load(long_items + 2 * item + 1).to(tl.int64) * CHUNK
        first, second = part_terms(view, start, tl.load(multipliers), 1, CHUNK)
        tl.store(firsts + item + tl.arange(0, 1), first)
        tl.store(seconds + item + tl.arange(0, 1), second)


@triton.jit
def continue_kernel(
    tensors,
    sets,
    inputs,
    scalars,
    long_rows,
    states,
    scales,
    firsts,
    seconds,
    PARAM: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    SECOND_MOMENT: tl.constexpr,
    DEVICE_SCALARS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Move each row's search on, or end it."""
    number = tl.program_id(0)
    place = number + tl.arange(0, 1)
    if tl.load(states + 2 * number) == SEARCHING:
        _, view, multipliers = _open(
            tensors,
            sets,
            inputs,
            scalars,
            long_rows,
            number,
            PARAM,
            EXP_AVG_SQ,
            SECOND_MOMENT,
            DEVICE_SCALARS,
        )
        kind, size, _ = set_of(view[3])
        first = _add_chunks(firsts, long_rows, number, view, CHUNK)
        second = _add_chunks(seconds, long_rows, number, view, CHUNK)
        state = tl.load(states + 2 * place)
        evaluations = tl.load(states + 2 * place + 1)
        scale = tl.load(scales + place)
        multiplier, scale, state = continue_search(
            kind, size, first, second, tl.load(multipliers), scale, state, evaluations
        )
        tl.store(multipliers, multiplier)
        tl.store(states + 2 * place, state)
        tl.store(states + 2 * place + 1, evaluations + 1)
        tl.store(scales + place, scale)


@triton.jit
def finish_kernel(
    tensors,
    sets,
    inputs,
    scalars,
    long_rows,
    states,
    scales,
    PARAM: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    SECOND_MOMENT: tl.constexpr,
    DEVICE_SCALARS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """End the searches that are not over: one program a row, slow and rare."""
    number = tl.program_id(0)
    place = number + tl.arange(0, 1)
    if tl.load(states + 2 * number) == SEARCHING:
        _, view, multipliers = _open(
            tensors,
            sets,
            inputs,
            scalars,
            long_rows,
            number,
            PARAM,
            EXP_AVG_SQ,
            SECOND_MOMENT,
            DEVICE_SCALARS,
        )
        state = tl.load(states + 2 * place)
        evaluations = tl.load(states + 2 * number + 1)
        multiplier, scale, state = search(
            view,
            tl.load(multipliers),
            tl.load(scales + place),
            state,
            evaluations,
            1,
            CHUNK,
            _LANES,
        )
        tl.store(multipliers, multiplier)
        tl.store(states + 2 * place, state)
        tl.store(scales + place, scale)


@triton.jit
def apply_kernel(
    tensors,
    sets,
    inputs,
    scalars,
    long_rows,
    long_items,
    states,
    scales,
    PARAM: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    SECOND_MOMENT: tl.constexpr,
    DEVICE_SCALARS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Project each chunk of the rows that were found a multiplier."""
    item = tl.program_id(0)
    number = tl.load(long_items + 2 * item)
    if tl.load(states + 2 * number) == FOUND:
        _, view, multipliers = _open(
            tensors,
            sets,
            inputs,
            scalars,
            long_rows,
            number,
            PARAM,
            EXP_AVG_SQ,
            SECOND_MOMENT,
            DEVICE_SCALARS,
        )
        place = number + tl.arange(0, 1)
        start = tl.load(long_items + 2 * item + 1).to(tl.int64) * CHUNK
        scale = tl.load(scales + place)
        state = tl.load(states + 2 * place)
        apply(view, start, tl.load(multipliers), scale, state, CHUNK)
