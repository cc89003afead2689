"""The sets: bounds rounded inward, what is refused, and what a checkpoint holds of them."""

from __future__ import annotations

import dataclasses
import functools
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.property_testing import assume, given, st

from adamal_kernels import Box, L1Ball, L2Ball, NonNegative, Simplex
from adamal_kernels.projections import Projection, projection_from_dict, projection_to_dict

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Of every size, with most of them where 16-bit types are dense, or beyond their range.
BOUNDS = st.one_of(
    st.floats(-2, 2),
    st.floats(-1e5, 1e5),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1.0, 1 + 2.0**-52, 65504.0, 65520.0, 1e-8, 1e-40, -1e-50, 3.4e38]),
)


@functools.cache
def all_numbers(dtype: torch.dtype) -> torch.Tensor:
    """Return every finite number of a 16-bit type, in ascending order."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).double()
    return numbers[numbers.isfinite()].unique()


def smallest_not_below(value: float, dtype: torch.dtype) -> float:
    """Return the smallest finite number of ``dtype`` that is ``>= value``; inf if there is none."""
    if dtype == torch.float64:
        return value
    if dtype == torch.float32:
        with np.errstate(over="ignore"):
            near = np.float32(value)
        if float(near) < value:
            near = np.nextafter(near, np.float32(np.inf))
        return float(near)
    numbers = all_numbers(dtype)
    index = int(torch.searchsorted(numbers, torch.tensor(value, dtype=torch.float64)))
    return numbers[index].item() if index < len(numbers) else math.inf


@given(BOUNDS, BOUNDS, st.sampled_from(DTYPES))
def test_bounds_are_the_nearest_inside(lo: float, hi: float, dtype: torch.dtype) -> None:
    assume(lo <= hi)
    lower, upper = smallest_not_below(lo, dtype), -smallest_not_below(-hi, dtype)
    if lower > upper:
        with pytest.raises(ValueError, match="holds no"):
            Box(lo, hi).bounds(dtype)
        return
    found = Box(lo, hi).bounds(dtype)
    assert found == (lower, upper)
    assert Box(*found).bounds(dtype) == found


@given(BOUNDS, st.sampled_from(DTYPES))
def test_one_sided_bounds(bound: float, dtype: torch.dtype) -> None:
    lower = smallest_not_below(bound, dtype)
    if lower == math.inf:
        with pytest.raises(ValueError, match="holds no"):
            Box(bound, math.inf).bounds(dtype)
        with pytest.raises(ValueError, match="holds no"):
            Box(-math.inf, -bound).bounds(dtype)
        return
    assert Box(bound, math.inf).bounds(dtype) == (lower, math.inf)
    assert Box(-math.inf, -bound).bounds(dtype) == (-math.inf, -lower)


@given(BOUNDS, BOUNDS, st.sampled_from(DTYPES))
def test_a_zero_bound_is_positive_zero(lo: float, hi: float, dtype: torch.dtype) -> None:
    """Equal bounds clamp to equal bits."""
    assume(lo <= hi)
    try:
        found = Box(lo, hi).bounds(dtype)
    except ValueError:
        return
    assert [math.copysign(1, bound) for bound in found if bound == 0] in ([], [1], [1, 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_and_unbounded(dtype: torch.dtype) -> None:
    assert Box(-1, 0.5).bounds(dtype) == (-1.0, 0.5)
    assert Box(2, 2).bounds(dtype) == (2.0, 2.0)
    assert Box(-math.inf, math.inf).bounds(dtype) == (-math.inf, math.inf)
    assert NonNegative().bounds(dtype) == (0.0, math.inf)


@pytest.mark.parametrize(
    ("dtype", "bound", "expected"),
    [
        (torch.bfloat16, 0.3, 0.298828125),
        (torch.float16, 0.3, 0.2998046875),
        (torch.float32, 0.3, 0.29999998211860657),
        (torch.float64, 0.3, 0.3),
        (torch.float16, 1e6, 65504.0),
        (torch.bfloat16, 1e-41, 0.0),
    ],
)
def test_upper_bound_examples(dtype: torch.dtype, bound: float, expected: float) -> None:
    assert Box(-1, bound).bounds(dtype) == (-1.0, expected)
    assert Box(-bound, 1).bounds(dtype) == (-expected, 1.0)


def test_a_box_between_two_numbers_of_the_type() -> None:
    box = Box(1.0001, 1.0002)
    assert box.bounds(torch.float64) == (1.0001, 1.0002)
    with pytest.raises(ValueError, match=r"Box\(lo=1\.0001, hi=1\.0002\) holds no torch\.bfloat16"):
        box.bounds(torch.bfloat16)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Box(1, -1), ValueError, ["lo=1.0", "hi=-1.0", "Box(-1.0, 1.0)"]),
        (lambda: Box(math.nan, 1), ValueError, ["lo is NaN", "-math.inf"]),
        (lambda: Box(0, math.nan), ValueError, ["hi is NaN", "math.inf"]),
        (lambda: Box(math.inf, math.inf), ValueError, ["no finite number", "lo=inf"]),
        (lambda: Box(-math.inf, -math.inf), ValueError, ["no finite number", "hi=-inf"]),
        (lambda: Box("0", 1), TypeError, ["lo must be a number", "'0'"]),
        (lambda: Box(0, None), TypeError, ["hi must be a number", "None"]),
        (lambda: Box(True, 1), TypeError, ["lo must be a number", "True"]),
        (lambda: Box(torch.zeros(2), 1), TypeError, ["lo must be a number", "element"]),
        (lambda: Box(0, 10**400), ValueError, ["hi"]),
    ],
    ids=lambda value: None,
)
def test_box_refuses(make: Callable[[], Box], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        make()
    assert [word for word in ["Box", *words] if word not in str(caught.value)] == []


@pytest.mark.parametrize("cls", [L1Ball, L2Ball, Simplex])
@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((0,), ValueError, ["> 0", "0"]),
        ((-1.0,), ValueError, ["> 0", "-1.0", "projection=None"]),
        ((math.inf,), ValueError, ["finite", "inf"]),
        ((math.nan,), ValueError, ["finite", "nan"]),
        ((10**400,), ValueError, ["finite"]),
        (("1",), TypeError, ["number", "'1'"]),
        ((True,), TypeError, ["number", "True"]),
        ((1.0, 1.5), TypeError, ["dim", "1.5"]),
        ((1.0, True), TypeError, ["dim", "True"]),
        ((1.0, (0, None)), TypeError, ["dim", "None"]),
        ((1.0, ()), ValueError, ["dim", "None is the whole tensor"]),
    ],
    ids=str,
)
def test_coupled_sets_refuse(
    cls: type, arguments: tuple[Any, ...], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as caught:
        cls(*arguments)
    assert [word for word in [cls.__name__, *words] if word not in str(caught.value)] == []


SETS = [Box(-1, 0.3), Box(-math.inf, 2), Box(0, math.inf), NonNegative()]
SETS += [L2Ball(2), L1Ball(0.5, dim=-1), Simplex(), Simplex(3.0, dim=(1, 2))]


@pytest.mark.parametrize("projection", SETS, ids=repr)
def test_dict_round_trip(projection: Projection) -> None:
    saved = projection_to_dict(projection)
    assert saved["set"] == type(projection).__name__
    assert {type(value) for value in saved.values()} <= {str, float, int, list, type(None)}
    assert projection_from_dict(saved) == projection


@pytest.mark.parametrize("projection", SETS, ids=repr)
def test_sets_are_values(projection: Projection) -> None:
    assert pickle.loads(pickle.dumps(projection)) == projection
    assert hash(dataclasses.replace(projection)) == hash(projection)
    with pytest.raises(dataclasses.FrozenInstanceError):
        projection.lo = projection.dim = 5.0


def test_equality_is_of_values() -> None:
    assert Box(0, 1) == Box(0.0, 1.0) == Box(-0.0, 1)
    assert Box(0, math.inf) != NonNegative()


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ({"set": "Ball"}, ["'Ball'", "Box", "NonNegative"]),
        ({"lo": 0.0, "hi": 1.0}, ["None", "Box"]),
        ({"set": ["Box"]}, ["['Box']"]),
        ({"set": "Box", "lo": 0.0}, ["Box", "'hi'", "'lo'"]),
        ({"set": "NonNegative", "lo": 0.0}, ["NonNegative", "'lo'"]),
    ],
    ids=str,
)
def test_from_dict_refuses(saved: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match="projection") as caught:
        projection_from_dict(saved)
    assert [word for word in words if word not in str(caught.value)] == []


def test_numpy_s_numbers_are_numbers() -> None:
    assert L2Ball(np.float32(2.0), dim=np.int64(1)) == L2Ball(2.0, dim=1)
    assert type(L2Ball(1.0, dim=(np.int64(0),)).dim[0]) is int
    assert Box(np.float32(0), np.int64(1)) == Box(0, 1)
