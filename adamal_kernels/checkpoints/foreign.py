"""Checkpoints of other packages' Adams, recognised by their layout and rewritten as torch's.

Read here, as their own code writes them: apex FusedAdam, Transformer Engine FusedAdam, DeepSpeed
FusedAdam, optimi Adam and AdamW, bitsandbytes Adam and AdamW with 32-bit states. None of them but
optimi records whether its weight decay was decoupled; all of them but optimi's ``Adam`` decouple
it by default, so that :class:`~adamal_kernels.AdamALW` is what continues them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.scalars import beta_power
from ..user_warning import warn_user
from .merge import read_step

__all__ = ["as_torch_adam"]

Group = dict[str, Any]
Values = dict[str, Any]


class _Layout(NamedTuple):
    """How one kind of optimizer lays out its checkpoints."""

    name: str
    recognises: Callable[[Sequence[Mapping[str, Any]], Mapping[Any, Any]], bool]
    rewrite_group: Callable[[Group, Sequence[Values], str], Group]
    """A group, its parameters' states and what to call it; comes first."""
    rewrite_values: Callable[[Values, Mapping[str, Any], str], Values]
    """A parameter's state, its rewritten group and what to call it."""
    dropped: Mapping[str, str]
    """Keys of a state that have no place here, and what is lost with them."""


def as_torch_adam(
    groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]
) -> tuple[Sequence[Mapping[str, Any]], Mapping[Any, Any]]:
    """Return ``param_groups`` and ``state`` of a checkpoint in the layout of torch.optim.Adam.

    One that is in none of the layouts known here is returned as it is. Nothing is changed in
    place, and tensors that need no conversion are not copied.

    Raises:
        ValueError: the layout is known, but the checkpoint holds what cannot be read, such as
            8-bit states; the message names the key.

    Example:
        >>> apex = {"params": [0], "lr": 0.1, "betas": (0.9, 0.99), "bias_correction": True}
        >>> groups, state = as_torch_adam([{**apex, "step": 7}], {0: {"exp_avg": torch.ones(2)}})
        >>> "step" in groups[0], state[0]["step"]
        (False, 7)
    """
    layout = next((known for known in _LAYOUTS if known.recognises(groups, state)), None)
    if layout is None:
        return groups, state
    lost: Counter[str] = Counter()
    new_groups, new_state = [], dict(state)
    for index, group in enumerate(groups):
        ids = [i for i in group.get("params", ()) if isinstance(state.get(i), Mapping)]
        held = [dict(state[i]) for i in ids]
        new_group = layout.rewrite_group(dict(group), held, f"group {index}")
        for i, values in zip(ids, held, strict=True):
            lost.update(key for key in layout.dropped if _has_value(values.pop(key, None)))
            if values:
                values = layout.rewrite_values(values, new_group, f"parameter {i}")
            new_state[i] = values
        new_group.pop("step", None)
        new_groups.append(new_group)
    for key, count in lost.items():
        warn_user(
            f"load_state_dict: {key!r} of {count} parameters in the {layout.name} checkpoint has "
            f"no place here and is left out: {layout.dropped[key]}"
        )
    return new_groups, new_state


def _has_value(dropped: Any) -> bool:
    """Whether a dropped entry said anything: optimi writes None or one byte where it has none."""
    return dropped is not None and not (
        isinstance(dropped, Tensor) and dropped.dtype == torch.uint8
    )


def _check_keys(values: Values, known: Sequence[str], where: str, layout: str) -> None:
    for key in values:
        if key not in known:
            raise ValueError(
                f"load_state_dict: state of {where} has {key!r}, which {layout} does not write; "
                "the checkpoint is of another kind of optimizer"
            )


# apex, Transformer Engine and DeepSpeed: FusedAdam.

_FUSED_ADAM = "FusedAdam"


def _is_fused_adam(groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]) -> bool:
    """Whether a step is counted in the groups, by an Adam that knows of no amsgrad."""
    return any("step" in group for group in groups) and all(
        "bias_correction" in group and "amsgrad" not in group for group in groups
    )


def _fused_adam_group(group: Group, held: Sequence[Values], where: str) -> Group:
    """Find the group's count, which is what the bias correction of all its parameters used.

    apex and Transformer Engine have it in the group. DeepSpeed writes one into every state and
    advances that of the group's last parameter alone, while the group's own stays 0.
    """
    group["bias_correction"] = _flag(group["bias_correction"])
    counts = [values["step"] for values in held if "step" in values]
    counts += [group["step"]] if "step" in group else []
    if counts:
        group["step"] = max(counts, key=lambda count: read_step(count, where))
    return group


def _fused_adam_values(values: Values, group: Mapping[str, Any], where: str) -> Values:
    _check_keys(values, ("step", "exp_avg", "exp_avg_sq"), where, _FUSED_ADAM)
    return {**values, "step": group["step"]} if "step" in group else values


