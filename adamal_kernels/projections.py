"""The sets a step can project onto: frozen dataclasses, checked when they are made.

The projection of Algorithm 1 (paper, section 3.3, line 8) is the nearest point of the set in the
metric ``diag(d)``, ``d = sqrt(v) / sqrt(1 - beta2**t) + eps``. For a product of intervals it does
not depend on ``d``: it is the clamp, and runs inside the step's kernel. The balls and the simplex
couple elements; how is in :mod:`adamal_kernels.backends.eager.sets`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = [
    "Box",
    "CoupledSet",
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

    def check_parameter(self, param: Tensor, where: str) -> None:
        """Check that the set is one for a parameter of this shape; any is, unless overridden."""

    def bounds(self, dtype: torch.dtype) -> tuple[float, float]:
        """Return the interval every element is clamped to, rounded inward to ``dtype``.

        Rounded inward, so that a parameter stored in ``dtype`` lies in the set.

        Args:
            dtype: the parameter's type: float32, float64, bfloat16 or float16.

        Raises:
            ValueError: no number of ``dtype`` lies in the set.
        """
        raise NotImplementedError

    def on_boundary(self, param: Tensor, multiplier: Tensor | None) -> Tensor:
        """Return which elements of a parameter lie on the set's boundary.

        Args:
            param: in the set, as a step leaves it.
            multiplier: its state of that name, where rows are spread over processes; else None.

        Returns:
            A boolean tensor, of a shape that expands to the parameter's.
        """
        raise NotImplementedError


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
            if isinstance(value, bool) or not isinstance(value, Real):
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

    def on_boundary(self, param: Tensor, multiplier: Tensor | None) -> Tensor:
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

    def on_boundary(self, param: Tensor, multiplier: Tensor | None) -> Tensor:
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


class CoupledSet(Projection):
    """A set that couples the elements of a row; use one of its subclasses.

    The nearest point depends on the metric: with ``d`` the step's own denominator it is the
    minimizer of ``sum(d_i * (x_i - y_i)**2)`` over the set. ``dim`` names the dimensions that make
    up a row, as in :func:`torch.softmax`: every slice along them is projected on its own; None: the
    whole tensor is one row. The point is found by Newton's method on one
    float64 multiplier a row, which ``optimizer.state[p]["multiplier"]`` keeps for the next step to
    start from. ``y`` is the stepped parameter as it is stored; a row that lies in the set, to a
    unit in the last place of the parameter's type, is left as it is, and so is one that has a NaN
    or an infinity, or whose sums overflow float64. What is left of an element is exact to the
    rounding of ``y`` in float64: of elements 1e16 times as large as a simplex or an L1 ball nothing
    is, and the row becomes 0, which the next step projects. Where ``d`` is 0, an element counts as
    one of a very small ``d``.

    A parameter that starts outside of the set is projected in its first step.
    """

    # No dataclass, whose first field this would be: each set has its own, after its size.
    dim: int | tuple[int, ...] | None

    kind: ClassVar[int]
    """The code in ``csrc/formula/sets.h``."""

    @property
    def size(self) -> float:
        """The radius or the total."""
        raise NotImplementedError

    def bounds(self, dtype: torch.dtype) -> tuple[float, float]:
        """See :meth:`Projection.bounds`: there are none that every element keeps by itself."""
        return -math.inf, math.inf

    def on_boundary(self, param: Tensor, multiplier: Tensor | None) -> Tensor:
        """See :meth:`Projection.on_boundary`: the elements of rows as large as they may be.

        Of rows that are spread over processes: of those that the last step projected.
        """
        if multiplier is not None:
            return multiplier != 0
        dims = self.reduced_dims(param.dim())
        order = 2 if isinstance(self, L2Ball) else 1
        sizes = torch.linalg.vector_norm(param.double(), order, dims or None, keepdim=True)
        return sizes >= self.size * (1 - torch.finfo(param.dtype).eps)

    def check_parameter(self, param: Tensor, where: str) -> None:
        """Check that the set is one for ``param``.

        Raises:
            ValueError: ``dim`` is out of range or names a dimension twice.
        """
        self.reduced_dims(param.dim(), where)

    def reduced_dims(self, ndim: int, where: str = "the parameter") -> tuple[int, ...]:
        """Return the dimensions of a row, of a tensor of ``ndim``, in order and from 0.

        Raises:
            ValueError: ``dim`` is out of range or names a dimension twice.

        Example:
            >>> L2Ball(1.0, dim=-1).reduced_dims(2), L2Ball(1.0).reduced_dims(2)
            ((1,), (0, 1))
        """
        if self.dim is None:
            return tuple(range(ndim))
        wanted = self.dim if isinstance(self.dim, tuple) else (self.dim,)
        count = max(ndim, 1)  # A single number is a row of one, as in torch.
        for dim in wanted:
            if not -count <= dim < count:
                raise ValueError(
                    f"projection: dim={dim} of {self} is out of range for {where}, which has "
                    f"{ndim} dimensions; it may be from {-count} to {count - 1}"
                )
        found = sorted(dim % count for dim in wanted)
        if len(set(found)) < len(found):
            raise ValueError(
                f"projection: {self} names a dimension of {where}, which has {ndim}, twice"
            )
        return tuple(found) if ndim else ()

    def _check_fields(self, name: str) -> None:
        """Check the size, a field called ``name``, and ``dim``, and store what they mean."""
        cls, value = type(self).__name__, getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{cls}: {name} must be a number, got {value!r}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not 0 < number < math.inf:
            raise ValueError(
                f"{cls}: {name} must be finite and > 0, got {number!r}; for no set at all, "
                "projection=None"
            )
        object.__setattr__(self, name, number)
        dim = self.dim
        if isinstance(dim, (tuple, list)) and len(dim) == 0:
            raise ValueError(f"{cls}: dim={dim!r} names no dimension; None is the whole tensor")
        for d in dim if isinstance(dim, (tuple, list)) else (dim,):
            if isinstance(d, bool) or not isinstance(d, (Integral, type(None))):
                raise TypeError(f"{cls}: dim must be an int, a tuple of them or None, got {dim!r}")
        if isinstance(dim, (tuple, list)):
            if None in dim:
                raise TypeError(f"{cls}: dim must be an int, a tuple of them or None, got {dim!r}")
            object.__setattr__(self, "dim", tuple(map(int, dim)))
        elif dim is not None:
            object.__setattr__(self, "dim", int(dim))


@dataclass(frozen=True)
class _Ball(CoupledSet):
    """What the two balls share."""

    radius: float
    dim: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check the radius and ``dim``."""
        self._check_fields("radius")

    @property
    def size(self) -> float:
        """The radius."""
        return self.radius


