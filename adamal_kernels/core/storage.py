"""The one table of formats: in which types a step finds what it reads and stores what it writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["FORMATS", "Format", "compute_dtype", "load", "real_dtype", "store", "store_all"]

_COMPUTE = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


class _Types(NamedTuple):
    param: torch.dtype
    grad: torch.dtype
    exp_avg: torch.dtype
    exp_avg_sq: torch.dtype


class Format(_Types):
    """The types that the tensors of a step are stored in, complex ones by their parts.

    Args:
        param: of the parameter. A step computes in float64 for float64, else in float32.
        grad: of the gradient.
        exp_avg: of the first moment; default: what is computed in.
        exp_avg_sq: of the second moment and of its maximum; default: what is computed in.

    Example:
        >>> Format(torch.bfloat16, torch.bfloat16).exp_avg
        torch.float32
    """

    __slots__ = ()

    def __new__(
        cls,
        param: torch.dtype,
        grad: torch.dtype,
        exp_avg: torch.dtype | None = None,
        exp_avg_sq: torch.dtype | None = None,
    ) -> Format:
        """Return the format."""
        compute = _COMPUTE.get(param, torch.float32)
        return super().__new__(cls, param, grad, exp_avg or compute, exp_avg_sq or compute)

    @property
    def compute(self) -> torch.dtype:
        """The type that a step computes in."""
        return compute_dtype(self.param)


# The index of a format is its code in csrc/formula/dtypes.h (ADAMAL_FORMATS lists the same).
FORMATS: tuple[Format, ...] = (
    Format(torch.float32, torch.float32),
    Format(torch.float64, torch.float64),
    Format(torch.bfloat16, torch.bfloat16),
    Format(torch.float16, torch.float16),
    Format(torch.bfloat16, torch.float32),
    Format(torch.float16, torch.float32),
    Format(torch.float32, torch.bfloat16),
    Format(torch.float32, torch.float16),
)


def compute_dtype(param_dtype: torch.dtype) -> torch.dtype:
    """The type a step of such parameters computes in: float64 for float64, else float32.

    Raises:
        KeyError: no format of :data:`FORMATS` has such parameters.

    Example:
        >>> compute_dtype(torch.bfloat16)
        torch.float32
    """
    return _COMPUTE[param_dtype]


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of a complex type's parts; any other type as it is."""
    return dtype.to_real() if dtype.is_complex else dtype


def load(stored: Tensor, compute: torch.dtype) -> Tensor:
    """Return what is stored as numbers to compute with: the tensor itself where it holds them.

    Example:
        >>> load(torch.ones(1, dtype=torch.bfloat16), torch.float32)
        tensor([1.])
    """
    return stored.to(compute)


def store(stored: Tensor, values: Tensor) -> None:
    """Store what was computed: each value rounded to nearest even, if at all.

    Example:
        >>> held = torch.zeros(1, dtype=torch.bfloat16)
        >>> store(held, torch.tensor([1.0 + 2.0**-9]))
        >>> held
        tensor([1.], dtype=torch.bfloat16)
    """
    if values is not stored:
        stored.copy_(values)


def store_all(stored: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Store the values of several tensors, in few operators; see :func:`store`.

    Tensors that hold their values already are those of a type that is computed in: all, or none.
    """
    if stored and values[0] is not stored[0]:
        torch._foreach_copy_(stored, values)
