"""The options of a parameter group: their names, defaults and checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..backends import check_request
from ..core.buffers import SecondMoment
from ..core.scalars import StepOptions
from ..projections import CoupledSet, Projection, is_known_set

__all__ = [
    "IMPLEMENTATION_OPTIONS",
    "GroupOptions",
    "check_betas_of_one_kind",
    "check_capturable",
    "check_max_grad_norm",
    "check_options",
    "pair_of_betas",
    "read_options",
]

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

    lr: float | Tensor
    beta1: float | Tensor
    beta2: float | Tensor
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
    capturable: bool
    differentiable: bool

    def step_options(self, lower: float, upper: float) -> StepOptions:
        """Return what the scalars of a step are derived from, for a set's bounds."""
        return StepOptions(
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

    def has_tensor_on(self, device: torch.device) -> bool:
        """Whether the learning rate or a beta is a tensor on ``device``."""
        values = (self.lr, self.beta1, self.beta2)
        return any(isinstance(value, Tensor) and value.device == device for value in values)


def check_options(options: dict[str, Any], *, optimizer: str, monotone: bool) -> None:
    """Check a group's options (or the defaults).

    Args:
        options: what :class:`torch.optim.Optimizer` calls a param group.
        optimizer: the class's name, for messages.
        monotone: whether the second moment is AdamAL's.

    Raises:
        TypeError: an option is of another type than documented.
        ValueError: an option is out of its range, or options contradict each other.
    """
    if missing := [name for name in _NAMES if name not in options]:
        raise ValueError(
            f"a param group of {optimizer} has no {missing[0]!r}; set it, or add the group with "
            "add_param_group, which sets the defaults"
        )
    for name in ("max_grad_norm", "grad_norm_group"):
        if name in options:
            raise ValueError(
                f"{name}={options[name]!r} in a param group: the norm is that of all groups "
                f"together; pass it to the constructor, or set optimizer.{name} (zero.optim.{name} "
                "of a ZeroRedundancyOptimizer, which would make group options of its arguments)"
            )
    eager_foreach = options["foreach"] and not options["capturable"]
    _check_scalar(options["lr"], "lr", "learning rate", eager_foreach, *_NONNEGATIVE)
    for index, beta in enumerate(pair_of_betas(options["betas"])):
        named = (f"betas[{index}]", f"beta parameter at index {index}")
        _check_scalar(beta, *named, eager_foreach, "0 <= beta < 1", lambda beta: 0 <= beta < 1)
    _check_number(options["eps"], "eps", "epsilon value", *_NONNEGATIVE)
    _check_number(options["weight_decay"], "weight_decay", "weight_decay value", *_NONNEGATIVE)
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
    if monotone and options["amsgrad"]:
        raise ValueError(
            f"amsgrad=True: {optimizer} has no use for it, its second moment already never "
            "decreases, without a third buffer; leave it False, or use adamal_kernels.Adam"
            "(amsgrad=True) for torch's AMSGrad"
        )
    projection = options["projection"]
    if projection is not None and not is_known_set(projection):
        raise TypeError(
            "projection must be a set such as Box(-1, 1), L2Ball(1.0) or Simplex(), or None, "
            f"got {projection!r}"
        )
    if isinstance(projection, CoupledSet) and options["differentiable"]:
        raise ValueError(
            f"differentiable=True with projection={projection}: the search for its multiplier "
            "cannot be differentiated; use a Box or NonNegative, or differentiable=False"
        )
    check_request(
        options["backend"],
        fused=options["fused"],
        foreach=options["foreach"],
        differentiable=options["differentiable"],
    )


def read_options(group: dict[str, Any], *, optimizer: str, monotone: bool) -> GroupOptions:
    """Check ``group`` and return its options; raises as :func:`check_options` does."""
    check_options(group, optimizer=optimizer, monotone=monotone)
    if monotone:
        second_moment = SecondMoment.MONOTONE
    else:
        second_moment = SecondMoment.AMSGRAD if group["amsgrad"] else SecondMoment.PLAIN
    beta1, beta2 = pair_of_betas(group["betas"])
    return GroupOptions(
        lr=_scalar(group["lr"]),
        beta1=_scalar(beta1),
        beta2=_scalar(beta2),
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
        capturable=group["capturable"],
        differentiable=group["differentiable"],
    )


def pair_of_betas(betas: Any) -> tuple[Any, Any]:
    """Return the items of a sequence of two: a tuple, a list, a config's, a vector's.

    Raises:
        TypeError: it is none.

    Example:
        >>> pair_of_betas([0.9, 0.95])
        (0.9, 0.95)
    """
    if isinstance(betas, (np.ndarray, Tensor)):
        is_sequence = betas.ndim == 1
    else:
        is_sequence = isinstance(betas, Sequence) and not isinstance(betas, (str, bytes))
    if not is_sequence or len(betas) != 2:
        raise TypeError(f"betas must be a pair of numbers, got {betas!r}")
    return betas[0], betas[1]


def check_betas_of_one_kind(betas: tuple[Any, Any]) -> None:
    """Check what torch's constructors ask for, and its schedulers do not keep to.

    Raises:
        ValueError: one beta is a Tensor and the other is not.
    """
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError(
            f"betas must be either both floats or both Tensors, got {betas!r}; convert one of them"
        )


def check_max_grad_norm(value: Any) -> float:
    """Return ``max_grad_norm`` as a float.

    Raises:
        TypeError: it is not a number.
        ValueError: it is not positive and finite.
    """
    _check_number(
        value, "max_grad_norm", "max_grad_norm value", "{name} > 0", lambda number: number > 0
    )
    return float(value)


def check_capturable(groups: Iterable[dict[str, Any]], optimizer: str) -> bool:
    """Check that a step can be captured, where a CUDA graph is being captured.

    Returns:
        Whether one is.

    Raises:
        RuntimeError: a group is not capturable, or reads a tensor of the host, whose value of today
            every replay would take.
    """
    if not torch.cuda.is_initialized() or not torch.cuda.is_current_stream_capturing():
        return False
    for index, group in enumerate(groups):
        if not group["capturable"]:
            raise RuntimeError(
                f"{optimizer}.step() is being captured in a CUDA graph, and group {index} has "
                "capturable=False; set capturable=True, or step outside the graph"
            )
        on_gpu = any(param.is_cuda for param in group["params"])
        for name in ("lr", "betas") if on_gpu else ():
            values = group[name] if name == "betas" else (group[name],)
            if any(isinstance(value, Tensor) and value.device.type == "cpu" for value in values):
                raise RuntimeError(
                    f"{optimizer}.step() is being captured in a CUDA graph, and {name} of group "
                    f"{index} holds a Tensor on the CPU, which a replay does not read; move it to "
                    "the parameters' device, or pass a number"
                )
    return True


_NONNEGATIVE = ("{name} >= 0", lambda number: number >= 0)


def _scalar(value: Any) -> float | Tensor:
    return value if isinstance(value, Tensor) else float(value)


def _check_scalar(
    value: Any,
    name: str,
    title: str,
    eager_foreach: bool,
    allowed: str,
    in_range: Callable[[float], bool],
) -> None:
    """Check a number, or a tensor of one; the value only of a tensor that the host can read."""
    if not isinstance(value, Tensor):
        _check_number(value, name, title, allowed, in_range)
        return
    if eager_foreach:
        raise ValueError(
            f"{name} as a Tensor is not supported for capturable=False and foreach=True; pass a "
            f"number, capturable=True, or leave foreach=None"
        )
    if value.numel() != 1:
        raise ValueError(f"Tensor {name} must be 1-element, got shape {tuple(value.shape)}")
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"Tensor {name} must be float32 or float64, got {value.dtype}")
    if value.device.type == "cpu":
        _check_number(value.item(), name, title, allowed, in_range)


def _check_number(
    value: Any, name: str, title: str, allowed: str, in_range: Callable[[float], bool]
) -> None:
    """Check a number; ``title`` is what torch's own messages call it."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number, got a Tensor; pass {name}.item()")
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
        raise ValueError(
            f"Invalid {title}: {value!r}. {name}={value!r} is out of range; it must be finite and "
            f"{allowed.format(name=name)}"
        )
