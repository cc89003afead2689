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
from native_harness import (
    STREAMS,
    Command,
    Harness,
    ProjectResult,
    SetCase,
    StepCase,
    TensorCase,
)
from test_native_walk import ROWS, decoded, differing, make_scalars, make_tensor

from adamal_kernels import L1Ball, L2Ball, Simplex
from adamal_kernels.buffers import SecondMoment
from adamal_kernels.coupled import coupled_rows
from adamal_kernels.dtypes import DTYPE_PAIRS, compute_dtype
from adamal_kernels.oracle import TOLERANCES, nearest_point
from adamal_kernels.projections import CoupledSet

SETS = (L2Ball, L1Ball, Simplex)
FLOAT32, FLOAT64 = 0, 1  # pairs
STARTS = (0.0, -0.0, 0.3, 1e5, -1.0, np.nan, np.inf)
"""Multipliers of last steps, and what a checkpoint may hold instead."""

CHUNK = 16384  # kCpuChunk
LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Any]] = {
    # shape, order of the dimensions in memory, dim
    "number": ((), (), None),
    "whole": ((1000,), (0,), None),
    "whole, a chunk": ((CHUNK,), (0,), None),
    "whole, a chunk and one": ((CHUNK + 1,), (0,), None),
    "one row": ((1, 100), (0, 1), 1),
    "rows": ((40, 100), (0, 1), 1),
    "rows of 1": ((50, 1), (0, 1), 1),
    "rows, several items": ((5000, 7), (0, 1), 1),
    "rows of chunks of sums": ((9, 4097), (0, 1), 1),
    "rows, one an item": ((2, CHUNK), (0, 1), 1),
    "long rows": ((3, CHUNK + 1), (0, 1), 1),
    "columns": ((30, 37), (0, 1), 0),
    "columns, more than a tile": ((8200, 18), (0, 1), 0),
    "one column": ((70, 1), (0, 1), 0),
    "middle": ((4, 5, 21), (0, 1, 2), 1),
    "outer": ((4, 5, 6), (0, 1, 2), (0, 2)),
    "channels last, filters": ((3, 4, 2, 5), (0, 2, 3, 1), (1, 2, 3)),
    "channels last, channels": ((3, 4, 2, 5), (0, 2, 3, 1), 1),
    "shuffled": ((3, 4, 2, 5), (2, 0, 3, 1), (0, 1)),
    "no rows": ((0, 5), (0, 1), 1),
}


@pytest.fixture(scope="module")
def harness() -> Harness:
    return Harness()


def pattern_of(layout: str, dtype: torch.dtype) -> torch.Tensor:
    shape, order, _ = LAYOUTS[layout]
    inverse = [order.index(dim) for dim in range(len(order))]
    return torch.empty([shape[dim] for dim in order], dtype=dtype).permute(inverse)


def set_case(
    rng: np.random.Generator, layout: str, dtype: torch.dtype, projection: CoupledSet
) -> SetCase:
    rows = coupled_rows(pattern_of(layout, dtype), projection)
    return SetCase(rows, rng.choice(np.array(STARTS), rows.rows))


def row_indices(rows: Any) -> np.ndarray:
    """Return where in memory the elements of each row lie: ``[rows, length]``."""
    runs = (*rows.kept, *rows.reduced)
    numel = rows.rows * rows.length
    strided = torch.arange(numel).as_strided([size for size, _ in runs], [step for _, step in runs])
    return strided.reshape(rows.rows, rows.length).numpy()


def tensor_in(
    rng: np.random.Generator, case: StepCase, each: SetCase, *, extreme: bool, **options: Any
) -> TensorCase:
    """A tensor whose rows are of many sizes; some are not finite, some hardly move."""
    index = row_indices(each.rows)
    tensor = make_tensor(rng, case, index.size, extreme=extreme, **options)
    if DTYPE_PAIRS[case.pair].param.itemsize == 2:
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


Problem = tuple[StepCase, list[SetCase]]
SCALARS = [*ROWS, make_scalars(lr=0.0)]


def problems(pairs: Sequence[int], layouts: Sequence[str]) -> Iterator[Problem]:
    """Buckets of a tensor a layout, of every kind of set and second moment."""
    rng = np.random.default_rng(1)
    choices = itertools.product(pairs, SETS, (False, True))
    for seed, (pair, cls, extreme) in enumerate(choices):
        dtype = DTYPE_PAIRS[pair].param
        case = StepCase(pair, list(SecondMoment)[seed % 3], SCALARS, [], seed)
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


