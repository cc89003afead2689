"""A parameter's state: made where it is missing, moved and cast where it no longer fits."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor

from ..core.buffers import Buffer, buffers_of, held_buffers
from ..core.layout import same_layout
from ..projections import CoupledSet
from .entry import Entry
from .sharded import local_part, moment_like, multiplier_like, placed_as

__all__ = ["is_count", "is_shared", "named_tensors", "state_of"]


def state_of(entry: Entry, state: MutableMapping[Tensor, dict[str, Any]]) -> dict[str, Any]:
    """Return the parameter's state, made if missing, moved with the parameter if that moved."""
    param = entry.owner
    held = state[param]
    step_device = param.device if entry.key.device_scalars else torch.device("cpu")
    is_new = not held
    held["step"] = (
        torch.zeros((), dtype=torch.float32, device=step_device)
        if is_new
        else _as_count(held["step"], step_device)
    )
    for buffer in buffers_of(entry.key.second_moment, entry.coupled is not None):
        if buffer.shape == "rows":
            assert entry.coupled is not None
            held[buffer.key] = _placed_rows(buffer, held.get(buffer.key), entry, entry.coupled)
        elif buffer.key not in held and buffer.starts_as and not is_new:
            origin = held[buffer.starts_as]
            held[buffer.key] = origin.clone(memory_format=torch.preserve_format)
        elif buffer.key not in held:
            held[buffer.key] = moment_like(
                param, buffer.dtype(entry.key.format, is_complex=param.is_complex())
            )
    for buffer in held_buffers(held):
        if buffer.shape == "parameter":
            dtype = buffer.dtype(entry.key.format, is_complex=param.is_complex())
            held[buffer.key] = held[buffer.key].to(device=param.device, dtype=dtype)
    return held


def is_count(step: Tensor, device: torch.device) -> bool:
    """Whether a step count can be added to where it is."""
    return (
        type(step) is Tensor
        and (step.dtype, step.dim(), step.device) == (torch.float32, 0, device)
        and not (step.requires_grad or step.is_inference())
    )


def _as_count(step: Tensor, device: torch.device) -> Tensor:
    """Return a count on ``device``: the step itself, a view of it or a copy."""
    if is_count(step, device):
        return step
    count = local_part(step).detach().to(device=device, dtype=torch.float32).reshape(())
    return count.clone() if count.is_inference() else count


def _placed_rows(buffer: Buffer, found: Tensor | None, entry: Entry, coupled: CoupledSet) -> Tensor:
    """Return a number for every row, in the order of the rows: ``found`` if that fits.

    One of another shape is that of a set the group had before: it starts anew.
    """
    wanted = multiplier_like(entry.owner, coupled)
    if found is None or found.shape != wanted.shape:
        return wanted
    placed = placed_as(wanted, found, f"state[{buffer.key!r}] of {entry.where}")
    part, wanted_part = local_part(placed), local_part(wanted)
    if (
        part.dtype == wanted_part.dtype
        and part.device == wanted_part.device
        and same_layout(part, wanted_part)
    ):
        return placed
    wanted_part.copy_(part)
    return wanted


def is_shared(tensor: Tensor) -> bool:
    """Whether state lies in memory that other processes may read: there it has to stay.

    Example:
        >>> is_shared(torch.zeros(())), is_shared(torch.zeros(()).share_memory_())
        (False, True)
    """
    # torch says so of everything that is on a GPU.
    return tensor.device.type == "cpu" and tensor.is_shared()


def named_tensors(
    param: Tensor, where: str, state: MutableMapping[Tensor, dict[str, Any]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield what a step writes: the parameter and its state, or this process's parts of them."""
    yield where, local_part(param)
    held = state.get(param) or {}
    for key in ("step", *(buffer.key for buffer in held_buffers(held))):
        if key in held:
            yield f"state[{key!r}] of {where}", local_part(held[key])
