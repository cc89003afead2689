"""The CUDA projections on the host, under sanitizers, against the twin in PyTorch, bit for bit.

Blocks, and the threads of each phase, run in random order; every stream and every table lies in a
buffer of exactly its size.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from helpers.device_kernels import INPUTS, OTHERS
from helpers.native_harness import DeviceCase, Harness
from helpers.native_walk import make_scalars
from helpers.projection_blocks import (
    LONG,
    SCALARS,
    SETS,
    SHORT,
    bucket,
    check_long_rows,
    check_long_searches,
    check_projected,
    check_short_rows,
)

from adamal_kernels.core.buffers import SecondMoment

COUNTS = np.array([0, 3, 1000, 7, 2**24], np.float32)


@pytest.fixture(scope="module")
def harness() -> Harness:
    return Harness()


kinds = pytest.mark.parametrize("kind", range(3), ids=lambda kind: SETS[kind].__name__)


@kinds
def test_short_rows(harness: Harness, kind: int) -> None:
    check_short_rows(harness, kind)


@kinds
@pytest.mark.parametrize("format", [0, 1, 2])
def test_long_rows(harness: Harness, kind: int, format: int) -> None:
    check_long_rows(harness, kind, format)


def test_sizes_that_no_step_has_added(harness: Harness) -> None:
    case = bucket(0, SecondMoment.MONOTONE, LONG, 2)
    assert check_projected(harness, [case], step_adds_sizes=False) >= 6


def test_a_row_of_more_chunks_than_lanes(harness: Harness) -> None:
    """The first lane adds two chunks, the last of which is short."""
    case = bucket(0, SecondMoment.MONOTONE, [((256 * 2048 + 7,), None)], 0, start=0.0)
    assert check_projected(harness, [case]) == 1


@pytest.mark.parametrize("length", [500, 16400])
def test_long_searches(harness: Harness, length: int) -> None:
    check_long_searches(harness, length)


@pytest.mark.parametrize("kind", [0, 1], ids=["L2Ball", "L1Ball"])
def test_what_lies_in_the_set_is_left_alone(harness: Harness, kind: int) -> None:
    case = bucket(0, SecondMoment.MONOTONE, [*SHORT, *LONG], kind, 1e3)
    assert check_projected(harness, [case]) == 0


@kinds
@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_tensors_at_rest(harness: Harness, kind: int, on_device: bool) -> None:
    """No gradient, or a learning rate of 0: neither points nor multipliers change."""
    layouts = [((40, 64), 1), ((16400,), None), ((40, 64), 1), ((16400,), None), ((2, 16391), 1)]
    case, sets = bucket(0, SecondMoment.MONOTONE, layouts, kind)
    case.scalars = [make_scalars(lr=0.0), make_scalars()]
    rows = [0, 0, 1, 1, 0]
    case.tensors = [replace(t, row=row) for t, row in zip(case.tensors, rows, strict=True)]
    for i in (2, 3):
        case.tensors[i] = replace(case.tensors[i], grad=None)
    device = DeviceCase((OTHERS[1]._replace(lower=-math.inf, upper=math.inf), OTHERS[0]), COUNTS)
    assert check_projected(harness, [(case, sets)], [device if on_device else None]) == 0


@pytest.mark.parametrize("name", ["none", "scaled and clipped", "found inf", "NaN norm"])
def test_scalars_of_the_device(harness: Harness, name: str) -> None:
    cases = [
        bucket(format, SecondMoment.MONOTONE, [*LONG[:2], *SHORT[4:7]], kind)
        for kind, format in enumerate((0, 1, 3))
    ]
    devices = [DeviceCase((OTHERS[0],) * len(SCALARS), COUNTS, **INPUTS[name]) for _ in cases]
    changed = check_projected(harness, cases, devices)
    assert (changed == 0) == (name in ("found inf", "NaN norm"))


def test_buckets_of_several_launches(harness: Harness) -> None:
    case = bucket(0, SecondMoment.PLAIN, [((3,), None)] * 700, 1)
    assert check_projected(harness, [case]) > 300


@kinds
def test_an_infinite_metric_ends_the_search(harness: Harness, kind: int) -> None:
    """Gradients whose squares overflow leave finite points in a metric that is infinite."""
    case, sets = bucket(0, SecondMoment.MONOTONE, [((20, 16), 1), ((16400,), None)], kind)
    for tensor in case.tensors:
        tensor.grad = np.full_like(tensor.grad, 1e20)
    check_projected(harness, [(case, sets)])