def check_against_serial(harness: Harness, problems: Sequence[Problem]) -> list[ProjectResult]:
    cases, sets = zip(*problems, strict=True)
    expected = harness.project(Command.PROJECT_SERIALLY, cases, sets)
    found = harness.project(Command.PROJECT_CPU, cases, sets)
    for case, of_case, result, wanted in zip(cases, sets, found, expected, strict=True):
        dtypes = DTYPE_PAIRS[case.pair]
        for i, each in enumerate(of_case):
            where = f"{dtypes}, tensor {i}: {each.rows}"
            assert result.multipliers[i].tobytes() == wanted.multipliers[i].tobytes(), where
            for name in STREAMS:
                after = getattr(result.tensors[i], name)
                if name == "grad" or after is None:
                    continue
                dtype = dtypes.param if name == "param" else compute_dtype(dtypes.param)
                wrong = differing(after, getattr(wanted.tensors[i], name), dtype)
                assert wrong.size == 0, f"{where}: {name} differs at {wrong[:8]}"
    return expected


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


@pytest.mark.parametrize("pair", range(len(DTYPE_PAIRS)), ids=str)
def test_every_layout(harness: Harness, pair: int) -> None:
    # Of the types that only the step sees, the small ones.
    layouts = list(LAYOUTS) if pair in (FLOAT32, FLOAT64) else [*LAYOUTS][:2] + [*LAYOUTS][4:7]
    buckets = list(problems([pair], layouts))
    results = check_against_serial(harness, buckets)
    if pair == FLOAT32:
        moved = moved_rows(harness, buckets[0], results[0])
        assert 0.1 < moved.mean() < 0.9


@pytest.mark.parametrize("pair", [2, 3], ids=["bfloat16", "float16"])
def test_sixteen_bit_rows_in_and_out_of_cache(harness: Harness, pair: int) -> None:
    layouts = ["rows, several items", "long rows", "columns, more than a tile", "middle"]
    check_against_serial(harness, list(problems([pair], layouts)))


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


@pytest.mark.parametrize("pair", [FLOAT32, FLOAT64], ids=["float32", "float64"])
@pytest.mark.parametrize("cls", [L2Ball, L1Ball])
def test_rows_about_the_size_of_their_balls(
    harness: Harness, cls: type[CoupledSet], pair: int
) -> None:
    """Rows that were inside, of which a bound tells some to be so still."""
    rng = np.random.default_rng(7)
    dtype = DTYPE_PAIRS[pair].param
    tiny, huge = torch.finfo(dtype).tiny * 1e-4, torch.finfo(dtype).max ** 0.8
    # The third is within the tolerance of float32.
    beyond = [1e-5, -1e-5, 5e-8, 1e-3, -1e-3, -1e-2]
    case = StepCase(pair, SecondMoment.MONOTONE, [make_scalars(lr=1e-30)], [])
    sets, expected = [], []
    layouts = ("rows", "rows of chunks of sums", "long rows")
    for layout, size in itertools.product(layouts, (1.0, tiny, huge)):
        each = set_case(rng, layout, dtype, cls(size, dim=1))
        index = row_indices(each.rows)
        tensor = make_tensor(rng, case, index.size, extreme=False)
        excess = np.array([beyond[row % len(beyond)] for row in range(len(index))])
        values = rng.uniform(0.5, 1.0, index.shape)
        norms = np.linalg.norm(values, ord=2 if cls is L2Ball else 1, axis=1)
        scaled = values / norms[:, None] * (size * (1 + excess))[:, None]
        tensor.param[index] = scaled.astype(tensor.param.dtype)
        case.tensors.append(replace(tensor, grad=np.zeros_like(tensor.grad)))
        sets.append(replace(each, multipliers=np.zeros(len(index))))
        # Tiny elements are rounded by more than what they are beyond; squares beyond float64 are
        # no sizes.
        is_exact = size != tiny and (size != huge or pair == FLOAT32)
        expected.append(excess > each.rows.tolerance if is_exact else None)
    check_against_serial(harness, [(case, sets)])
    (found,) = harness.project(Command.PROJECT_CPU, [case], [sets])
    for multipliers, is_beyond in zip(found.multipliers, expected, strict=True):
        assert is_beyond is None or ((multipliers > 0) == is_beyond).all()


@pytest.mark.parametrize("cls", [L2Ball, L1Ball])
def test_a_row_whose_size_float32_would_lose(harness: Harness, cls: type[CoupledSet]) -> None:
    """A few elements of 1, and many that each are less than half of their last place."""
    case = StepCase(FLOAT32, SecondMoment.MONOTONE, [make_scalars(lr=1e-30)], [])
    values = np.full(CHUNK, 5e-8 if cls is L1Ball else 5e-8**0.5)
    values[:32] = 1
    size = np.linalg.norm(values, ord=2 if cls is L2Ball else 1) / (1 + 1e-5)
    rows = coupled_rows(pattern_of("rows, one an item", torch.float32), cls(float(size), dim=1))
    tensor = make_tensor(np.random.default_rng(8), case, 2 * CHUNK, extreme=False)
    tensor.param[:] = np.tile(values, 2)
    case.tensors = [replace(tensor, grad=np.zeros_like(tensor.grad))]
    (result,) = check_against_serial(harness, [(case, [SetCase(rows, np.zeros(2))])])
    assert (result.multipliers[0] > 0).all()


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
