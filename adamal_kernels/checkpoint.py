"""Optimizer checkpoints: what torch's casts and overwrites, kept; what does not fit, refused."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .distributed import is_sharded, local_part, moment_like, placed_as
from .options import IMPLEMENTATION_OPTIONS
from .projections import Projection, projection_from_dict, projection_to_dict

__all__ = ["merge_groups", "merge_state", "saved_group"]


def saved_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a packed param group as ``torch.load(weights_only=True)`` can read it.

    Sets become dicts, and numpy's and other numbers floats.
    """
    saved = dict(group)
    for name in ("lr", "eps", "weight_decay"):
        saved[name] = _plain_number(saved[name])
    saved["betas"] = tuple(_plain_number(beta) for beta in saved["betas"])
    if isinstance(saved.get("projection"), Projection):
        saved["projection"] = projection_to_dict(saved["projection"])
    return saved


def merge_groups(
    running: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return the groups that continue ``saved`` on the parameters of ``running``.

    The saved options win, but for those that say how to compute
    (:data:`~adamal_kernels.options.IMPLEMENTATION_OPTIONS`) and those the checkpoint lacks, such
    as ``projection`` in one of ``torch.optim.Adam``.

    Raises:
        ValueError: the number of groups, or of parameters in one of them, differs.
    """
    if len(running) != len(saved):
        raise ValueError(
            f"load_state_dict: the checkpoint has {len(saved)} param groups, the optimizer "
            f"{len(running)}; build the optimizer with the groups it was saved with"
        )
    merged = []
    for index, (ours, theirs) in enumerate(zip(running, saved, strict=True)):
        if len(ours["params"]) != len(theirs["params"]):
            raise ValueError(
                f"load_state_dict: group {index} has {len(theirs['params'])} parameters in the "
                f"checkpoint and {len(ours['params'])} in the optimizer; build the optimizer with "
                "the groups it was saved with"
            )
        group = {**ours, **theirs, "params": ours["params"]}
        if "param_names" in ours:
            group["param_names"] = ours["param_names"]
        for name in IMPLEMENTATION_OPTIONS:
            group[name] = ours[name]
        if isinstance(group["projection"], Mapping):
            group["projection"] = projection_from_dict(group["projection"])
        if isinstance(group["betas"], list):
            group["betas"] = tuple(group["betas"])
        merged.append(group)
    return merged


def merge_state(
    params: Sequence[Tensor], ids: Sequence[Any], saved: Mapping[Any, Any]
) -> defaultdict[Tensor, Any]:
    """Return new state for ``params`` with the values saved under ``ids``.

    Every tensor keeps its type and is a copy, laid out as its parameter and on its device;
    ``step`` becomes a float32 scalar on the CPU, as torch.optim.Adam keeps it.

    Raises:
        ValueError: a tensor's shape is not its parameter's, a ``step`` is no number, or state is
            saved for a parameter the checkpoint's groups do not name.
    """
    by_id = dict(zip(ids, params, strict=True))
    state: defaultdict[Tensor, Any] = defaultdict(dict)
    for key, values in saved.items():
        if key not in by_id:
            if isinstance(key, int):
                raise ValueError(
                    f"load_state_dict: the checkpoint holds state for parameter {key}, which its "
                    f"param groups do not name (they name {len(by_id)} parameters)"
                )
            state[key] = values
            continue
        state[by_id[key]] = _merge_values(by_id[key], values, f"parameter {key}")
    return state


def _plain_number(value: Any) -> Any:
    return value if type(value) in (int, float) or isinstance(value, Tensor) else float(value)


def _merge_values(param: Tensor, values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ValueError(f"load_state_dict: state of {where} must be a dict, got {values!r}")
    if not values:
        return {}
    for name in ("step", "exp_avg", "exp_avg_sq"):
        if name not in values:
            raise ValueError(
                f"load_state_dict: state of {where} has no {name!r}; the checkpoint is of another "
                "kind of optimizer"
            )
    return {name: _merge_value(param, name, value, where) for name, value in values.items()}


def _merge_value(param: Tensor, name: str, value: Any, where: str) -> Any:
    if name == "step":
        is_number = isinstance(value, (int, float)) or (
            isinstance(value, Tensor) and value.numel() == 1
        )
        if not is_number or not 0 <= float(value) < math.inf:
            raise ValueError(
                f"load_state_dict: step of {where} must be a number, finite and >= 0, got {value!r}"
            )
        return torch.tensor(float(value), dtype=torch.float32, device="cpu")
    if name not in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        return value.clone() if isinstance(value, Tensor) else value
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        got = value.dtype if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"load_state_dict: {name} of {where} must be a floating-point tensor, got {got}"
        )
    if value.shape != param.shape:
        raise ValueError(
            f"load_state_dict: {name} of {where} has shape {tuple(value.shape)} in the "
            f"checkpoint, the parameter {tuple(param.shape)}; the checkpoint is of another model, "
            "or its parameters are in another order"
        )
    if is_sharded(param) or is_sharded(value):
        value = placed_as(param, value, f"load_state_dict: {name} of {where}")
    moment = moment_like(param, value.dtype)
    local_part(moment).copy_(local_part(value))
    return moment
