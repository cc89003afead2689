"""The two forms of a step as an argmin, apart from any optimizer: one step's, and equation 13."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "StepSums", "argmin_violation"]

Array = NDArray[np.float64]


def argmin_violation(
    new: Array, old: Array, linear: Array, budget: Array, lower: float, upper: float
) -> float:
    """Return how far ``new`` is from minimising ``linear * x + budget / 2 * (x - old)**2``.

    By the optimality conditions on ``[lower, upper]``: the derivative vanishes inside, is not
    negative at the lower bound and not positive at the upper one. Relative to the terms that the
    derivative consists of; a point outside the interval is infinitely far.
    """
    if (new < lower).any() or (new > upper).any():
        return float("inf")
    pull = budget * (new - old)
    derivative = linear + pull
    derivative = np.where(new == lower, np.minimum(derivative, 0), derivative)
    derivative = np.where(new == upper, np.maximum(derivative, 0), derivative)
    # Rounding of new - old is relative to old.
    scale = np.abs(linear) + np.abs(pull) + budget * np.abs(old)
    return float((np.abs(derivative) / scale).max())


class StepSums:
    """Equation 13's sums over the steps so far, in float64 and apart from the optimizer's state."""

    def __init__(self, dimension: int, momentum: float) -> None:
        self.momentum = momentum
        self.gradients = np.zeros(dimension)
        self.correction = np.zeros(dimension)
        self.normals = np.zeros(dimension)
        self.budget = np.zeros(dimension)
        self.centres = np.zeros(dimension)
        self.negative_sigmas = 0

    def add(self, grad: Array, x: Array, budget: Array) -> None:
        self.gradients += grad
        self.correction = self.momentum * (self.correction + grad)
        sigma = budget - self.budget
        self.negative_sigmas += int((sigma < 0).sum())
        self.centres += sigma * x
        self.budget = budget

    def argmin(self, rho: float, *, normals: bool = False) -> Array:
        """Return the minimum without a set; ``normals`` adds the set's subgradients (eq. 10)."""
        linear = rho * (self.gradients - self.correction) + (self.normals if normals else 0)
        return (self.centres - linear) / self.budget
