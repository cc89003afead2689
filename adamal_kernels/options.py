"""The options of a parameter group: their names, defaults and checks."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from .backends import check_request
from .bucket import SecondMoment
from .hyperparameters import StepScalars, derive_step_scalars
from .projections import Projection, is_known_set

__all__ = ["IMPLEMENTATION_OPTIONS", "GroupOptions", "check_options", "read_options"]

IMPLEMENTATION_OPTIONS = ("backend", "fused", "foreach", "capturable", "differentiable")
"""Options that choose how a step is computed, not what: a checkpoint does not overwrite them."""

_NAMES = (
    "lr",
    "betas",
    "eps",
    "weight_decay",
    "amsgrad",
    "maximize",
    "decoupled_weight_decay",
    "bias_correction",
    "projection",
    *IMPLEMENTATION_OPTIONS,
)


class GroupOptions(NamedTuple):
    """A group's options as one step uses them, checked."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled_weight_decay: bool
    maximize: bool
    bias_correction: bool
    projection: Projection | None
    second_moment: SecondMoment
    backend: str
    fused: bool | None
    foreach: bool | None

    def scalars(self, step: int, lower: float, upper: float) -> StepScalars:
        """Return the scalar row of step number ``step``; a step with lr = 0 does not project."""
        if self.lr == 0:
            lower, upper = -math.inf, math.inf
        return derive_step_scalars(
            step=step,
            lr=self.lr,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            decoupled_weight_decay=self.decoupled_weight_decay,
            maximize=self.maximize,
            bias_correction=self.bias_correction,
            lower=lower,
            upper=upper,
        )


def check_options(options: dict[str, Any], *, optimizer: str, monotone: bool) -> None:
    """Check a group's options (or the defaults).

    Args:
        options: what :class:`torch.optim.Optimizer` calls a param group.
        optimizer: the class's name, for messages.
        monotone: whether the second moment is AdamAL's.

    Raises:
        TypeError: an option is of another type than documented.
        ValueError: an option is out of its range, or options contradict each other.
        NotImplementedError: an option that is part of the surface is not built yet.
    """
    if missing := [name for name in _NAMES if name not in options]:
        raise ValueError(
            f"a param group of {optimizer} has no {missing[0]!r}; set it, or add the group with "
            "add_param_group, which sets the defaults"
        )
    _check_number(options["lr"], "lr", "lr >= 0", lambda lr: lr >= 0)
    betas = options["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas must be a pair of numbers, got {betas!r}")
    for index, beta in enumerate(betas):
        _check_number(beta, f"betas[{index}]", "0 <= beta < 1", lambda beta: 0 <= beta < 1)
    _check_number(options["eps"], "eps", "eps >= 0", lambda eps: eps >= 0)
    _check_number(
        options["weight_decay"], "weight_decay", "weight_decay >= 0", lambda decay: decay >= 0
    )
    for name in (
        "amsgrad",
        "maximize",
        "capturable",
        "differentiable",
        "decoupled_weight_decay",
        "bias_correction",
    ):
        if not isinstance(options[name], bool):
            raise TypeError(f"{name} must be True or False, got {options[name]!r}")
    for name in ("capturable", "differentiable"):
        if options[name]:
            raise NotImplementedError(f"{name}=True is not implemented yet; leave it False")
    if monotone and options["amsgrad"]:
        raise ValueError(
            f"amsgrad=True: {optimizer} has no use for it, its second moment already never "
            "decreases, without a third buffer; leave it False, or use adamal_kernels.Adam"
            "(amsgrad=True) for torch's AMSGrad"
        )
    projection = options["projection"]
    if projection is not None and not is_known_set(projection):
        raise TypeError(
            f"projection must be a set such as Box(-1, 1) or NonNegative(), or None, "
            f"got {projection!r}"
        )
    check_request(options["backend"], fused=options["fused"], foreach=options["foreach"])


def read_options(group: dict[str, Any], *, optimizer: str, monotone: bool) -> GroupOptions:
    """Check ``group`` and return its options; raises as :func:`check_options` does."""
    check_options(group, optimizer=optimizer, monotone=monotone)
    if monotone:
        second_moment = SecondMoment.MONOTONE
    else:
        second_moment = SecondMoment.AMSGRAD if group["amsgrad"] else SecondMoment.PLAIN
    beta1, beta2 = group["betas"]
    return GroupOptions(
        lr=float(group["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        decoupled_weight_decay=group["decoupled_weight_decay"],
        maximize=group["maximize"],
        bias_correction=group["bias_correction"],
        projection=group["projection"],
        second_moment=second_moment,
        backend=group["backend"],
        fused=group["fused"],
        foreach=group["foreach"],
    )


def _check_number(value: Any, name: str, allowed: str, in_range: Any) -> None:
    if isinstance(value, Tensor):
        raise NotImplementedError(
            f"{name} as a Tensor is not implemented yet; pass a number, such as {name}.item()"
        )
    # numpy's scalars and fractions are numbers too, so ask for the conversion, not the class.
    try:
        number = None if isinstance(value, (bool, str, bytes, bytearray)) else float(value)
    except (TypeError, ValueError):
        number = None
    except OverflowError:
        number = math.inf
    if number is None:
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    if not math.isfinite(number) or not in_range(number):
        raise ValueError(f"{name}={value!r} is out of range; it must be finite and {allowed}")
