"""Cases of native projections, and a plain loop over the header to compare them with."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from adamal_kernels import L1Ball, L2Ball
from adamal_kernels.core.buffers import SecondMoment
from adamal_kernels.core.rows import coupled_rows
from adamal_kernels.core.storage import FORMATS, compute_dtype
from adamal_kernels.projections import CoupledSet
from helpers.native_harness import (
    STREAMS,
    Command,
    Harness,
    ProjectResult,
    SetCase,
    StepCase,
)
from helpers.native_walk import differing, make_scalars, make_tensor

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


Problem = tuple[StepCase, list[SetCase]]


def check_against_serial(harness: Harness, problems: Sequence[Problem]) -> list[ProjectResult]:
    cases, sets = zip(*problems, strict=True)
    expected = harness.project(Command.PROJECT_SERIALLY, cases, sets)
    found = harness.project(Command.PROJECT_CPU, cases, sets)
    for case, of_case, result, wanted in zip(cases, sets, found, expected, strict=True):
        dtypes = FORMATS[case.format]
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


def check_rows_about_the_size_of_their_balls(
    harness: Harness, cls: type[CoupledSet], format: int
) -> None:
    """Rows that were inside, of which a bound tells some to be so still."""
    rng = np.random.default_rng(7)
    dtype = FORMATS[format].param
    tiny, huge = torch.finfo(dtype).tiny * 1e-4, torch.finfo(dtype).max ** 0.8
    # The third is within the tolerance of float32.
    beyond = [1e-5, -1e-5, 5e-8, 1e-3, -1e-3, -1e-2]
    case = StepCase(format, SecondMoment.MONOTONE, [make_scalars(lr=1e-30)], [])
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
        is_exact = size != tiny and (size != huge or format == FLOAT32)
        expected.append(excess > each.rows.tolerance if is_exact else None)
    check_against_serial(harness, [(case, sets)])
    (found,) = harness.project(Command.PROJECT_CPU, [case], [sets])
    for multipliers, is_beyond in zip(found.multipliers, expected, strict=True):
        assert is_beyond is None or ((multipliers > 0) == is_beyond).all()


def check_a_row_whose_size_float32_would_lose(harness: Harness, cls: type[CoupledSet]) -> None:
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
