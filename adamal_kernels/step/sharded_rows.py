"""Projection of rows that are spread over processes: their sums are reduced over the mesh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.eager.sets import project
from ..core.bucket import Bucket
from ..core.rows import coupled_rows
from ..core.scalars import StepScalars, as_float64, derive_step_scalars
from .entry import Entry
from .sharded import local_part, row_reducer

__all__ = ["Stepped", "project_split_rows"]


class Stepped(NamedTuple):
    """A parameter that has been stepped and not yet projected."""

    entry: Entry
    bucket: Bucket
    index: int
    """In the bucket."""
    held: Mapping[str, Tensor]
    """Its state; ``step`` includes this one where the bucket's device counts them."""


def project_split_rows(stepped: Stepped) -> None:
    """Project a stepped parameter whose rows no process has whole.

    A collective: every process of the mesh has to call it for the same parameters in one order.
    The backend has stepped this process's part, without a projection; here its rows' sums are
    added over the mesh. Every evaluation of the search is one reduction, and is waited for.
    """
    entry, bucket, index = stepped.entry, stepped.bucket, stepped.index
    assert entry.coupled is not None
    scalars, skip = _scalars_of(stepped)
    param = bucket.params[index]
    project(
        param,
        bucket.divisors[index],
        local_part(stepped.held["multiplier"]),
        coupled_rows(param, entry.coupled),
        scalars,
        compute=bucket.key.format.compute,
        skip=skip,
        reduce=row_reducer(entry.owner, entry.coupled.reduced_dims(entry.owner.dim())),
    )


def _scalars_of(stepped: Stepped) -> tuple[StepScalars, Tensor | None]:
    """Return the step's scalars as tensors, and whether it was skipped after all."""
    bucket, row = stepped.bucket, stepped.bucket.rows[stepped.index]
    dtype, device = bucket.key.format.compute, bucket.key.device
    source = bucket.device_scalars
    if source is None:
        known = bucket.scalars[row]
        return _as_tensors(known, dtype, device), None
    factor, skip = source.inputs.factor_on_device()
    options = source.options[row].on_device(device)
    derived = derive_step_scalars(stepped.held["step"].to(torch.int64), options, factor)
    return _as_tensors(derived, dtype, device), skip if isinstance(skip, Tensor) else None


def _as_tensors(scalars: StepScalars, dtype: torch.dtype, device: torch.device) -> StepScalars:
    return StepScalars(*(as_float64(s, device).to(dtype) for s in scalars))
