"""Projection onto sets that couple elements, in eager PyTorch: what every backend must equal.

The step stores the parameter as ever; what it stored is then projected in the metric ``diag(d)``.
All is float64, in the order written here, and sums are added in that of
:mod:`adamal_kernels.core.norm`; the twin is ``csrc/formula/sets.h``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...core.bucket import Bucket
from ...core.norm import chunk_elements, row_sums
from ...core.rounding import rounded_sqrt
from ...core.rows import CoupledRows
from ...core.scalars import StepScalars
from ...core.storage import load
from ...projections import L1Ball, L2Ball, Simplex

__all__ = ["project", "project_bucket", "project_rows"]

# Twins of the constants in csrc/formula/sets.h, which says what they are for.
_SEARCH_TOLERANCES = (2.0**-40, 2.0**-50, 2.0**-50)
_MOST_EVALUATIONS = 100
_LEAST_METRIC = 1e-100
_ALL_ELEMENTS = -math.inf


Reduce = Callable[[Tensor], Tensor]


def project_bucket(
    bucket: Bucket, scalars: Sequence[StepScalars], skip: Tensor | None = None
) -> None:
    """Project what a backend has stepped; ``scalars`` and ``skip`` are as in :func:`project`."""
    multipliers = bucket.buffers["multiplier"]
    compute = bucket.key.format.compute
    for tensors in zip(
        bucket.params, bucket.divisors, multipliers, bucket.sets, scalars, strict=True
    ):
        project(*tensors, compute=compute, skip=skip)


def project(
    param: Tensor,
    denominator_sq: Tensor,
    multiplier: Tensor,
    rows: CoupledRows,
    scalars: StepScalars,
    *,
    compute: torch.dtype,
    skip: Tensor | None = None,
    reduce: Reduce | None = None,
) -> None:
    """Project what a step stored; waits for the device as often as sums are taken.

    Args:
        param: dense, as ``rows`` describes it; changed in place.
        denominator_sq: what the step's denominator is made of: ``exp_avg_sq``, or its maximum
            with amsgrad, as it is stored, laid out as ``param``.
        multiplier: float64, an element a row; changed in place.
        rows: the set.
        scalars: the step's: 0-dimensional tensors of the compute type, on the device.
        compute: the compute type; it fixes the order of sums.
        skip: whether nothing is to be done after all: a boolean 0-dimensional tensor.
        reduce: as in :func:`project_rows`.

    Raises:
        RuntimeError: a CUDA graph is being captured, which cannot wait.
    """
    if param.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "projection: outside of the cuda and triton backends the search for a multiplier waits "
            "for the device, which a CUDA graph cannot capture; use backend='cuda' or 'triton'"
        )
    stored, v = _rows_of(param, rows), _rows_of(denominator_sq, rows)
    last = _flat(multiplier)
    metric = rounded_sqrt(load(v, compute)) / scalars.bias2_sqrt + scalars.eps
    stands = scalars.step_size == 0
    if skip is not None:
        stands = stands | skip
    values, multipliers = project_rows(
        load(stored, compute).double(),
        metric.double(),
        last,
        rows,
        chunk_elements(compute),
        reduce,
    )
    sizes, strides = zip(*rows.kept, *rows.reduced, strict=True)
    target = param.as_strided(sizes, strides)
    found = torch.where(stands, stored, values.to(compute).to(param.dtype))
    target.copy_(found.view(sizes))
    _flat(multiplier).copy_(torch.where(stands, last, multipliers))


def project_rows(
    y: Tensor,
    d: Tensor,
    last: Tensor,
    rows: CoupledRows,
    chunk: int,
    reduce: Reduce | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the projected rows and their multipliers.

    Args:
        y: float64 ``[rows, length]``.
        d: the metric, likewise.
        last: float64 ``[rows]``: the multipliers to start from.
        rows: the set; its layout is not used.
        chunk: how many elements the innermost tree of a sum adds.
        reduce: adds sums, float64 ``[rows, n]``, over the processes that rows are spread over,
            which then all have to call this.

    Returns:
        Values that are exactly ``y`` in rows left alone, and new multipliers.
    """

    def sums(*terms: Tensor) -> Sequence[Tensor]:
        found = torch.stack([row_sums(term, chunk) for term in terms], dim=1)
        return (found if reduce is None else reduce(found)).unbind(dim=1)

    size = torch.full((), rows.size, dtype=torch.float64, device=y.device)
    d = torch.where(d < _LEAST_METRIC, _LEAST_METRIC, d)
    (size_sum,) = sums(_size_term(rows.kind, y))
    searching = ~_is_inside(rows, size_sum)
    least = -math.inf if rows.kind == Simplex.kind else 0.0
    usable = (last > least) & (last < math.inf)
    multiplier = torch.where(searching & usable, last, 0.0)
    scale = torch.ones_like(multiplier)
    found = torch.zeros_like(searching)
    evaluations = 0
    while bool(searching.any()):
        first, second = sums(*_set_terms(rows.kind, y, d, multiplier.unsqueeze(1)))
        is_last = multiplier != _ALL_ELEMENTS
        # From these every element counts. Where the whole metric is infinite, none does: none can
        # move.
        counts_all = multiplier == 0 if rows.kind == L1Ball.kind else ~is_last
        is_finite = first.isfinite() & second.isfinite() & ~(counts_all & (second == 0))
        multiplier = torch.where(searching & ~is_finite, 0.0, multiplier)
        searching = searching & is_finite
        length = rounded_sqrt(first) if rows.kind == L2Ball.kind else first
        excess = length - size
        following = _next_multiplier(rows.kind, size, excess, first, second, multiplier)
        evaluations += 1
        is_close = is_last & (excess.abs() <= _SEARCH_TOLERANCES[rows.kind] * rows.size)
        is_stuck = ((excess <= 0) & (evaluations > 1)) | (following == multiplier)
        is_stuck = is_last & ~is_close & (is_stuck | (evaluations >= _MOST_EVALUATIONS))
        is_scaled = length > (0 if rows.kind == Simplex.kind else rows.size)
        scale = torch.where(searching & is_stuck & is_scaled, size / length, scale)
        multiplier = torch.where(searching & ~is_stuck, following, multiplier)
        found = found | (searching & (is_close | is_stuck))
        searching = searching & ~found
    moved = _projected_size(rows.kind, y, d, multiplier.unsqueeze(1)) * scale.unsqueeze(1)
    if rows.kind == L1Ball.kind:
        moved = torch.where(y < 0, 0 - moved, moved)  # Never -0.
    return torch.where(found.unsqueeze(1), moved, y), multiplier


