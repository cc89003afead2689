"""The scalars of one step, derived in one place (float64) for every backend.

Each function takes numbers or float64 tensors (0-dimensional, or a vector of one entry a row) and
does the same operations on either: the host derives the scalars it knows, and torch operators
those that only the device knows, to the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from .rounding import rounded_sqrt

__all__ = [
    "COUNT_BITS",
    "GradientFactor",
    "StepInputs",
    "StepOptions",
    "StepScalars",
    "as_float64",
    "beta_power",
    "derive_step_scalars",
    "gradient_factor",
    "move_scalar",
]

Number = TypeVar("Number", float, Tensor)

COUNT_BITS = 40
"""Of a count that only the device knows: more than the largest that a steady step takes
(``kMostSteps`` in ``csrc/fast_path/members.cpp``)."""
# torch.nn.utils.clip_grad_norm_ adds it to the norm.
_CLIP_EPS = 1e-6


class StepScalars(NamedTuple):
    """What the element formula needs besides tensors; a row of a bucket's scalar table.

    Every field is a float64, rounded once to the compute type by whoever uses it. The order of
    the fields is the layout of ``adamal::StepScalars`` in ``csrc/formula/element.h``.
    """

    one_minus_beta1: float | Tensor
    one_minus_beta2: float | Tensor
    beta2: float | Tensor
    step_size: float | Tensor
    """``lr / (1 - beta1**t)``; ``lr`` without bias correction."""
    bias2_sqrt: float | Tensor
    """``sqrt(1 - beta2**t)``; 1 without bias correction."""
    eps: float | Tensor
    coupled_decay: float | Tensor
    """``weight_decay`` if it is added to the gradient, else 0: then the term is left out."""
    decay_factor: float | Tensor
    """``1 - lr * weight_decay`` if the decay is decoupled, else 1 (multiplying by 1 is exact)."""
    grad_factor: float | Tensor
    """What a gradient is multiplied by: :class:`GradientFactor`, negated to maximize."""
    lower: float | Tensor
    """Bounds of the box the parameter is clamped to; -inf and inf where there is none."""
    upper: float | Tensor


class StepOptions(NamedTuple):
    """A param group's options, with the bounds of its set for one parameter type."""

    lr: float | Tensor
    beta1: float | Tensor
    beta2: float | Tensor
    eps: float
    weight_decay: float
    decoupled_weight_decay: bool
    maximize: bool
    bias_correction: bool
    lower: float = -math.inf
    upper: float = math.inf

    def on_host(self) -> StepOptions:
        """Return the options with tensors read to numbers."""
        return self._map(lambda tensor: tensor.item())

    def on_device(self, device: torch.device) -> StepOptions:
        """Return the options with tensors moved to ``device`` by :func:`move_scalar`."""
        return self._map(lambda tensor: move_scalar(tensor, device).reshape(()))

    def _map(self, change: Callable[[Tensor], Any]) -> StepOptions:
        return StepOptions(
            *(change(value) if isinstance(value, Tensor) else value for value in self)
        )


class StepInputs(NamedTuple):
    """What a step learns of its gradients before it takes them; each None if there is none."""

    grad_scale: Tensor | None = None
    """What the loss was multiplied by: float32, of one element."""
    found_inf: Tensor | None = None
    """Not 0 where a gradient was not finite: float32, of one element."""
    grad_norm: Tensor | None = None
    """Norm of all gradients, unscaled: float64, of one element."""
    max_grad_norm: float = math.inf
    """The norm that gradients are clipped to."""
    skipped_steps: Tensor | None = None
    """Int64 scalar: one more after a step that was skipped."""

    @property
    def may_skip(self) -> bool:
        """Whether the step may turn out not to be taken."""
        return self.found_inf is not None or self.max_grad_norm < math.inf

    def to(self, device: torch.device) -> StepInputs:
        """Return the inputs moved to ``device`` by :func:`move_scalar`."""
        return self._replace(
            **{
                name: move_scalar(tensor, device)
                for name in ("grad_scale", "found_inf", "grad_norm")
                if (tensor := getattr(self, name)) is not None
            }
        )

    def factor_on_device(self) -> GradientFactor:
        """Return :func:`gradient_factor` of these inputs as float64 tensors."""
        scale, inf, norm = (
            None if tensor is None else tensor.double().reshape(()) for tensor in self[:3]
        )
        return gradient_factor(scale, inf, norm, self.max_grad_norm)

    def factor_on_host(self) -> GradientFactor:
        """Return :func:`gradient_factor` of these inputs as numbers; waits for their device."""
        scale, inf, norm = (None if tensor is None else tensor.item() for tensor in self[:3])
        return gradient_factor(scale, inf, norm, self.max_grad_norm)


def as_float64(value: float | Tensor, device: torch.device) -> Tensor:
    """Return a number, or a tensor of any shape, as a float64 tensor on a device.

    A number is filled in there: a copy of it would be waited for, and captured in no CUDA graph.

    Example:
        >>> as_float64(0.5, torch.device("cpu"))
        tensor(0.5000, dtype=torch.float64)
    """
    if isinstance(value, Tensor):
        return value.to(device, torch.float64)
    return torch.full((), value, dtype=torch.float64, device=device)


