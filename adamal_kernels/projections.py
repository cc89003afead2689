"""The sets a step can project onto: frozen dataclasses, checked when they are made.

The projection of Algorithm 1 (paper, section 3.3, line 8) is the nearest point of the set in the
metric ``diag(d)``, ``d = sqrt(v) / sqrt(1 - beta2**t) + eps``. For a product of intervals it does
not depend on ``d``: it is the clamp, and runs inside the step's kernel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

__all__ = [
    "Box",
    "L1Ball",
    "L2Ball",
    "NonNegative",
    "Projection",
    "Simplex",
    "is_known_set",
    "projection_from_dict",
    "projection_to_dict",
]

_BITS = {
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


@dataclass(frozen=True)
class Projection:
    """A closed convex set that parameters are kept in; use one of its subclasses."""

    def bounds(self, dtype: torch.dtype) -> tuple[float, float]:
        """Return the interval every element is clamped to, rounded inward to ``dtype``.

        Rounded inward, so that a parameter stored in ``dtype`` lies in the set.

        Args:
            dtype: the parameter's type: float32, float64, bfloat16 or float16.

        Raises:
            ValueError: no number of ``dtype`` lies in the set.
        """
        raise NotImplementedError

    def on_boundary(self, param: Tensor) -> Tensor | None:
        """Return which elements of a parameter lie on the set's boundary.

        Args:
            param: in the set, as a step leaves it.

        Returns:
            A boolean tensor of the same shape; None for a set of which it is not told by element.
        """
        return None


@dataclass(frozen=True)
class Box(Projection):
    """All points with ``lo <= x_i <= hi`` for every element ``i``.

    Args:
        lo: lower bound, a number; ``-math.inf`` for none.
        hi: upper bound, a number not below ``lo``; ``math.inf`` for none.

    Raises:
        TypeError: a bound is not a real number.
        ValueError: a bound is NaN, ``lo > hi``, or no finite number lies between them.

    Example:
        >>> import torch
        >>> Box(-1, 0.3).bounds(torch.bfloat16)
        (-1.0, 0.298828125)
    """

    lo: float
    hi: float

    def __post_init__(self) -> None:
        """Check the bounds and store them as floats, without negative zeros."""
        for name in ("lo", "hi"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(
                    f"Box: {name} must be a number, got {value!r} ({type(value).__name__}); "
                    "bounds that differ by element are not supported"
                )
            try:
                number = float(value)
            except OverflowError:
                raise ValueError(
                    f"Box: {name} is beyond float64; use -math.inf or math.inf for no bound"
                ) from None
            if math.isnan(number):
                raise ValueError(f"Box: {name} is NaN; use -math.inf or math.inf for no bound")
            # +0.0 turns -0.0 into 0.0: equal boxes must clamp to equal bits.
            object.__setattr__(self, name, number + 0.0)
        if self.lo > self.hi:
            raise ValueError(
                f"Box: lo={self.lo} is greater than hi={self.hi}; did you mean "
                f"Box({self.hi}, {self.lo})?"
            )
        if self.lo == math.inf or self.hi == -math.inf:
            raise ValueError(f"Box: no finite number lies between lo={self.lo} and hi={self.hi}")

    def bounds(self, dtype: torch.dtype) -> tuple[float, float]:
        """See :meth:`Projection.bounds`."""
        lower = _round_up(self.lo, dtype) + 0.0
        upper = -_round_up(-self.hi, dtype) + 0.0
        if lower > upper or lower == math.inf or upper == -math.inf:
            raise ValueError(
                f"projection: {self} holds no {dtype} number (rounded inward it is "
                f"[{lower}, {upper}]); widen it or use a wider parameter type"
            )
        return lower, upper

    def on_boundary(self, param: Tensor) -> Tensor:
        """See :meth:`Projection.on_boundary`."""
        return _at_bounds(param, *self.bounds(param.dtype))


@dataclass(frozen=True)
class NonNegative(Projection):
    """All points with ``x_i >= 0`` for every element ``i``.

    Example:
        >>> import torch
        >>> NonNegative().bounds(torch.float32)
        (0.0, inf)
    """

    def bounds(self, dtype: torch.dtype) -> tuple[float, float]:
        """See :meth:`Projection.bounds`."""
        return 0.0, math.inf

    def on_boundary(self, param: Tensor) -> Tensor:
        """See :meth:`Projection.on_boundary`."""
        return _at_bounds(param, *self.bounds(param.dtype))


def _at_bounds(param: Tensor, lower: float, upper: float) -> Tensor:
    """Return which elements equal a bound, as a clamp leaves them; one at infinity is none."""
    return ((param == lower) | (param == upper)) & param.isfinite()


def _round_up(value: float, dtype: torch.dtype) -> float:
    """Return the smallest number of ``dtype`` that is not below ``value``."""
    if math.isinf(value):
        return value
    rounded = torch.tensor(value, dtype=torch.float64, device="cpu").to(dtype)
    if rounded.item() < value:
        bits = rounded.view(_BITS[dtype])
        # One step up is one step away from zero for positive numbers, towards it for negative
        # ones; both zeros step to the smallest positive number.
        if rounded.item() == 0.0:
            bits.fill_(1)
        elif rounded.item() > 0.0:
            bits.add_(1)
        else:
            bits.sub_(1)
    return float(rounded.item())


class _ComesLater:
    """A set that is part of the surface and not yet built."""

    _set: ClassVar[str]

    def __init__(self, *args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(
            f"{type(self).__name__}: projection onto {self._set} is not implemented yet; "
            "Box and NonNegative are"
        )


class L2Ball(_ComesLater):
    """The Euclidean ball, projected onto in the metric ``diag(d)``; not implemented yet."""

    _set = "the Euclidean ball"


class L1Ball(_ComesLater):
    """The l1 ball, projected onto in the metric ``diag(d)``; not implemented yet."""

    _set = "the l1 ball"


class Simplex(_ComesLater):
    """The probability simplex, projected onto in the metric ``diag(d)``; not implemented yet."""

    _set = "the simplex"


_SETS: dict[str, type[Projection]] = {cls.__name__: cls for cls in (Box, NonNegative)}


def is_known_set(value: object) -> bool:
    """Whether ``value`` is one of the sets that steps and checkpoints know.

    Example:
        >>> is_known_set(NonNegative()), is_known_set(Projection())
        (True, False)
    """
    return type(value) in _SETS.values()


def projection_to_dict(projection: Projection) -> dict[str, Any]:
    """Return ``projection`` as a dict of strings and numbers, as checkpoints hold it.

    Example:
        >>> projection_to_dict(Box(0, 1))
        {'set': 'Box', 'lo': 0.0, 'hi': 1.0}
    """
    return {"set": type(projection).__name__, **asdict(projection)}


def projection_from_dict(saved: Mapping[str, Any]) -> Projection:
    """Return the set that :func:`projection_to_dict` saved.

    Raises:
        ValueError: ``saved`` names no known set, or has other fields than that set.
    """
    name = saved.get("set")
    cls = _SETS.get(name) if isinstance(name, str) else None
    if cls is None:
        raise ValueError(f"projection: unknown set {name!r} in checkpoint; known: {sorted(_SETS)}")
    values = {key: value for key, value in saved.items() if key != "set"}
    expected = {field.name for field in fields(cls)}
    if values.keys() != expected:
        raise ValueError(
            f"projection: a saved {name} has the fields {sorted(expected)}, got {sorted(values)}"
        )
    return cls(**values)
