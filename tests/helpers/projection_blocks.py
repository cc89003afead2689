"""The CUDA projections of cases on the host, against the twin in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adamal_kernels import L1Ball, L2Ball, Simplex
from adamal_kernels.backends.eager.sets import project, project_rows
from adamal_kernels.core.buffers import SecondMoment
from adamal_kernels.core.rows import coupled_rows
from adamal_kernels.core.scalars import StepScalars
from adamal_kernels.core.storage import FORMATS
from helpers.device_kernels import expected_case
from helpers.native_harness import DeviceCase, Harness, SetCase, StepCase, TensorCase
from helpers.native_walk import differing, expected_tensor, make_scalars, make_tensor

SETS = (L2Ball, L1Ball, Simplex)
CODES = range(len(FORMATS))

Layout = tuple[tuple[int, ...], Any]
"""A contiguous shape, and the dimensions of a row."""

SEARCH_ROUNDS = 12  # kSearchRounds in csrc/cuda/set_tables.h
SCALARS = [
    make_scalars(),
    make_scalars(step=1, weight_decay=0.1),
    make_scalars(step=1000, weight_decay=0.1, decoupled=True, maximize=True),
    make_scalars(eps=0.0, bias_correction=False),
]

SHORT: tuple[Layout, ...] = (
    ((1,), None),
    ((7,), None),
    ((0, 3), 1),
    ((5, 17), 1),
    ((300, 3), 1),
    ((40, 64), 1),
    ((3, 2049), 1),
    ((600, 1), 1),
    ((17, 5), 0),
    ((3, 300), 0),
    ((150, 9), 0),
    ((4, 33, 6), 1),
    ((4, 33, 6), (0, 2)),
    ((2, 3, 4, 5, 2), (1, 3)),
)
LONG: tuple[Layout, ...] = (
    ((16384,), None),
    ((16385,), None),
    ((2048, 8), 0),
    ((2, 16391), 1),
    ((16400, 2), 0),
    ((130, 2, 140), (0, 2)),
    ((9 * 2048,), None),
    ((5,), None),
)


def as_tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """A copy; 16-bit types come as their bits."""
    found = torch.from_numpy(array.copy())
    return found if array.dtype.kind == "f" else found.view(torch.int16).view(dtype)


def as_array(tensor: Tensor) -> np.ndarray:
    if tensor.element_size() > 2:
        return tensor.numpy()
    return tensor.view(torch.int16).numpy().view(np.uint16)


def set_case(kind: int, layout: Layout, dtype: torch.dtype, fraction: float) -> SetCase:
    """A set whose size is that part of a row of standard normal numbers."""
    shape, dim = layout
    like = torch.empty(shape, dtype=dtype)
    length = coupled_rows(like, SETS[kind](1.0, dim=dim)).length
    size = fraction * (math.sqrt(length) if kind == 0 else 0.8 * length)
    rows = coupled_rows(like, SETS[kind](max(size, 0.01), dim=dim))
    return SetCase(rows, np.zeros(rows.rows))


def bucket(
    format: int,
    moment: SecondMoment,
    layouts: Sequence[Layout],
    kind: int,
    fraction: float = 0.5,
    start: float | None = None,
) -> tuple[StepCase, list[SetCase]]:
    """Tensors with sets, misaligned in turn, every fourth with a NaN and an infinity in it.

    ``start`` is the multiplier that searches start from; None: one of several.
    """
    rng = np.random.default_rng(format)
    dtype = FORMATS[format].param
    case = StepCase(format, moment, SCALARS, [], seed=format)
    sets = []
    for i, layout in enumerate(layouts):
        numel = math.prod(layout[0])
        tensor = make_tensor(rng, case, numel, extreme=False, row=i % len(SCALARS))
        if i % 4 == 3 and numel > 1:
            param = as_tensor(tensor.param, dtype)
            param[torch.from_numpy(rng.choice(numel, 2))] = torch.tensor([math.nan, math.inf]).to(
                dtype
            )
            tensor.param = as_array(param)
        streams = ("param", "exp_avg_sq", "max_exp_avg_sq")
        tensor.misaligned = {name: i % 3 for name in streams[: 1 + i % 2]}
        case.tensors.append(tensor)
        each = set_case(kind, layout, dtype, fraction)
        starts = [0.0, 0.1, -3.0, 1e3, math.nan] if start is None else [start]
        each.multipliers[:] = rng.choice(starts, each.rows.rows)
        sets.append(each)
    return case, sets


def projected(case: StepCase, tensor: TensorCase, each: SetCase) -> tuple[TensorCase, np.ndarray]:
    """What the step, by the formula in numpy, and then the twin make of a tensor."""
    if tensor.grad is None:
        return tensor, each.multipliers
    dtypes = FORMATS[case.format]
    stepped = expected_tensor(case, tensor)
    if each.rows.rows * each.rows.length == 0:
        return stepped, each.multipliers
    moment = stepped.exp_avg_sq if stepped.max_exp_avg_sq is None else stepped.max_exp_avg_sq
    param = as_tensor(stepped.param, dtypes.param)
    multipliers = torch.from_numpy(each.multipliers.copy())
    compute = dtypes.compute
    scalars = StepScalars(*(torch.tensor(s, dtype=compute) for s in case.scalars[tensor.row]))
    moment = torch.from_numpy(moment)
    project(param, moment, multipliers, each.rows, scalars, compute=compute)
    return replace(stepped, param=as_array(param)), multipliers.numpy()


def check_projected(
    harness: Harness,
    cases: Sequence[tuple[StepCase, list[SetCase]]],
    devices: Sequence[DeviceCase | None] | None = None,
    **options: bool,
) -> int:
    """Compare to the bit; return how many tensors the projection has changed."""
    devices = devices or [None] * len(cases)
    results = harness.project_cuda(*zip(*cases, strict=True), devices, **options)
    changed = 0
    for (case, sets), device, result in zip(cases, devices, results, strict=True):
        same = case if device is None else expected_case(case, device)
        dtypes = FORMATS[case.format]
        for i, (tensor, each) in enumerate(zip(same.tensors, sets, strict=True)):
            expected, multipliers = projected(same, tensor, each)
            for name in ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
                if getattr(tensor, name) is None:
                    continue
                dtype = dtypes.param if name == "param" else dtypes.compute
                ours, theirs = getattr(result.tensors[i], name), getattr(expected, name)
                wrong = differing(ours, theirs, dtype)
                assert wrong.size == 0, (
                    f"{dtypes}, tensor {i}, {each.rows}: {name} differs at {wrong[:8]}: "
                    f"{ours[wrong[:8]]}, expected {theirs[wrong[:8]]}"
                )
            assert multipliers.tobytes() == result.multipliers[i].tobytes(), (i, each.rows)
            stepped = expected_tensor(same, tensor).param
            changed += differing(expected.param, stepped, dtypes.param).size > 0
    return changed


def check_short_rows(harness: Harness, kind: int) -> None:
    """Every format, rows in every layout."""
    moments = list(SecondMoment)
    cases = [bucket(format, moments[format % 3], SHORT, kind) for format in CODES]
    assert check_projected(harness, cases) >= 10 * len(cases)


def check_long_rows(harness: Harness, kind: int, format: int) -> None:
    """Rows of one block and of several, whole tensors and parts of them, in one bucket."""
    moment = SecondMoment.AMSGRAD if kind == 0 else SecondMoment.MONOTONE
    assert check_projected(harness, [bucket(format, moment, LONG, kind)]) >= 6


def evaluations(case: StepCase, each: SetCase) -> int:
    """How often the twin evaluates the first tensor's set."""
    taken = []

    def count(sums: Tensor) -> Tensor:
        taken.append(sums.shape[1])
        return sums

    stepped = expected_tensor(case, case.tensors[0])
    y, v = (torch.from_numpy(a).double()[None] for a in (stepped.param, stepped.exp_avg_sq))
    scalars = case.scalars[case.tensors[0].row]
    d = v.float().sqrt().double() / np.float32(scalars.bias2_sqrt) + np.float32(scalars.eps)
    project_rows(y, d, torch.from_numpy(each.multipliers), each.rows, 2048, count)
    return taken.count(2)


def check_long_searches(harness: Harness, length: int) -> None:
    """More evaluations than there are pairs of kernels for: one block ends the search."""
    case, (each,) = bucket(0, SecondMoment.MONOTONE, [((length,), None)], 1, 1e-3, start=0.0)
    rng = np.random.default_rng(0)
    # Breakpoints over many powers of ten: Newton's method passes them one after another.
    tensor = case.tensors[0]
    tensor.param = np.float32(10) ** rng.uniform(-15, 15, length).astype(np.float32)
    tensor.grad = np.zeros(length, np.float32)
    tensor.exp_avg = np.zeros(length, np.float32)
    tensor.exp_avg_sq = np.float32(10) ** rng.uniform(-30, 30, length).astype(np.float32)
    assert evaluations(case, each) > SEARCH_ROUNDS + 1
    assert check_projected(harness, [(case, [each])]) == 1