@dataclass(frozen=True)
class L2Ball(_Ball):
    """All points with ``sqrt(sum(x_i**2)) <= radius`` in every row: a max-norm constraint.

    Outside, the nearest point is ``x_i = d_i * y_i / (d_i + m)``, with the multiplier ``m > 0`` at
    which the norm is the radius.

    Args:
        radius: finite, > 0.
        dim: an int, a tuple of ints, or None for the whole tensor. ``dim=1`` of a linear layer's
            weight bounds the norm of each neuron's incoming weights, ``dim=(1, 2, 3)`` that of
            each filter of a 2-d convolution.

    Raises:
        TypeError: ``radius`` is no number, or ``dim`` none of the above.
        ValueError: ``radius`` is not positive and finite. From the optimizer: ``dim`` is out of
            the parameter's range.

    Example:
        >>> import torch
        >>> from adamal_kernels import AdamAL
        >>> p = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
        >>> p.grad = torch.zeros_like(p)
        >>> AdamAL([p], projection=L2Ball(1.0, dim=1)).step()
        >>> p.detach()
        tensor([[0.6000, 0.8000],
                [0.3000, 0.4000]])
    """

    kind: ClassVar[int] = 0


@dataclass(frozen=True)
class L1Ball(_Ball):
    """All points with ``sum(abs(x_i)) <= radius`` in every row: sparse ones where it is active.

    Outside, the nearest point is ``x_i = sign(y_i) * max(0, abs(y_i) - m / d_i)``, with the
    multiplier ``m > 0`` at which the sum is the radius.

    Args:
        radius: finite, > 0.
        dim: as of :class:`L2Ball`.

    Raises:
        TypeError, ValueError: as :class:`L2Ball`.

    Example:
        >>> import torch
        >>> from adamal_kernels import AdamAL
        >>> p = torch.nn.Parameter(torch.tensor([3.0, -2.0, 0.5]))
        >>> p.grad = torch.zeros_like(p)
        >>> AdamAL([p], projection=L1Ball(2.0)).step()
        >>> p.detach()
        tensor([ 1.5000, -0.5000,  0.0000])
    """

    kind: ClassVar[int] = 1