def _next_multiplier(
    kind: int, size: Tensor, excess: Tensor, first: Tensor, second: Tensor, multiplier: Tensor
) -> Tensor:
    if kind == L2Ball.kind:
        following = multiplier + excess / size * (first / second)
    else:
        start = torch.where(multiplier == _ALL_ELEMENTS, 0.0, multiplier)
        restart = 0.0 if kind == L1Ball.kind else _ALL_ELEMENTS
        following = torch.where(second == 0, restart, start + excess / second)
    return following if kind == Simplex.kind else torch.where(following > 0, following, 0.0)


def _size_term(kind: int, y: Tensor) -> Tensor:
    if kind == L2Ball.kind:
        return y * y
    if kind == L1Ball.kind:
        return y.abs()
    return torch.where(y >= 0, y, math.inf)


def _is_inside(rows: CoupledRows, size_sum: Tensor) -> Tensor:
    most = rows.size * (1 + rows.tolerance)
    if rows.kind == L2Ball.kind:
        return size_sum <= most * most
    if rows.kind == L1Ball.kind:
        return size_sum <= most
    return (size_sum <= most) & (size_sum >= rows.size * (1 - rows.tolerance))


def _projected_size(kind: int, y: Tensor, d: Tensor, multiplier: Tensor) -> Tensor:
    if kind == L2Ball.kind:
        return y / (1 + multiplier / d)
    size = y.abs() if kind == L1Ball.kind else y
    moved = size - multiplier / d
    moved = torch.where(moved <= 0, 0.0, moved)
    return torch.where(multiplier == _ALL_ELEMENTS, size, moved)


def _set_terms(kind: int, y: Tensor, d: Tensor, multiplier: Tensor) -> tuple[Tensor, Tensor]:
    size = _projected_size(kind, y, d, multiplier)
    if kind == L2Ball.kind:
        square = size * size
        return square, square / (d + multiplier)
    counts = (multiplier == _ALL_ELEMENTS) | (size != 0)
    return size, torch.where(counts, torch.ones_like(d) / d, 0.0)


def _rows_of(tensor: Tensor, rows: CoupledRows) -> Tensor:
    sizes, strides = zip(*rows.kept, *rows.reduced, strict=True)
    return tensor.as_strided(sizes, strides).reshape(rows.rows, rows.length)


def _flat(multiplier: Tensor) -> Tensor:
    """Return the multipliers in the order of the rows, sharing their memory."""
    return multiplier.as_strided((multiplier.numel(),), (1,))
