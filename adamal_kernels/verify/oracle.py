"""The method in float64 numpy, written from the paper and not from the other backends."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..core.buffers import SecondMoment
from ..core.rows import inside_tolerance
from ..projections import CoupledSet, L1Ball, L2Ball, Simplex

__all__ = ["TOLERANCES", "Oracle", "OracleOptions", "Tolerance", "is_within", "nearest_point"]

Array = NDArray[np.float64]


class Tolerance(NamedTuple):
    """How far a backend may be from the oracle after :data:`.cases.STEPS` steps."""

    rtol: float
    atol: float


# The only tolerances there are, by parameter type: the first for parameters, the second for
# moments, which are kept in the compute type. About ten times the largest deviation seen over the
# table of cases. A rounding to 16-bit storage can fall either way: two units in the last place of
# a parameter, and what one of them does to the moments through a coupled decay of 0.1.
TOLERANCES: dict[torch.dtype, tuple[Tolerance, Tolerance]] = {
    torch.float64: (Tolerance(1e-13, 1e-14), Tolerance(5e-14, 5e-16)),
    torch.float32: (Tolerance(2e-5, 2e-6), Tolerance(5e-6, 2e-7)),
    torch.bfloat16: (Tolerance(2**-6, 2**-9), Tolerance(1e-4, 1e-3)),
    torch.float16: (Tolerance(2**-9, 2**-12), Tolerance(1e-4, 1e-4)),
}


# Where d is 0 the metric does not see an element: it counts as one of a very small d.
_LEAST_METRIC = 1e-100


class OracleOptions(NamedTuple):
    """Options of one param group, as the paper and torch name them."""

    second_moment: SecondMoment
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False
    maximize: bool = False
    bias_correction: bool = True
    lower: float = -math.inf
    upper: float = math.inf
    coupled: CoupledSet | None = None


class Oracle:
    """One parameter stepped in float64: Algorithm 1 with ``beta2 * v + (1 - beta2) * max(g2, v)``.

    Only the parameter is rounded, to its storage type, after every step.
    """

    def __init__(self, param: torch.Tensor, options: OracleOptions) -> None:
        """Start from the values of ``param``, at step 0 with zero moments."""
        self._dtype = param.dtype
        self._options = options
        self.param: Array = param.detach().double().cpu().numpy().copy()
        self.exp_avg: Array = np.zeros_like(self.param)
        self.exp_avg_sq: Array = np.zeros_like(self.param)
        self.max_exp_avg_sq: Array = np.zeros_like(self.param)
        self.steps = 0

    def step(self, grad: torch.Tensor) -> None:
        """Take one step with ``grad``, whose values are taken as they are stored."""
        o = self._options
        self.steps += 1
        with np.errstate(all="ignore"):
            self._step(grad.detach().double().cpu().numpy(), o)

    def _step(self, grad: Array, o: OracleOptions) -> None:
        g = -grad if o.maximize else grad
        p = self.param
        if o.weight_decay and o.decoupled_weight_decay:
            p = p - o.lr * o.weight_decay * p
        elif o.weight_decay:
            g = g + o.weight_decay * p
        # As a difference: an infinite moment meets a finite gradient as NaN, as in the backends.
        self.exp_avg = self.exp_avg + (1 - o.beta1) * (g - self.exp_avg)
        v, g2 = self.exp_avg_sq, g * g
        if o.second_moment is SecondMoment.MONOTONE:
            # A comparison with a NaN gradient is false: it leaves v alone.
            g2 = np.where(g2 > v, g2, v)
        v = o.beta2 * v + (1 - o.beta2) * g2
        self.exp_avg_sq = denominator = v
        if o.second_moment is SecondMoment.AMSGRAD:
            self.max_exp_avg_sq = np.where(v > self.max_exp_avg_sq, v, self.max_exp_avg_sq)
            denominator = self.max_exp_avg_sq
        correction1 = 1 - o.beta1**self.steps if o.bias_correction else 1.0
        correction2 = 1 - o.beta2**self.steps if o.bias_correction else 1.0
        d = np.sqrt(denominator / correction2) + o.eps
        moves = (self.exp_avg != 0) | (d != 0)
        p = p - np.where(moves, o.lr / correction1 * self.exp_avg / d, 0.0)
        if o.lr != 0:
            p = np.where(p < o.lower, o.lower, np.where(p > o.upper, o.upper, p))
        p = self._stored(p)
        if o.lr != 0 and o.coupled is not None and p.size:
            tolerance = inside_tolerance(self._dtype)
            p = self._stored(nearest_point(p, np.maximum(d, _LEAST_METRIC), o.coupled, tolerance))
        self.param = p

    def _stored(self, p: Array) -> Array:
        return torch.from_numpy(np.asarray(p)).to(self._dtype).double().numpy()

    def expected(self) -> dict[str, Array]:
        """Return the values a backend should hold, by the names of the optimizer's state."""
        values = {"param": self.param, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        if self._options.second_moment is SecondMoment.AMSGRAD:
            values["max_exp_avg_sq"] = self.max_exp_avg_sq
        return values

    def tolerance(self, name: str) -> Tolerance:
        """Return the tolerance of the value ``name``."""
        return TOLERANCES[self._dtype][0 if name == "param" else 1]


def nearest_point(y: Array, d: Array, projection: CoupledSet, tolerance: float = 0.0) -> Array:
    """Return the minimizer of ``sum(d * (x - y)**2)`` in every row: by bisection, not by Newton.

    Args:
        y: any shape.
        d: the metric, positive, of the same shape.
        projection: the set.
        tolerance: how far beyond its size, relative to it, a row still counts as in the set.

    Example:
        >>> from adamal_kernels import L2Ball
        >>> nearest_point(np.array([3.0, 4.0]), np.ones(2), L2Ball(1.0))
        array([0.6, 0.8])
    """
    axes = projection.reduced_dims(y.ndim)

    def excess(x: Array) -> Array:
        if isinstance(projection, L2Ball):
            size = np.sqrt(np.sum(x * x, axis=axes, keepdims=True))
        else:
            size = np.sum(np.abs(x), axis=axes, keepdims=True)
        return size - projection.size

    def point(m: Array) -> Array:
        if isinstance(projection, L2Ball):
            return d * y / (d + m)
        if isinstance(projection, L1Ball):
            return np.sign(y) * np.maximum(0, np.abs(y) - m / d)
        return np.maximum(0, y - m / d)

    low = np.zeros_like(excess(y))
    # So large that every element is as good as 0, and for a simplex so small that one is enough.
    scale = np.max(np.abs(y), axis=axes, keepdims=True) + projection.size
    high = np.max(d, axis=axes, keepdims=True) * scale
    if isinstance(projection, L2Ball):
        high = high * np.sqrt(y.size) / projection.size
    if isinstance(projection, Simplex):
        low = -high
    for _ in range(80):
        middle = low + (high - low) / 2
        above = excess(point(middle)) > 0
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    outside = excess(y) > tolerance * projection.size
    if isinstance(projection, Simplex):
        is_negative = np.any(y < 0, axis=axes, keepdims=True)
        outside = is_negative | (np.abs(excess(y)) > tolerance * projection.size)
    return np.where(outside, point(low + (high - low) / 2), y)


def is_within(found: torch.Tensor, expected: Array, tolerance: Tolerance) -> bool:
    """Whether ``found`` equals ``expected`` within ``tolerance``; equal NaNs are equal."""
    return bool(
        np.allclose(
            found.detach().double().cpu().numpy(),
            expected,
            rtol=tolerance.rtol,
            atol=tolerance.atol,
            equal_nan=True,
        )
    )
