"""The root is correctly rounded: checked in exact integer arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from adamal_kernels.core.rounding import rounded_sqrt

_TYPES = {torch.float32: (np.uint32, 8, 23), torch.float64: (np.uint64, 11, 52)}
FLOATS = pytest.mark.parametrize("dtype", _TYPES, ids=str)


def values_of_every_exponent(dtype: torch.dtype) -> Tensor:
    """Return positive finite numbers: some of each exponent, denormals and squares' neighbours."""
    integer, exponent_bits, mantissa_bits = _TYPES[dtype]
    generator = np.random.default_rng(0)
    exponents = np.arange(2**exponent_bits - 1, dtype=integer)
    mantissas = generator.integers(0, 2**mantissa_bits, (exponents.size, 6), dtype=integer)
    last = 2**mantissa_bits - 1
    mantissas[:, :4] = (0, 1, last, last - 1)
    bits = ((exponents[:, None] << integer(mantissa_bits)) | mantissas).ravel()
    # Next to the square of a number midway between two neighbours, where rounding is decided.
    odd = (
        generator.integers(2**mantissa_bits, 2 ** (mantissa_bits + 1), 2000).astype(object) * 2 + 1
    )
    midway = np.array([float(o * o) for o in odd], dtype=torch.zeros(0, dtype=dtype).numpy().dtype)
    near = midway.view(integer)
    found = np.concatenate([bits, near, near - integer(1), near + integer(1)])
    return torch.from_numpy(found[found > 0].view(midway.dtype))


def is_rounded_root(root: float, value: float, digits: int, smallest: float) -> bool:
    """Whether no number of ``digits`` bits is nearer to the exact root of ``value``."""
    ulp = max(Fraction(2) ** (math.frexp(root)[1] - digits), Fraction(smallest))
    low, high = Fraction(root) - ulp / 2, Fraction(root) + ulp / 2
    # Below a power of two the neighbour is nearer; a root is never midway.
    if math.frexp(root)[0] == 0.5:
        low = Fraction(root) - ulp / 4
    return low**2 < Fraction(value) < high**2


@FLOATS
def test_root_is_the_nearest_number(dtype: torch.dtype) -> None:
    values = values_of_every_exponent(dtype)
    info, digits = torch.finfo(dtype), _TYPES[dtype][2] + 1
    smallest = info.smallest_normal * info.eps
    wrong = [
        value
        for value, root in zip(values.tolist(), rounded_sqrt(values).tolist(), strict=True)
        if not is_rounded_root(root, value, digits, smallest)
    ]
    assert len(values) > 2000
    assert wrong == []


@FLOATS
def test_roots_of_special_values(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, -1.0, -1e-40], dtype=dtype)
    roots = rounded_sqrt(values)
    assert roots[:3].tolist() == [0.0, 0.0, math.inf]
    assert torch.signbit(roots[:2]).tolist() == [False, True]
    assert roots[3:].isnan().all()


@FLOATS
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[::2],
        lambda x: x.view(8, -1).t(),
        lambda x: x[3],
        lambda x: x[:0],
        lambda x: torch._neg_view(-x),
        lambda x: torch.view_as_complex(torch.stack([x, x], -1)).real,
    ],
    ids=["strided", "transposed", "one number", "empty", "negative bit", "real part"],
)
def test_layouts(dtype: torch.dtype, view: object) -> None:
    values = torch.linspace(0, 3, 64, dtype=dtype)
    expected = rounded_sqrt(view(values).clone().resolve_neg())
    assert torch.equal(rounded_sqrt(view(values)), expected)
