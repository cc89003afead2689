"""Binding an optimizer for the steps that follow a checked one (``csrc/fast_path/fast_path.h``)."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.planned import PlannedBackend, bound_options, bound_rows
from ..build_info import load_extension
from ..core.bucket import BucketKey
from ..core.rows import CoupledRows
from ..core.stats import WatchRecords
from ..projections import Projection
from .options import GroupOptions
from .sharded import local_part, sharded_class
from .state import is_shared

__all__ = ["Binding", "bind", "bound_places"]


class Binding(NamedTuple):
    """How one parameter with state is stepped."""

    backend: PlannedBackend
    key: BucketKey
    bounds: tuple[float, float]
    rows: CoupledRows | None = None
    """Its set, if that couples elements."""


def bind(
    param_groups: list[dict[str, Any]],
    options: Sequence[GroupOptions],
    state: MutableMapping[Tensor, dict[str, Any]],
    bindings: dict[Tensor, Binding],
    records: WatchRecords | None,
) -> Any | None:
    """Return a ``SteadyState`` whose ``step(param_groups, state)`` repeats checked steps.

    The step counts are packed into one tensor, of which ``state[p]["step"]`` become views; those
    in shared memory stay where they are.

    Args:
        param_groups: the optimizer's.
        options: the checked options of each group.
        state: the optimizer's state.
        bindings: how each parameter that has state is stepped.
        records: where the steps' statistics are kept; None: they are not watched.

    Returns:
        None where a tensor is none that C++ can read by address, or a group is no plain dict.
    """
    if type(param_groups) is not list or not all(map(_is_comparable, param_groups)):
        return None
    extension = load_extension("_C")
    places = bound_places(bindings)
    backends = {binding.backend.name: binding.backend for binding in bindings.values()}
    steps: list[list[Tensor]] = [[] for _ in places]
    params: list[list[Tensor]] = [[] for _ in places]
    sets: list[list[Any]] = [[] for _ in places]
    rows: dict[Any, int] = {}
    bound = []
    members = []
    for g, group in enumerate(param_groups):
        for param in group["params"]:
            binding = bindings.get(param)
            if binding is None:
                members.append(None)
                continue
            plan = places.index((binding.backend.name, binding.key))
            # Options are a plan's own: each has a table of those that its device reads.
            if (g, plan, binding.bounds) not in rows:
                rows[g, plan, binding.bounds] = len(bound)
                device = binding.key.device if binding.key.device_scalars else None
                step_options = options[g].step_options(*binding.bounds)
                bound.append(bound_options(step_options, group=g, device=device))
            members.append(extension.Membership(plan, rows[g, plan, binding.bounds]))
            steps[plan].append(state[param]["step"])
            params[plan].append(param)
            if binding.rows is not None:
                sets[plan].append(bound_rows(binding.rows))
    sharded, is_readable = sharded_class(extension, bindings)
    if not bindings or not is_readable:
        return None
    packs = [_packed(counts) for counts in steps]
    steady = extension.SteadyState(
        param_groups,
        state,
        members,
        bound,
        [backends[name].new_plan(key) for name, key in places],
        packs,
        [key.device_scalars for _, key in places],
        sharded,
        sets,
    )
    for pack, stepped in zip(packs, params, strict=True):
        for param, step in zip(stepped, pack.unbind(), strict=True):
            if not is_shared(state[param]["step"]):
                state[param]["step"] = step
    kept: list[list[Tensor]] = [[] for _ in places]
    if records is not None:
        watched = [
            (stepped, [_real_numel(p) for p in stepped], backends[name], key)
            for (name, key), stepped in zip(places, params, strict=True)
        ]
        # Of a parameter that was cast, and not stepped since, what was seen stays to be read.
        if any(records.would_forget(*of_plan) for of_plan in watched):
            return None
        kept = [records.of_bucket(*of_plan) for of_plan in watched]
    return steady if steady.bind(state, kept) else None


def _real_numel(param: Tensor) -> int:
    return local_part(param).numel() * (2 if param.is_complex() else 1)


def _packed(counts: list[Tensor]) -> Tensor:
    """Return the counts as one tensor: the one that they are views of, or a new one.

    A CUDA graph goes on counting in the pack that was there when it was captured.
    """
    first = counts[0]
    storage = first.untyped_storage()
    are_one_pack = (
        not is_shared(first)
        and storage.nbytes() == len(counts) * first.element_size()
        and all(
            count.untyped_storage().data_ptr() == storage.data_ptr()
            and count.storage_offset() == i
            and count.dtype == torch.float32
            for i, count in enumerate(counts)
        )
    )
    return first.as_strided((len(counts),), (1,), 0) if are_one_pack else torch.stack(counts)


def bound_places(bindings: dict[Tensor, Binding]) -> list[tuple[str, BucketKey]]:
    """Return each plan's backend and key, in the order in which sums of squares are added."""
    return sorted({(b.backend.name, b.key) for b in bindings.values()}, key=repr)


def _is_comparable(group: Any) -> bool:
    """Whether an unchanged group, item by item the same objects, has unchanged options."""
    if type(group) is not dict or type(group["params"]) is not list:
        return False
    return all(isinstance(group[name], _IMMUTABLE) for name in _COMPARED)


# The others are numbers, which C++ reads anew where they can change.
_IMMUTABLE = (bool, str, type(None), Projection)
_COMPARED = (
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
