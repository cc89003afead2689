"""A parameter on its way to a step: its gradient, its options, its bucket and its backend."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import Backend, pick
from ..core.bucket import BucketKey
from ..core.scalars import StepInputs
from ..core.storage import Format, real_dtype
from ..projections import CoupledSet
from .options import GroupOptions
from .sharded import local_part, mesh_and_placements, splits_rows

__all__ = [
    "Entry",
    "bounds_of",
    "coupled_set",
    "is_frozen",
    "key_of",
    "key_without_grad",
    "pick_backend",
]


class Entry(NamedTuple):
    """A parameter with a gradient, checked and not yet touched."""

    owner: Tensor
    """Whose state is stepped."""
    param: Tensor
    """What is stepped: this process's part of a DTensor, else the parameter itself."""
    grad: Tensor
    """Its gradient, or the part of it that this process has."""
    is_misplaced: bool
    """Whether the gradient has to be redistributed before it is this part's."""
    options: GroupOptions
    bounds: tuple[float, float]
    key: BucketKey
    backend: Backend
    where: str

    @property
    def coupled(self) -> CoupledSet | None:
        """The set, if it couples elements."""
        return coupled_set(self.options)


def coupled_set(options: GroupOptions) -> CoupledSet | None:
    """Return a group's set if it couples elements."""
    return options.projection if isinstance(options.projection, CoupledSet) else None


def is_frozen(param: Tensor) -> bool:
    """Whether nothing steps ``param``, and so nothing is asked of it: no gradient, nor one to come.

    Example:
        >>> is_frozen(torch.zeros(2, dtype=torch.int8))
        True
    """
    return not param.requires_grad and param.grad is None


def key_without_grad(
    param: Tensor,
    options: GroupOptions,
    held: Mapping[str, Any] | None = None,
    inputs: StepInputs | None = None,
) -> BucketKey:
    """Return the key of a parameter whose gradient is not there to be asked for its type."""
    # torch tells it of leaves only; others are stepped with differentiable=True.
    grad_dtype = (param.is_leaf and param.grad_dtype) or param.dtype
    return key_of(param, grad_dtype, options, held, inputs or StepInputs())


def key_of(
    param: Tensor,
    grad_dtype: torch.dtype,
    options: GroupOptions,
    held: Mapping[str, Any] | None,
    inputs: StepInputs,
) -> BucketKey:
    """Return the key of a parameter with a gradient of ``grad_dtype`` and the state ``held``."""
    part = local_part(param)
    return BucketKey(
        part.device,
        Format(real_dtype(param.dtype), real_dtype(grad_dtype)),
        options.second_moment,
        device_scalars=_derives_on_device(part, options, held, inputs),
        spread=mesh_and_placements(param),
        coupled=_is_coupled_here(param, options),
    )


def _is_coupled_here(param: Tensor, options: GroupOptions) -> bool:
    """Whether the set couples elements, and no row of it is spread over processes."""
    coupled = coupled_set(options)
    return coupled is not None and not splits_rows(param, coupled.reduced_dims(param.dim()))


def _derives_on_device(
    param: Tensor, options: GroupOptions, held: Mapping[str, Any] | None, inputs: StepInputs
) -> bool:
    """Whether the step's scalars are the device's to derive: where the host would have to wait."""
    if options.capturable or options.differentiable:
        return True
    if param.device.type == "cpu":
        return False
    step = (held or {}).get("step")
    return (
        inputs.grad_scale is not None
        or inputs.may_skip
        or options.has_tensor_on(param.device)
        # Once there, the count stays: to read it would be to wait for it.
        or (isinstance(step, Tensor) and step.device == param.device)
    )


def pick_backend(key: BucketKey, options: GroupOptions) -> Backend:
    """Return the backend for buckets of kind ``key`` under a group's options."""
    return pick(
        key,
        backend=options.backend,
        fused=options.fused,
        foreach=options.foreach,
        differentiable=options.differentiable,
    )


def bounds_of(options: GroupOptions, dtype: torch.dtype) -> tuple[float, float]:
    """Return the box that elements of ``dtype`` are clamped to: all numbers if there is no set."""
    if options.projection is None:
        return -math.inf, math.inf
    return options.projection.bounds(dtype)
