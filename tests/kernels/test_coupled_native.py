"""Projection in the native kernels, under sanitizers: the bits of a plain loop over the header.

Threads' shares of the work are random and run in random order; every stream lies in a buffer of
exactly its size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.coupled_native import (
    CHUNK,
    FLOAT32,
    FLOAT64,
    LAYOUTS,
    Problem,
    check_a_row_whose_size_float32_would_lose,
    check_against_serial,
    check_rows_about_the_size_of_their_balls,
    pattern_of,
    row_indices,
    set_case,
)
from helpers.native_harness import (
    STREAMS,
    Command,
    Harness,
    ProjectResult,
    SetCase,
    StepCase,
    TensorCase,
)
from helpers.native_walk import ROWS, decoded, differing, make_scalars, make_tensor

from adamal_kernels import L1Ball, L2Ball, Simplex
from adamal_kernels.core.buffers import SecondMoment
from adamal_kernels.core.rows import coupled_rows
from adamal_kernels.core.storage import FORMATS
from adamal_kernels.projections import CoupledSet
from adamal_kernels.verify.oracle import TOLERANCES, nearest_point

SETS = (L2Ball, L1Ball, Simplex)


@pytest.fixture(scope="module")
def harness() -> Harness:
    return Harness()


def tensor_in(
    rng: np.random.Generator, case: StepCase, each: SetCase, *, extreme: bool, **options: Any
) -> TensorCase:
    """A tensor whose rows are of many sizes; some are not finite, some hardly move."""
    index = row_indices(each.rows)
    tensor = make_tensor(rng, case, index.size, extreme=extreme, **options)
    if FORMATS[case.format].param.itemsize == 2:
        return tensor
    factors = rng.choice([1e-3, 0.1, 1.0, 30.0], (len(index), 1))
    with np.errstate(over="ignore", invalid="ignore"):
        tensor.param[index] *= factors.astype(tensor.param.dtype)
    for value in (np.nan, np.inf, -np.inf):
        chosen = index[rng.random(len(index)) < 0.05]
        tensor.param[chosen[:, :1]] = value
    for row in index[rng.random(len(index)) < 0.1]:  # No element can move.
        tensor.exp_avg_sq[row] = np.inf
    return tensor


def size_of(cls: type[CoupledSet], layout: str) -> float:
    """A size about that of a row of random values."""
    length = coupled_rows(pattern_of(layout, torch.float32), cls(1.0, LAYOUTS[layout][2])).length
    return max(length, 1) ** 0.5 if cls is L2Ball else 0.5 * max(length, 1)


SCALARS = [*ROWS, make_scalars(lr=0.0)]


def problems(pairs: Sequence[int], layouts: Sequence[str]) -> Iterator[Problem]:
    """Buckets of a tensor a layout, of every kind of set and second moment."""
    rng = np.random.default_rng(1)
    choices = itertools.product(pairs, SETS, (False, True))
    for seed, (format, cls, extreme) in enumerate(choices):
        dtype = FORMATS[format].param
        case = StepCase(format, list(SecondMoment)[seed % 3], SCALARS, [], seed)
        sets = []
        for i, layout in enumerate(layouts):
            projection = cls(size_of(cls, layout), dim=LAYOUTS[layout][2])
            sets.append(set_case(rng, layout, dtype, projection))
            misaligned = dict.fromkeys(STREAMS, 1 + seed % 3) if i % 3 == 1 else {}
            row = (seed + i) % len(SCALARS)
            case.tensors.append(
                tensor_in(rng, case, sets[-1], extreme=extreme, row=row, misaligned=misaligned)
            )
        yield case, sets


def moved_rows(harness: Harness, problem: Problem, projected: ProjectResult) -> np.ndarray:
    """Return whether the projection moved each row of a bucket."""
    case, sets = problem
    (stepped,) = harness.step_cpu([case])
    return np.concatenate(
        [
            (before.param[index] != after.param[index]).any(axis=1)
            for before, after, index in zip(
                stepped.tensors,
                projected.tensors,
                (row_indices(each.rows) for each in sets),
                strict=True,
            )
        ]
    )


@pytest.mark.parametrize("format", range(len(FORMATS)), ids=str)
def test_every_layout(harness: Harness, format: int) -> None:
    # Of the types that only the step sees, the small ones.
    layouts = list(LAYOUTS) if format in (FLOAT32, FLOAT64) else [*LAYOUTS][:2] + [*LAYOUTS][4:7]
    buckets = list(problems([format], layouts))
    results = check_against_serial(harness, buckets)
    if format == FLOAT32:
        moved = moved_rows(harness, buckets[0], results[0])
        assert 0.1 < moved.mean() < 0.9


@pytest.mark.parametrize("format", [2, 3], ids=["bfloat16", "float16"])
def test_sixteen_bit_rows_in_and_out_of_cache(harness: Harness, format: int) -> None:
    layouts = ["rows, several items", "long rows", "columns, more than a tile", "middle"]
    check_against_serial(harness, list(problems([format], layouts)))


@pytest.mark.parametrize("cls", SETS)
def test_more_chunks_than_lanes(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, cls: type[CoupledSet]
) -> None:
    """A row whose sum takes every lane twice, searched for from 0 and from the last multiplier."""
    monkeypatch.setitem(LAYOUTS, "huge", ((33 * CHUNK + 5,), (0,), None))
    rng = np.random.default_rng(2)
    case = StepCase(FLOAT32, SecondMoment.MONOTONE, ROWS[:1], [])
    rows = coupled_rows(pattern_of("huge", torch.float32), cls(100.0))
    tensor = make_tensor(rng, case, rows.length, extreme=False)
    cold, warm = (SetCase(rows, np.array([start])) for start in (0.0, 0.02))
    problem = replace(case, tensors=[tensor, tensor]), [cold, warm]
    (result,) = check_against_serial(harness, [problem])
    assert (result.multipliers[0] > 0).all()


@pytest.mark.parametrize("cls", SETS)
def test_the_step_begins_the_search_of_a_long_row(harness: Harness, cls: type[CoupledSet]) -> None:
    """From its solution, a search takes no pass of its own."""
    rng = np.random.default_rng(6)
    case = StepCase(FLOAT32, SecondMoment.MONOTONE, ROWS[:1], [])
    rows = coupled_rows(pattern_of("long rows", torch.float32), cls(30.0, dim=1))
    case.tensors = [make_tensor(rng, case, rows.rows * rows.length, extreme=False)]

    def project(start: np.ndarray) -> ProjectResult:
        return harness.project(Command.PROJECT_CPU, [case], [[SetCase(rows, start)]])[0]

    cold = project(np.zeros(rows.rows))
    assert (cold.multipliers[0] != 0).all()
    assert cold.passes > 3
    warm = project(cold.multipliers[0])
    assert warm.passes == 2, "the step, and the writes"
    assert warm.tensors[0].param.tobytes() == cold.tensors[0].param.tobytes()


@pytest.mark.parametrize("format", [FLOAT32, FLOAT64], ids=["float32", "float64"])
@pytest.mark.parametrize("cls", [L2Ball, L1Ball])
def test_rows_about_the_size_of_their_balls(
    harness: Harness, cls: type[CoupledSet], format: int
) -> None:
    check_rows_about_the_size_of_their_balls(harness, cls, format)


@pytest.mark.parametrize("cls", [L2Ball, L1Ball])
def test_a_row_whose_size_float32_would_lose(harness: Harness, cls: type[CoupledSet]) -> None:
    check_a_row_whose_size_float32_would_lose(harness, cls)


@pytest.mark.parametrize("seed", range(3))
def test_shares_change_nothing(harness: Harness, seed: int) -> None:
    layouts = ["rows, several items", "long rows", "columns"]
    (case, sets), *_ = problems([FLOAT32], layouts)
    check_against_serial(harness, [(replace(case, seed=100 + seed), sets)])


def test_tensors_that_are_not_stepped_are_not_projected(harness: Harness) -> None:
    rng = np.random.default_rng(3)
    case = StepCase(FLOAT32, SecondMoment.AMSGRAD, [make_scalars(), make_scalars(lr=0.0)], [])
    sets = []
    for layout in ("rows", "long rows", "columns"):
        for idle in (True, False):
            each = set_case(rng, layout, torch.float32, L2Ball(1e-3, dim=LAYOUTS[layout][2]))
            tensor = make_tensor(rng, case, row_indices(each.rows).size, extreme=False, row=1)
            # The row of a tensor without gradient is not read: this one does not exist.
            case.tensors.append(replace(tensor, grad=None, row=1 << 20) if idle else tensor)
            sets.append(each)
    (result,) = harness.project(Command.PROJECT_CPU, [case], [sets])
    for tensor, found, each, multipliers in zip(
        case.tensors, result.tensors, sets, result.multipliers, strict=True
    ):
        assert found.param.tobytes() == tensor.param.tobytes()
        assert multipliers.tobytes() == each.multipliers.tobytes()
        assert (found.exp_avg.tobytes() == tensor.exp_avg.tobytes()) == (tensor.grad is None)


@pytest.mark.parametrize("cls", SETS)
@pytest.mark.parametrize(
    "layout", ["rows", "long rows", "columns", "columns, more than a tile", "outer"]
)
def test_the_point_is_the_nearest(harness: Harness, cls: type[CoupledSet], layout: str) -> None:
    """In float64, against an oracle that bisects."""
    rng = np.random.default_rng(4)
    dim = LAYOUTS[layout][2]
    case = StepCase(FLOAT64, SecondMoment.MONOTONE, ROWS[:1], [])
    each = set_case(rng, layout, torch.float64, cls(0.7, dim=dim))
    index = row_indices(each.rows)
    case.tensors = [make_tensor(rng, case, index.size, extreme=False)]
    (stepped,) = harness.step_cpu([case])
    (found,) = harness.project(Command.PROJECT_CPU, [case], [[each]])
    scalars = case.scalars[0]
    d = np.sqrt(stepped.tensors[0].exp_avg_sq) / scalars.bias2_sqrt + scalars.eps
    expected = nearest_point(stepped.tensors[0].param[index], d[index], cls(0.7, dim=1))
    rtol, atol = TOLERANCES[torch.float64][0]
    np.testing.assert_allclose(
        found.tensors[0].param[index], expected, rtol=100 * rtol, atol=100 * atol
    )


def test_rows_that_are_not_finite_are_left_alone(harness: Harness) -> None:
    rng = np.random.default_rng(5)
    case = StepCase(FLOAT32, SecondMoment.MONOTONE, ROWS[:1], [])
    sets = []
    for layout, cls in itertools.product(("rows", "long rows", "columns"), SETS):
        each = set_case(rng, layout, torch.float32, cls(0.1, dim=LAYOUTS[layout][2]))
        index = row_indices(each.rows)
        tensor = make_tensor(rng, case, index.size, extreme=False)
        tensor.param[index[0, -1]] = np.nan
        tensor.param[index[1, 0]] = np.inf
        case.tensors.append(tensor)
        sets.append(each)
    (stepped,) = harness.step_cpu([case])
    (found,) = harness.project(Command.PROJECT_CPU, [case], [sets])
    for before, after, each, multipliers in zip(
        stepped.tensors, found.tensors, sets, found.multipliers, strict=True
    ):
        index = row_indices(each.rows)
        left, projected = index[:2], index[2:]
        assert differing(after.param[left], before.param[left], torch.float32).size == 0
        assert (multipliers[:2] == 0).all()
        assert (decoded(after.param[projected], torch.float32) != before.param[projected]).any()