@dataclass(frozen=True)
class Simplex(CoupledSet):
    """All points with ``x_i >= 0`` and ``sum(x_i) == total`` in every row: scaled probabilities.

    The nearest point is ``x_i = max(0, y_i - m / d_i)``, with the multiplier ``m`` at which the sum
    is the total. Rows are rarely on it before projection, so that every step projects.

    Args:
        total: finite, > 0. Default: 1.
        dim: as of :class:`L2Ball`; ``dim=-1`` makes each row of a matrix a distribution.

    Raises:
        TypeError, ValueError: as :class:`L2Ball`. From the optimizer, ValueError: a row has no
            elements, or the parameter's type does not reach the total.

    Example:
        >>> import torch
        >>> from adamal_kernels import AdamAL
        >>> p = torch.nn.Parameter(torch.tensor([[1.0, 0.5], [-1.0, 2.0]]))
        >>> p.grad = torch.zeros_like(p)
        >>> AdamAL([p], projection=Simplex(dim=-1)).step()
        >>> p.detach()
        tensor([[0.7500, 0.2500],
                [0.0000, 1.0000]])
    """

    total: float = 1.0
    dim: int | tuple[int, ...] | None = None
    kind: ClassVar[int] = 2

    def __post_init__(self) -> None:
        """Check the total and ``dim``."""
        self._check_fields("total")

    @property
    def size(self) -> float:
        """The total."""
        return self.total

    def bounds(self, dtype: torch.dtype) -> tuple[float, float]:
        """See :meth:`CoupledSet.bounds`.

        Raises:
            ValueError: ``dtype`` does not reach the total, or rounds it to 0.
        """
        if torch.tensor(self.total, dtype=torch.float64, device="cpu").to(dtype) == 0:
            raise ValueError(
                f"projection: {self} holds no {dtype} number (its total is rounded to 0); use a "
                "larger total or a wider parameter type"
            )
        if self.total > torch.finfo(dtype).max:
            raise ValueError(
                f"projection: {self} holds no {dtype} number (the largest is "
                f"{torch.finfo(dtype).max}); use a smaller total or a wider parameter type"
            )
        return super().bounds(dtype)

    def on_boundary(self, param: Tensor, multiplier: Tensor | None) -> Tensor:
        """See :meth:`Projection.on_boundary`: the elements that are 0."""
        return param == 0

    def check_parameter(self, param: Tensor, where: str) -> None:
        """See :meth:`CoupledSet.check_parameter`; raises ValueError where a row is empty too."""
        reduced = self.reduced_dims(param.dim(), where)
        length = math.prod(param.shape[dim] for dim in reduced)
        rows = math.prod(n for dim, n in enumerate(param.shape) if dim not in reduced)
        if length == 0 and rows > 0:
            raise ValueError(
                f"projection: {self} of {where}, of shape {tuple(param.shape)}, would be over no "
                "elements, whose sum is 0; put the parameter into a group with projection=None"
            )


_SETS: dict[str, type[Projection]] = {
    cls.__name__: cls for cls in (Box, NonNegative, L2Ball, L1Ball, Simplex)
}


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
    saved = {"set": type(projection).__name__, **asdict(projection)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in saved.items()}


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
