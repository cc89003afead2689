"""Scalars that only the device knows, by torch operators: for the backends without a kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.bucket import DeviceScalars
from ...core.scalars import StepOptions, StepScalars, as_float64, derive_step_scalars

__all__ = ["device_rows"]


def device_rows(
    source: DeviceScalars, rows: Sequence[int], dtype: torch.dtype, device: torch.device
) -> tuple[list[StepScalars], Tensor | None]:
    """Derive the scalars of each tensor on the device, and count the step there.

    Args:
        source: what they are derived from; ``steps`` are increased unless the step is skipped.
        rows: tensor ``i`` has ``source.options[rows[i]]``.
        dtype: the compute type, which every scalar is rounded to.
        device: the bucket's.

    Returns:
        A row of 0-dimensional tensors for each tensor, and whether the step is skipped: a boolean
        0-dimensional tensor, or None where it cannot be.
    """
    factor, skip = source.inputs.factor_on_device()
    taken: int | Tensor = 1
    if isinstance(skip, Tensor):
        taken = (~skip).to(torch.float32)
        if source.inputs.skipped_steps is not None:
            source.inputs.skipped_steps.add_(skip)
    tensors_of: list[list[int]] = [[] for _ in source.options]
    for i, row in enumerate(rows):
        tensors_of[row].append(i)
    derived: dict[int, StepScalars] = {}
    for options, tensors in zip(source.options, tensors_of, strict=True):
        counts = torch.stack([source.steps[i].detach() for i in tensors]).to(torch.int64) + 1
        scalars = derive_step_scalars(counts, _as_tensors(options, device), factor)
        columns = [as_float64(s, device).to(dtype).expand(len(tensors)).unbind() for s in scalars]
        derived.update(zip(tensors, map(StepScalars, *columns), strict=True))
    with torch.no_grad():
        for step in source.steps:
            step.add_(taken)
    return [derived[i] for i in range(len(rows))], skip if isinstance(skip, Tensor) else None


def _as_tensors(options: StepOptions, device: torch.device) -> StepOptions:
    """Return ``options`` with its numbers as float64 tensors on the device."""
    numbers = {
        name: as_float64(value, device)
        for name, value in options._asdict().items()
        if not isinstance(value, bool)
    }
    return options._replace(**numbers)
