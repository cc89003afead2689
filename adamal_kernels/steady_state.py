"""Binding an optimizer for the steps that follow a checked one (``csrc/steady_state.h``)."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .backends.native import NativeBackend
from .bucket import BucketKey
from .distributed import sharded_class
from .options import GroupOptions
from .projections import Projection

__all__ = ["Binding", "bind"]

_IMMUTABLE = (float, int, bool, str, type(None), np.generic, Projection)


class Binding(NamedTuple):
    """How one parameter with state is stepped."""

    backend: NativeBackend
    key: BucketKey
    bounds: tuple[float, float]


def bind(
    param_groups: list[dict[str, Any]],
    options: Sequence[GroupOptions],
    state: MutableMapping[Tensor, dict[str, Any]],
    bindings: dict[Tensor, Binding],
) -> Any | None:
    """Return a ``SteadyState`` whose ``step(param_groups, state)`` repeats checked steps.

    The step counts are packed into one tensor, of which ``state[p]["step"]`` become views.

    Args:
        param_groups: the optimizer's.
        options: the checked options of each group.
        state: the optimizer's state.
        bindings: how each parameter that has state is stepped.

    Returns:
        None where an option could change without its object changing, such as a list of betas, or
        where a tensor is none that C++ can read by address.
    """
    if type(param_groups) is not list or not all(map(_is_comparable, param_groups)):
        return None
    extension = import_module("adamal_kernels._C")
    plans: dict[BucketKey, int] = {}
    plan_objects = []
    rows: dict[tuple[int, tuple[float, float]], int] = {}
    bound_options = []
    members = []
    bound_params = []
    for g, group in enumerate(param_groups):
        for param in group["params"]:
            binding = bindings.get(param)
            if binding is None:
                members.append(None)
                continue
            if binding.key not in plans:
                plans[binding.key] = len(plan_objects)
                plan_objects.append(binding.backend.new_plan(binding.key))
            if (g, binding.bounds) not in rows:
                rows[g, binding.bounds] = len(bound_options)
                bound_options.append(_bound_options(extension, g, options[g], binding.bounds))
            members.append(extension.Membership(plans[binding.key], rows[g, binding.bounds]))
            bound_params.append(param)
    sharded, is_readable = sharded_class(extension, bound_params)
    if not bound_params or not is_readable:
        return None
    steps = torch.stack([state[param]["step"] for param in bound_params])
    steady = extension.SteadyState(
        param_groups, state, members, bound_options, plan_objects, steps, sharded
    )
    for param, step in zip(bound_params, steps.unbind(), strict=True):
        state[param]["step"] = step
    return steady if steady.bind(state) else None


def _is_comparable(group: Any) -> bool:
    """Whether an unchanged group, item by item the same objects, has unchanged options."""
    if type(group) is not dict or type(group["params"]) is not list:
        return False
    betas = group["betas"]
    return isinstance(betas, tuple) and all(
        isinstance(value, _IMMUTABLE) for value in (*betas, *(group[name] for name in _COMPARED))
    )


_COMPARED = (
    "lr",
    "eps",
    "weight_decay",
    "amsgrad",
    "maximize",
    "foreach",
    "capturable",
    "differentiable",
    "fused",
    "decoupled_weight_decay",
    "bias_correction",
    "projection",
    "backend",
)


def _bound_options(
    extension: Any, group: int, options: GroupOptions, bounds: tuple[float, float]
) -> Any:
    return extension.BoundOptions(
        group=group,
        lr=options.lr,
        beta1=options.beta1,
        beta2=options.beta2,
        eps=options.eps,
        weight_decay=options.weight_decay,
        lower=bounds[0],
        upper=bounds[1],
        decoupled_weight_decay=options.decoupled_weight_decay,
        maximize=options.maximize,
        bias_correction=options.bias_correction,
    )
