"""The Triton twin of ``csrc/formula/sets.h``: the terms of elements, and the search of a row.

What is of a row may be a number, or a vector of rows. Importing this imports Triton, which is slow:
:mod:`.backend` does so on first use.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...projections import L1Ball, L2Ball, Simplex

__all__ = [
    "FOUND",
    "LEAST_METRIC",
    "LEFT_ALONE",
    "SEARCHING",
    "begin_search",
    "continue_search",
    "projected",
    "set_terms",
    "size_term",
]

SEARCHING = tl.constexpr(0)
FOUND = tl.constexpr(1)
LEFT_ALONE = tl.constexpr(2)
LEAST_METRIC = tl.constexpr(1e-100)

_L2_BALL = tl.constexpr(L2Ball.kind)
_L1_BALL = tl.constexpr(L1Ball.kind)
_SIMPLEX = tl.constexpr(Simplex.kind)
_BALL_TOLERANCE = tl.constexpr(2.0**-40)
_OTHER_TOLERANCE = tl.constexpr(2.0**-50)
_MOST_EVALUATIONS = tl.constexpr(100)
_INFINITY = tl.constexpr(float("inf"))
_ALL_ELEMENTS = tl.constexpr(float("-inf"))


@triton.jit
def size_term(kind, y):
    """Return the terms of the sums that tell whether rows are in the set."""
    positive = tl.where(y >= 0, y, _INFINITY)
    return tl.where(kind == _L2_BALL, y * y, tl.where(kind == _L1_BALL, _magnitude(y), positive))


@triton.jit
def set_terms(kind, y, d, multiplier):
    """Return the terms of the two sums at a multiplier."""
    size = _projected_size(kind, y, d, multiplier)
    if kind == _L2_BALL:
        first = size * size
        second = first / (d + multiplier)
    else:
        first = size
        second = tl.where((multiplier == _ALL_ELEMENTS) | (size != 0), 1 / d, 0.0)
    return first, second


@triton.jit
def projected(kind, y, d, multiplier, scale):
    """Return the elements of projected rows."""
    size = _projected_size(kind, y, d, multiplier) * scale
    return tl.where((kind == _L1_BALL) & (y < 0), 0 - size, size)  # Never -0.


@triton.jit
def begin_search(kind, size, tolerance, size_sum, last_multiplier):
    """Return the multiplier to start from and the state, by the sum of :func:`size_term`."""
    most = size * (1 + tolerance)
    is_inside = size_sum <= tl.where(kind == _L2_BALL, most * most, most)
    is_inside = is_inside & ((kind != _SIMPLEX) | (size_sum >= size * (1 - tolerance)))
    least = tl.where(kind == _SIMPLEX, _ALL_ELEMENTS, 0.0)
    is_usable = (last_multiplier > least) & (last_multiplier < _INFINITY)
    multiplier = tl.where(is_inside | (is_usable == 0), 0.0, last_multiplier)
    return multiplier, tl.where(is_inside, LEFT_ALONE, SEARCHING)


@triton.jit
def continue_search(kind, size, first, second, before, scale, state, evaluations):
    """Return the next multiplier, scale and state of a row that was evaluated at ``before``.

    ``first`` and ``second`` are the sums of :func:`set_terms`; there were ``evaluations`` before.
    Of a row that is not searching, everything stays.
    """
    is_ball = kind == _L2_BALL
    is_finite = (first < _INFINITY) & (first > _ALL_ELEMENTS)
    is_finite = is_finite & (second < _INFINITY) & (second > _ALL_ELEMENTS)
    is_all = before == _ALL_ELEMENTS
    counts_all = is_all | ((kind == _L1_BALL) & (before == 0))
    is_finite = is_finite & ((counts_all & (second == 0)) == 0)
    found_size = tl.where(is_ball, tl.sqrt(first), first)
    excess = found_size - size
    of_ball = before + excess / size * (first / second)
    restart = tl.where(kind == _L1_BALL, 0.0, _ALL_ELEMENTS)
    start = tl.where(is_all, 0.0, before)
    of_other = tl.where(second == 0, restart, start + excess / second)
    following = tl.where(is_ball, of_ball, of_other)
    following = tl.where((kind == _SIMPLEX) | (following > 0), following, 0.0)

    tolerance = size * tl.where(is_ball, _BALL_TOLERANCE, _OTHER_TOLERANCE)
    is_close = (is_all == 0) & (_magnitude(excess) <= tolerance)
    is_stuck = (excess <= 0) & (evaluations > 0) | (following == before)
    is_stuck = (is_all == 0) & (is_close == 0) & (is_stuck | (evaluations + 1 >= _MOST_EVALUATIONS))
    is_scaled = found_size > tl.where(kind == _SIMPLEX, 0.0, size)

    goes_on = (state == SEARCHING) & is_finite
    scale = tl.where(goes_on & is_stuck & is_scaled, size / found_size, scale)
    multiplier = tl.where(goes_on & (is_stuck == 0), following, before)
    multiplier = tl.where((state == SEARCHING) & (is_finite == 0), 0.0, multiplier)
    ended = tl.where(is_finite, tl.where(is_close | is_stuck, FOUND, SEARCHING), LEFT_ALONE)
    return multiplier, scale, tl.where(state == SEARCHING, ended, state)


@triton.jit
def _magnitude(x):
    return tl.where(x < 0, 0 - x, x)


@triton.jit
def _projected_size(kind, y, d, multiplier):
    """Return the distance of elements to 0 after projection, without the scale."""
    ratio = multiplier / d
    if kind == _L2_BALL:
        size = y / (1 + ratio)
    else:
        all_of_it = tl.where(kind == _L1_BALL, _magnitude(y), y)
        moved = all_of_it - ratio
        moved = tl.where(moved <= 0, 0.0, moved)
        size = tl.where(multiplier == _ALL_ELEMENTS, all_of_it, moved)
    return size
