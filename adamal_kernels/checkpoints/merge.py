"""Optimizer checkpoints: what torch's casts and overwrites, kept; what does not fit, refused."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.buffers import BUFFERS, REQUIRED_KEYS, check_value
from ..projections import Projection, projection_from_dict, projection_to_dict
from ..step.entry import is_frozen
from ..step.options import IMPLEMENTATION_OPTIONS, pair_of_betas
from ..step.sharded import is_sharded, local_part, moment_like, placed_as

__all__ = ["feed_back_maxima", "merge_groups", "merge_state", "packed", "read_step"]


def packed(groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]) -> dict[str, Any]:
    """Return what :meth:`torch.optim.Optimizer.state_dict` does, parameters numbered as there.

    ``torch.load(weights_only=True)`` can read it: sets become dicts, and numpy's and other numbers
    floats.
    """
    numbers: dict[int, int] = {}
    saved_groups = []
    first = 0
    for group in groups:
        params = group["params"]
        numbers.update(
            {id(p): number for number, p in enumerate(params, first) if id(p) not in numbers}
        )
        first += len(params)
        saved_groups.append({**_saved_options(group), "params": [numbers[id(p)] for p in params]})
    saved_state = {
        numbers[id(key)] if isinstance(key, Tensor) else key: values
        for key, values in state.items()
    }
    return {"state": saved_state, "param_groups": saved_groups}


def _saved_options(group: Mapping[str, Any]) -> dict[str, Any]:
    saved = {name: value for name, value in group.items() if name != "params"}
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
    (:data:`~adamal_kernels.step.options.IMPLEMENTATION_OPTIONS`) and those the checkpoint lacks,
    such as ``projection`` in one of ``torch.optim.Adam``. ``lr`` and ``betas`` take the saved
    values in the running form: a number stays a number, a Tensor becomes one of its own type and
    device.

    Raises:
        ValueError: the number of groups, or of parameters in one of them, differs, or a Tensor
            saved for a number has not one element.
        TypeError: betas are no pair.
    """
    for index, group in enumerate(saved):
        if "params" not in group:
            raise ValueError(f"load_state_dict: group {index} of the checkpoint has no 'params'")
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
        for name in ("lr", "initial_lr"):
            if name in group:
                group[name] = _in_form_of(ours["lr"], group[name], f"{name} of group {index}")
        pairs = zip(pair_of_betas(ours["betas"]), pair_of_betas(group["betas"]), strict=True)
        group["betas"] = tuple(_in_form_of(*pair, f"betas of group {index}") for pair in pairs)
        if "param_names" in ours:
            group["param_names"] = ours["param_names"]
        for name in IMPLEMENTATION_OPTIONS:
            group[name] = ours[name]
        if isinstance(group["projection"], Mapping):
            group["projection"] = projection_from_dict(group["projection"])
        merged.append(group)
    return merged


def merge_state(
    groups: Sequence[Mapping[str, Any]],
    saved_groups: Sequence[Mapping[str, Any]],
    saved: Mapping[Any, Any],
) -> defaultdict[Tensor, Any]:
    """Return new state for the parameters of ``groups`` with the values saved under their ids.

    Every tensor keeps its type and is a copy, laid out as its parameter and on its device;
    ``step`` becomes a float32 scalar on the CPU, as torch.optim.Adam keeps it.

    Raises:
        ValueError: a tensor's shape is not its parameter's, a ``step`` is no number, or state is
            saved for a parameter the checkpoint's groups do not name.
    """
    by_id: dict[Any, Tensor] = {}
    names: dict[Any, str] = {}
    for ours, theirs in zip(groups, saved_groups, strict=True):
        by_id.update(zip(theirs["params"], ours["params"], strict=True))
        names.update(zip(theirs["params"], ours.get("param_names", ()), strict=False))
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
        where = f"parameter {key} ({names[key]})" if key in names else f"parameter {key}"
        state[by_id[key]] = _merge_values(by_id[key], values, where)
    return state


def feed_back_maxima(groups: Sequence[dict[str, Any]], state: Mapping[Tensor, Any]) -> None:
    """Make AdamAL's of merged groups and state of AMSGrad: ``v`` goes on from its maximum.

    AdamAL is AMSGrad with the maximum fed back into the average. A maximum in a group whose
    ``amsgrad`` is off is left out, as torch leaves it unused.
    """
    for group in groups:
        for param in group["params"]:
            values = state.get(param, {})
            maximum = values.pop("max_exp_avg_sq", None)
            if group["amsgrad"] is True and maximum is not None:
                values["exp_avg_sq"] = maximum
        if group["amsgrad"] is True:
            group["amsgrad"] = False


def read_step(value: Any, where: str) -> float:
    """Return the step count of ``where``, saved as a number or as a tensor of one element.

    Raises:
        ValueError: it is something else, negative or not finite.

    Example:
        >>> read_step(torch.tensor([7]), "parameter 0")
        7.0
    """
    is_number = isinstance(value, (int, float)) or _holds_one_number(value)
    if not is_number or not 0 <= float(value) < math.inf:
        raise ValueError(
            f"load_state_dict: step of {where} must be a number, finite and >= 0, got {value!r}"
        )
    return float(value)


def _holds_one_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta


def _in_form_of(running: Any, saved: Any, where: str) -> Any:
    """Return the saved number as a number, or as a new Tensor like the running one."""
    if isinstance(saved, Tensor):
        if not _holds_one_number(saved):
            raise ValueError(f"load_state_dict: {where} must be one number, got {saved!r}")
        saved = saved.item()
    if isinstance(running, Tensor) and isinstance(saved, (int, float)):
        return torch.full_like(running, saved)
    return saved


def _plain_number(value: Any) -> Any:
    return value if type(value) in (int, float) or isinstance(value, Tensor) else float(value)


def _merge_values(param: Tensor, values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ValueError(f"load_state_dict: state of {where} must be a dict, got {values!r}")
    if not values:
        return {}
    for name in REQUIRED_KEYS:
        if name not in values:
            raise ValueError(
                f"load_state_dict: state of {where} has no {name!r} (it has "
                f"{', '.join(map(repr, values))}); the checkpoint is of another kind of optimizer"
            )
    return {name: _merge_value(param, name, value, where) for name, value in values.items()}


def _merge_value(param: Tensor, name: str, value: Any, where: str) -> Any:
    if name == "step":
        return torch.tensor(read_step(value, where), dtype=torch.float32, device="cpu")
    buffer = next((buffer for buffer in BUFFERS if buffer.key == name), None)
    if buffer is None:
        return value.clone() if isinstance(value, Tensor) else value
    what = f"load_state_dict: {name} of {where}"
    remedy = "the checkpoint is of another model, or its parameters are in another order"
    if buffer.shape == "rows":
        remedy = "delete it from the checkpoint to start anew"
    check_value(buffer, value, param, what, remedy)
    if buffer.shape == "rows" or (param.is_meta and is_frozen(param)):
        return value.clone()  # Moved with the parameter, once that is stepped.
    if param.is_meta:
        raise ValueError(
            f"load_state_dict: {where} is on meta in the optimizer; give the model memory first "
            "(to_empty), and the optimizer its parameters"
        )
    if is_sharded(param) or is_sharded(value):
        value = placed_as(param, value, what)
    moment = moment_like(param, value.dtype)
    local_part(moment).copy_(local_part(value))
    return moment
