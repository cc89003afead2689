"""Sets that couple elements: how a tensor's rows, each of them in a set, lie in its memory.

The arithmetic is in :mod:`adamal_kernels.backends.eager.sets`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..projections import CoupledSet
from .layout import is_dense

__all__ = [
    "MOST_RUNS",
    "CoupledRows",
    "coupled_rows",
    "inside_tolerance",
    "multiplier_shape",
    "multiplier_strides",
]

MOST_RUNS = 4
"""Of dimensions that rows, or the elements of one, are scattered over."""


class CoupledRows(NamedTuple):
    """A tensor's set, and how its rows lie in memory, as ``csrc/formula/rows.h`` has it."""

    kind: int
    size: float
    tolerance: float
    kept: tuple[tuple[int, int], ...]
    """Sizes and strides, the largest stride first, of what numbers the rows."""
    reduced: tuple[tuple[int, int], ...]
    """The same of what numbers the elements of a row."""

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return math.prod(size for size, _ in self.kept)

    @property
    def length(self) -> int:
        """How many elements a row has."""
        return math.prod(size for size, _ in self.reduced)


def coupled_rows(param: Tensor, projection: CoupledSet) -> CoupledRows:
    """Return the rows of a tensor of any strides, as they lie in it or in a dense copy of it.

    Raises:
        NotImplementedError: rows or their elements are scattered over more than four runs of
            dimensions.

    Example:
        >>> from adamal_kernels import L2Ball
        >>> coupled_rows(torch.empty(3, 4, 5), L2Ball(1.0, dim=1))[3:]
        (((3, 20), (5, 1)), ((4, 5),))
    """
    reduced = projection.reduced_dims(param.dim())
    runs: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    last = None
    order = _memory_order(param)
    for i, dim in enumerate(order):
        size = param.shape[dim]
        stride = math.prod(param.shape[inner] for inner in order[i + 1 :])
        is_reduced = dim in reduced
        of_kind = runs[is_reduced]
        if last is is_reduced:
            of_kind[-1] = (of_kind[-1][0] * size, stride)
        else:
            of_kind.append((size, stride))
        last = is_reduced
    if max(map(len, runs)) > MOST_RUNS:
        raise NotImplementedError(
            f"projection: the rows of {projection} are scattered over more than {MOST_RUNS} runs "
            f"of dimensions in a parameter of shape {tuple(param.shape)}; reshape it, so that "
            "fewer dimensions alternate"
        )
    kept, of_rows = map(tuple, runs)
    return CoupledRows(
        projection.kind,
        projection.size,
        inside_tolerance(param.dtype),
        kept,
        of_rows or ((1, 1),),
    )


def inside_tolerance(dtype: torch.dtype) -> float:
    """Return how far beyond its size, relative to it, a row still counts as in the set.

    A unit in the last place of 1: as far as a projected row can be once it is stored. Of float64,
    64 of them: what the search itself rounds away.
    """
    return max(torch.finfo(dtype).eps, 2.0**-46)


def multiplier_shape(shape: Sequence[int], projection: CoupledSet) -> tuple[int, ...]:
    """Return a parameter's shape with 1 for the dimensions of a row.

    Example:
        >>> from adamal_kernels import L2Ball
        >>> multiplier_shape((3, 4), L2Ball(1.0, dim=1)), multiplier_shape((3, 4), L2Ball(1.0))
        ((3, 1), (1, 1))
    """
    reduced = projection.reduced_dims(len(shape))
    return tuple(1 if dim in reduced else size for dim, size in enumerate(shape))


def multiplier_strides(param: Tensor, projection: CoupledSet) -> tuple[int, ...]:
    """Return the strides by which multipliers lie in memory in the order of the rows.

    Example:
        >>> from adamal_kernels import L2Ball
        >>> multiplier_strides(torch.empty(4, 3).t(), L2Ball(1.0, dim=1))
        (1, 3)
    """
    shape = multiplier_shape(param.shape, projection)
    strides = [1] * param.dim()
    stride = 1
    for dim in reversed(_memory_order(param)):
        strides[dim] = stride
        stride *= max(shape[dim], 1)
    return tuple(strides)


def _memory_order(tensor: Tensor) -> list[int]:
    """Return the dimensions of more than one element, the largest stride first.

    A tensor with gaps is stepped as a copy, which is contiguous.
    """
    dims = [dim for dim in range(tensor.dim()) if tensor.shape[dim] != 1]
    return sorted(dims, key=tensor.stride, reverse=True) if is_dense(tensor) else dims
