"""What watched native kernels record, against the eager formula, under sanitizers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers.native_harness import Command, Harness, StepCase
from helpers.native_walk import make_scalars, make_tensor
from helpers.watch_kernels import (
    COMMANDS,
    check_records_are_those_of_the_eager_formula,
    check_records_of_every_type_and_of_extremes,
    check_steps,
    made,
)

from adamal_kernels.core.buffers import SecondMoment


@pytest.fixture(scope="module")
def harness() -> Harness:
    return Harness()


@pytest.mark.parametrize("command", COMMANDS)
def test_records_are_those_of_the_eager_formula(harness: Harness, command: Command) -> None:
    check_records_are_those_of_the_eager_formula(harness, command)


@pytest.mark.parametrize("command", COMMANDS)
def test_records_of_every_type_and_of_extremes(harness: Harness, command: Command) -> None:
    check_records_of_every_type_and_of_extremes(harness, command)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("large", [math.inf, math.nan, 1e6])
@pytest.mark.parametrize("first_lr", [0.1, 1e-39])
def test_a_v_that_stands_still_beside_what_is_not_finite(
    harness: Harness, command: Command, large: float, first_lr: float
) -> None:
    """A ``v``, or the budget of the last step."""
    case = made(0, SecondMoment.MONOTONE, extreme=False)
    for tensor in case.tensors:
        tensor.exp_avg_sq[:] = np.linspace(1e6, 2e6, tensor.exp_avg_sq.size)
        tensor.exp_avg_sq[tensor.exp_avg_sq.size // 2 :][:1] = large
    # A budget that falls, the more so the larger v is.
    steps = [make_scalars(step=1, lr=first_lr), make_scalars(step=2, lr=0.4)]
    check_steps(harness, command, [case], steps)


@pytest.mark.parametrize("command", COMMANDS)
def test_more_tensors_than_a_launch_holds(harness: Harness, command: Command) -> None:
    rng = np.random.default_rng(0)
    case = StepCase(0, SecondMoment.MONOTONE, [], [])
    case.tensors = [make_tensor(rng, case, 1, extreme=False) for _ in range(4200)]
    check_steps(harness, command, [case], [make_scalars()])
