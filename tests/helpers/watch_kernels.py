"""Watched native steps, and the eager formula of what they record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from adamal_kernels.backends.eager.watch import record_steps
from adamal_kernels.core.buffers import SecondMoment
from adamal_kernels.core.scalars import StepScalars
from adamal_kernels.core.stats import WORDS, Record, unpacked
from adamal_kernels.core.storage import FORMATS
from helpers.native_harness import Array, Command, Harness, StepCase, TensorCase
from helpers.native_walk import check, expected_tensor, make_scalars, make_tensor

SIZES = (0, 1, 7, 9, 1024, 1025, 2048, 2051, 16384, 16385 + 64)
COMMANDS = (Command.WATCHED_CPU, Command.WATCHED_CUDA, Command.WATCHED_ON_DEVICE)


def new_records(count: int) -> torch.Tensor:
    """Records of ``count`` items that no step has been kept in."""
    words = torch.zeros(count, WORDS, dtype=torch.int64)
    words[:, 1] = -1
    words[:, 3:] = torch.tensor(float("nan"), dtype=torch.float64).view(torch.int64)
    return words


def item_elements(command: Command, format: int, harness: Harness) -> int:
    info = harness.info()
    return info.cpu_chunk if command == Command.WATCHED_CPU else info.cuda_chunks[format]


def rounded(scalars: Sequence[StepScalars], real: torch.dtype) -> list[StepScalars]:
    table = torch.tensor([list(row) for row in scalars], dtype=torch.float64).to(real)
    return [StepScalars(*row.unbind()) for row in table.unbind()]


def denominators(case: StepCase, tensor: TensorCase) -> torch.Tensor:
    amsgrad = case.second_moment == SecondMoment.AMSGRAD
    return torch.from_numpy(tensor.max_exp_avg_sq if amsgrad else tensor.exp_avg_sq)


def expected_records(case: StepCase, before: torch.Tensor, tensor: TensorCase) -> torch.Tensor:
    """The one record of all of a tensor after its step."""
    expected = expected_tensor(case, tensor)
    compute = FORMATS[case.format].compute
    (row,) = rounded([case.scalars[tensor.row]], compute)
    record = before.clone()
    old, new = denominators(case, tensor), denominators(case, expected)
    record_steps([record], [old], [new], [row], compute, None)
    return record


def combined(records: Array) -> list[object]:
    """What the records of a tensor's items come to together; NaN as None."""
    r = Record(*(column.numpy() for column in unpacked(torch.from_numpy(records))))
    assert len(set(r.steps.tolist())) == 1
    since = r.steps_since_growth[r.steps_since_growth >= 0]
    values = [
        r.smallest_denominator.min(),
        r.largest_denominator.max(),
        r.least_budget_change.min(),
        r.step_size[0],
        r.budget_scale[0],
        r.budget_offset[0],
    ]
    counts = [int(r.steps[0]), int(since.min()) if since.size else -1, int(r.grown.sum())]
    return [*counts, *(None if np.isnan(value) else float(value) for value in values)]


def check_steps(
    harness: Harness, command: Command, cases: list[StepCase], steps: Sequence[StepScalars]
) -> None:
    """Take some steps of each case, and compare tensors and records after each."""
    items = [item_elements(command, case.format, harness) for case in cases]
    records = [
        [new_records(-(-t.param.size // item)).numpy() for t in case.tensors]
        for case, item in zip(cases, items, strict=True)
    ]
    expected = [[new_records(1) for _ in case.tensors] for case in cases]
    for scalars in steps:
        cases = [replace(case, scalars=[scalars]) for case in cases]
        found = harness.watched(command, cases, records)
        records = [of_case for of_case, _ in found]
        results = [replace(c, tensors=t) for c, (_, t) in zip(cases, found, strict=True)]
        check(cases, results)
        for i, (case, result) in enumerate(zip(cases, results, strict=True)):
            for j, tensor in enumerate(case.tensors):
                if tensor.param.size == 0:
                    continue
                if tensor.grad is not None:
                    expected[i][j] = expected_records(case, expected[i][j], tensor)
                wanted = combined(expected[i][j].numpy())
                assert combined(records[i][j]) == wanted, (
                    FORMATS[case.format],
                    SecondMoment(case.second_moment).name,
                    tensor.param.size,
                )
            cases[i] = replace(
                case,
                tensors=[
                    replace(new, grad=old.grad)
                    for new, old in zip(result.tensors, case.tensors, strict=True)
                ],
            )


def made(format: int, second_moment: SecondMoment, *, extreme: bool) -> StepCase:
    rng = np.random.default_rng(format)
    case = StepCase(format, second_moment, [], [], seed=format)
    for i, size in enumerate(SIZES):
        tensor = make_tensor(rng, case, size, extreme=extreme, misaligned={"grad": i % 2})
        case.tensors.append(replace(tensor, grad=None) if i == 3 else tensor)
    return case


LEARNING_RATES = (0.1, 0.1, 0.0, 0.2, 0.1)
STEPS = [make_scalars(step=t, lr=lr) for t, lr in enumerate(LEARNING_RATES, 1)]


def check_records_are_those_of_the_eager_formula(harness: Harness, command: Command) -> None:
    cases = [made(0, second_moment, extreme=False) for second_moment in SecondMoment]
    cases += [made(1, SecondMoment.MONOTONE, extreme=False)]
    check_steps(harness, command, cases, STEPS)


def check_records_of_every_type_and_of_extremes(harness: Harness, command: Command) -> None:
    cases = [
        made(format, second_moment, extreme=True)
        for format in (0, 1, 2, 7)
        for second_moment in SecondMoment
    ]
    check_steps(harness, command, cases, [make_scalars(), make_scalars(step=4, eps=0.0)])