# optimi.

_OPTIMI = "optimi"


def _is_optimi(groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]) -> bool:
    return bool(groups) and all("beta1" in group and "beta2" in group for group in groups)


def _optimi_group(group: Group, held: Sequence[Values], where: str) -> Group:
    """Rename what has a name in torch; decay decoupled from lr, too, is a decoupled decay.

    ``1 - lr / max_lr * weight_decay`` equals ``1 - lr * (weight_decay / max_lr)``.
    """
    group["betas"] = (group.pop("beta1"), group.pop("beta2"))
    if group.pop("decouple_lr", False):
        group["weight_decay"] /= group["max_lr"]
        group["decouple_wd"] = True
    group["decoupled_weight_decay"] = _flag(group.pop("decouple_wd", False))
    for name in ("max_lr", "kahan_sum", "foreach", "triton", "gradient_release", "setup"):
        group.pop(name, None)
    for values in held:
        # With gradient release a state refers to its group, and counts its own steps.
        values.pop("group", None)
    return group


def _optimi_values(values: Values, group: Mapping[str, Any], where: str) -> Values:
    """Undo the bias correction: optimi averages with corrected betas, so its moments have it."""
    _check_keys(values, ("step", "exp_avg", "exp_avg_sq"), where, _OPTIMI)
    step = values.get("step", group.get("step"))
    if step is None:
        return values
    count = int(read_step(step, where))
    rewritten = {**values, "step": step}
    for name, beta in zip(("exp_avg", "exp_avg_sq"), group["betas"], strict=True):
        moment = values.get(name)
        if isinstance(moment, Tensor) and moment.is_floating_point():
            dtype = torch.promote_types(moment.dtype, torch.float32)
            corrected = moment.double() * (1.0 - beta_power(float(beta), count))
            rewritten[name] = corrected.to(dtype)
    return rewritten


# bitsandbytes.

_BITSANDBYTES = "bitsandbytes"
_WRAPPED = "__bnb_optimizer_quant_state__"  # where it keeps tensors that FSDP is not to gather
_EIGHT_BIT = ("qmap1", "qmap2", "absmax1", "absmax2", "max1", "max2", "new_max1", "new_max2")


def _is_bitsandbytes(groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]) -> bool:
    return any(
        isinstance(values, Mapping) and ("state1" in values or _WRAPPED in values)
        for values in state.values()
    )


def _bitsandbytes_group(group: Group, held: Sequence[Values], where: str) -> Group:
    if group.get("alpha"):
        raise ValueError(
            f"load_state_dict: {where} of the bitsandbytes checkpoint has "
            f"'alpha'={group['alpha']!r}, as AdEMAMix has; its moments are not Adam's"
        )
    for name in ("alpha", "t_alpha", "t_beta3"):
        group.pop(name, None)
    for values in held:
        values.update(values.pop(_WRAPPED, {}))
    return group


def _bitsandbytes_values(values: Values, group: Mapping[str, Any], where: str) -> Values:
    for key in ("state1", *_EIGHT_BIT):
        value = values.get(key)
        if isinstance(value, Tensor) and (key != "state1" or value.dtype == torch.uint8):
            raise ValueError(
                f"load_state_dict: state of {where} has {key!r} of an 8-bit state ({value.dtype}); "
                "only 32-bit states of bitsandbytes can be read: save with optim_bits=32"
            )
    if "state2" not in values:
        raise ValueError(
            f"load_state_dict: state of {where} has 'state1' and no 'state2'; the bitsandbytes "
            "checkpoint is of an optimizer with one moment, not of Adam"
        )
    _check_keys(values, ("step", "state1", "state2"), where, "bitsandbytes' Adam")
    names = {"state1": "exp_avg", "state2": "exp_avg_sq"}
    return {names.get(key, key): value for key, value in values.items()}


def _flag(value: Any) -> Any:
    """Return 0 and 1 as the truth values they stand for; anything else as it is."""
    return bool(value) if value in (0, 1) else value


_LAYOUTS = (
    _Layout(
        _FUSED_ADAM,
        _is_fused_adam,
        _fused_adam_group,
        _fused_adam_values,
        {"master_param": "parameters are stepped in their own type, from their own value"},
    ),
    _Layout(
        _OPTIMI,
        _is_optimi,
        _optimi_group,
        _optimi_values,
        {"kahan_comp": "parameters are stepped without Kahan summation"},
    ),
    _Layout(
        _BITSANDBYTES,
        _is_bitsandbytes,
        _bitsandbytes_group,
        _bitsandbytes_values,
        {"gnorm_vec": "gradients are not clipped by percentiles of their norms"},
    ),
)
