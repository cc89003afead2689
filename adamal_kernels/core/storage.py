"""The one table of storage types: which parameter and gradient types a step can read."""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["DTYPE_PAIRS", "DtypePair", "compute_dtype", "real_dtype"]


class DtypePair(NamedTuple):
    """The storage types of a parameter and of its gradient."""

    param: torch.dtype
    grad: torch.dtype


_COMPUTE = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}

# The index of a pair is its code in csrc/formula/dtypes.h (ADAMAL_DTYPE_PAIRS lists the same
# pairs).
DTYPE_PAIRS: tuple[DtypePair, ...] = (
    DtypePair(torch.float32, torch.float32),
    DtypePair(torch.float64, torch.float64),
    DtypePair(torch.bfloat16, torch.bfloat16),
    DtypePair(torch.float16, torch.float16),
    DtypePair(torch.bfloat16, torch.float32),
    DtypePair(torch.float16, torch.float32),
    DtypePair(torch.float32, torch.bfloat16),
    DtypePair(torch.float32, torch.float16),
)


def compute_dtype(param_dtype: torch.dtype) -> torch.dtype:
    """The type a step computes in and keeps its moments in: float64 for float64, else float32.

    Raises:
        KeyError: ``param_dtype`` is no type of :data:`DTYPE_PAIRS`.

    Example:
        >>> compute_dtype(torch.bfloat16)
        torch.float32
    """
    return _COMPUTE[param_dtype]


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of a complex type's parts; any other type as it is."""
    return dtype.to_real() if dtype.is_complex else dtype
