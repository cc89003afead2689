"""The scalars of one step, derived in one place (float64) for every backend."""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = ["StepScalars", "beta_power", "derive_step_scalars"]


class StepScalars(NamedTuple):
    """What the element formula needs besides tensors; a row of a bucket's scalar table.

    Every field is a float64, rounded once to the compute type by whoever uses it. The order of
    the fields is the layout of ``adamal::StepScalars`` in ``csrc/adamal_math.h``.
    """

    one_minus_beta1: float
    one_minus_beta2: float
    beta2: float
    step_size: float
    """``lr / (1 - beta1**t)``; ``lr`` without bias correction."""
    bias2_sqrt: float
    """``sqrt(1 - beta2**t)``; 1 without bias correction."""
    eps: float
    coupled_decay: float
    """``weight_decay`` if it is added to the gradient, else 0: then the term is left out."""
    decay_factor: float
    """``1 - lr * weight_decay`` if the decay is decoupled, else 1 (multiplying by 1 is exact)."""
    grad_sign: float
    """-1 to maximize, else 1 (both exact)."""
    lower: float
    """Bounds of the box the parameter is clamped to; -inf and inf where there is none."""
    upper: float


def beta_power(beta: float, exponent: int) -> float:
    """Return ``beta**exponent`` by binary exponentiation, in a fixed order of float64 products.

    The same products in the same order in Python, C++ and CUDA give the same bits; ``pow`` and a
    product carried from step to step do not.

    Example:
        >>> beta_power(0.5, 10)
        0.0009765625
    """
    result = 1.0
    square = beta
    while exponent > 0:
        if exponent & 1:
            result *= square
        square *= square
        exponent >>= 1
    return result


def derive_step_scalars(
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: bool,
    maximize: bool,
    bias_correction: bool,
    lower: float = -math.inf,
    upper: float = math.inf,
) -> StepScalars:
    """Derive the scalars of step number ``step`` (1 for the first) from a group's options.

    Example:
        >>> derive_step_scalars(step=1, lr=0.5, beta1=0.5, beta2=0.75, eps=0.0, weight_decay=0.0,
        ...     decoupled_weight_decay=False, maximize=False, bias_correction=True)[:5]
        (0.5, 0.25, 0.75, 1.0, 0.5)
    """
    if bias_correction:
        step_size = lr / (1.0 - beta_power(beta1, step))
        bias2_sqrt = math.sqrt(1.0 - beta_power(beta2, step))
    else:
        step_size = lr
        bias2_sqrt = 1.0
    return StepScalars(
        one_minus_beta1=1.0 - beta1,
        one_minus_beta2=1.0 - beta2,
        beta2=beta2,
        step_size=step_size,
        bias2_sqrt=bias2_sqrt,
        eps=eps,
        coupled_decay=0.0 if decoupled_weight_decay else weight_decay,
        decay_factor=1.0 - lr * weight_decay if decoupled_weight_decay else 1.0,
        grad_sign=-1.0 if maximize else 1.0,
        lower=lower,
        upper=upper,
    )