def move_scalar(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of one element on a device, without waiting for another device.

    What lies on the host is filled in: an asynchronous copy might read it after its owner has
    changed or freed it. What goes to the host is waited for.

    Example:
        >>> move_scalar(torch.tensor([0.5]), torch.device("cpu"))
        tensor([0.5000])
    """
    from_host, to_host = tensor.device.type == "cpu", device.type == "cpu"
    if from_host and not to_host and not tensor.requires_grad:
        return torch.full(tensor.shape, tensor.item(), dtype=tensor.dtype, device=device)
    return tensor.to(device, non_blocking=not from_host and not to_host)


class GradientFactor(NamedTuple):
    """What gradients are multiplied by, and whether the step is skipped."""

    factor: float | Tensor
    skip: bool | Tensor


def beta_power(beta: float | Tensor, exponent: int | Tensor) -> float | Tensor:
    """Return ``beta**exponent`` by binary exponentiation, in a fixed order of float64 products.

    The same products in the same order in Python, torch, C++ and CUDA give the same bits; ``pow``
    and a product carried from step to step do not.

    Args:
        beta: a number or a float64 tensor.
        exponent: a number, at least 0, or an int64 tensor of numbers below ``2**COUNT_BITS``.

    Example:
        >>> beta_power(0.5, 10)
        0.0009765625
    """
    if isinstance(exponent, Tensor):
        return _beta_power_of_tensor(beta, exponent)
    result: float | Tensor = 1.0
    square = beta
    while exponent > 0:
        if exponent & 1:
            result = result * square
        square = square * square
        exponent >>= 1
    return result


def _beta_power_of_tensor(beta: float | Tensor, exponent: Tensor) -> Tensor:
    result = torch.ones(exponent.shape, dtype=torch.float64, device=exponent.device)
    square = as_float64(beta, exponent.device)
    for bit in range(COUNT_BITS):
        result = torch.where((exponent >> bit) & 1 != 0, result * square, result)
        square = square * square
    return result


def derive_step_scalars(
    step: int | Tensor, options: StepOptions, grad_factor: float | Tensor = 1.0
) -> StepScalars:
    """Derive the scalars of step number ``step`` (1 for the first) from a group's options.

    A step with ``lr`` 0 does not project: checkpoint tools take one to make the state.

    Args:
        step: a number, or an int64 tensor with an entry for each row.
        options: the group's.
        grad_factor: what the gradients are multiplied by, as :func:`gradient_factor` has it.

    Example:
        >>> options = StepOptions(lr=0.5, beta1=0.5, beta2=0.75, eps=0.0, weight_decay=0.0,
        ...     decoupled_weight_decay=False, maximize=False, bias_correction=True)
        >>> derive_step_scalars(1, options)[:5]
        (0.5, 0.25, 0.75, 1.0, 0.5)
    """
    o = options
    step_size: float | Tensor = o.lr
    bias2_sqrt: float | Tensor = 1.0
    if o.bias_correction:
        step_size = _divide(o.lr, 1.0 - beta_power(o.beta1, step))
        bias2_sqrt = _sqrt(1.0 - beta_power(o.beta2, step))
    stands = o.lr == 0
    return StepScalars(
        one_minus_beta1=1.0 - o.beta1,
        one_minus_beta2=1.0 - o.beta2,
        beta2=o.beta2,
        step_size=step_size,
        bias2_sqrt=bias2_sqrt,
        eps=o.eps,
        coupled_decay=0.0 if o.decoupled_weight_decay else o.weight_decay,
        decay_factor=1.0 - o.lr * o.weight_decay if o.decoupled_weight_decay else 1.0,
        grad_factor=-grad_factor if o.maximize else grad_factor,
        lower=_select(stands, -math.inf, o.lower),
        upper=_select(stands, math.inf, o.upper),
    )


def gradient_factor(
    grad_scale: float | Tensor | None = None,
    found_inf: float | Tensor | None = None,
    grad_norm: float | Tensor | None = None,
    max_grad_norm: float = math.inf,
) -> GradientFactor:
    """Return what gradients are multiplied by to be unscaled and clipped, and whether to skip.

    ``1 / grad_scale``, times ``max_grad_norm / (grad_norm + 1e-6)`` where that is less than 1, as
    :func:`torch.nn.utils.clip_grad_norm_` has it. The step is skipped where ``found_inf`` is not
    0, or the norm is not finite. Arguments are as in :class:`StepInputs`, tensors as float64.

    Example:
        >>> gradient_factor(grad_scale=4.0, grad_norm=2.0, max_grad_norm=100.0)
        GradientFactor(factor=0.25, skip=False)
        >>> gradient_factor(grad_norm=math.inf, max_grad_norm=1.0).skip
        True
    """
    factor: float | Tensor = 1.0
    skip: bool | Tensor = False
    if grad_scale is not None:
        factor = _divide(1.0, grad_scale)
    if found_inf is not None:
        skip = found_inf != 0
    if grad_norm is not None:
        # False for NaN too.
        skip = skip | _not(grad_norm < math.inf)
        clip = _divide(max_grad_norm, grad_norm + _CLIP_EPS)
        factor = _select(clip < 1.0, factor * clip, factor)
    return GradientFactor(factor, skip)


def _divide(first: float | Tensor, second: float | Tensor) -> float | Tensor:
    # torch divides a number and a tensor by multiplying by a reciprocal, which rounds twice.
    if isinstance(first, Tensor):
        second = as_float64(second, first.device)
    elif isinstance(second, Tensor):
        first = as_float64(first, second.device)
    elif second == 0:
        # A GradScaler's scale that has backed off to nothing. Python raises, all others divide.
        with np.errstate(all="ignore"):
            return float(np.float64(first) / second)
    return first / second


def _sqrt(value: float | Tensor) -> float | Tensor:
    return rounded_sqrt(value) if isinstance(value, Tensor) else math.sqrt(value)


def _not(value: bool | Tensor) -> bool | Tensor:
    return ~value if isinstance(value, Tensor) else not value


def _select(condition: bool | Tensor, first: Any, second: Any) -> Any:
    if not isinstance(condition, Tensor):
        return first if condition else second
    first, second = (as_float64(value, condition.device) for value in (first, second))
    return torch.where(condition, first, second)
