"""The native kernels against an independent numpy formula, bit for bit, under sanitizers.

``step_cpu`` takes its items, and the CUDA walk its blocks and threads, in random order; every
stream lies in a buffer of exactly its size.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.native_harness import (
    Harness,
    HarnessError,
    Info,
    StepCase,
)
from helpers.native_walk import (
    BACKENDS,
    PATTERNS,
    ROWS,
    SIXTEEN_BIT,
    at_rest,
    check,
    check_cuda_walk_does_not_store_what_did_not_change,
    check_encode,
    check_formula,
    check_launches_split_where_their_parameters_are_full,
    check_misaligned_streams,
    check_scalars_are_those_of_python,
    check_sizes_about_cpu_chunks,
    check_sizes_about_vectors_and_chunks,
    check_tensors_without_gradient,
    check_zero_over_zero_leaves_the_parameter,
    decoded,
    differing,
    tiny_tensors,
)

from adamal_kernels.core.buffers import SecondMoment
from adamal_kernels.core.storage import FORMATS, Format

# By code in csrc/formula/dtypes.h.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def harness() -> Harness:
    return Harness()


@pytest.fixture(scope="module")
def info(harness: Harness) -> Info:
    return harness.info()


@pytest.mark.parametrize("backend", BACKENDS)
def test_formula(harness: Harness, backend: str) -> None:
    check_formula(harness, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_about_vectors_and_chunks(harness: Harness, info: Info, backend: str) -> None:
    check_sizes_about_vectors_and_chunks(harness, info, backend)


def test_sizes_about_cpu_chunks(harness: Harness, info: Info) -> None:
    check_sizes_about_cpu_chunks(harness, info)


@pytest.mark.parametrize("backend", BACKENDS)
def test_misaligned_streams(harness: Harness, info: Info, backend: str) -> None:
    check_misaligned_streams(harness, info, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_without_gradient(harness: Harness, backend: str) -> None:
    check_tensors_without_gradient(harness, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("second_moment", SecondMoment)
def test_zero_over_zero_leaves_the_parameter(
    harness: Harness, backend: str, second_moment: SecondMoment
) -> None:
    check_zero_over_zero_leaves_the_parameter(harness, backend, second_moment)


@pytest.mark.parametrize("second_moment", [SecondMoment.MONOTONE, SecondMoment.AMSGRAD])
def test_cuda_walk_does_not_store_what_did_not_change(
    harness: Harness, info: Info, second_moment: SecondMoment
) -> None:
    check_cuda_walk_does_not_store_what_did_not_change(harness, info, second_moment)


@pytest.mark.parametrize("numel", [2048, 9, 1])
def test_cuda_walk_stores_what_changed(harness: Harness, numel: int) -> None:
    case = StepCase(0, SecondMoment.MONOTONE, ROWS[:1], [])
    tensor = at_rest(case, numel)
    assert tensor.grad is not None
    tensor.grad[-1] = 1e6
    with pytest.raises(HarnessError, match="SEGV"):
        harness.step_cuda([replace(case, tensors=[tensor])])


@pytest.mark.parametrize("format", [0, 1, 2])
def test_launches_split_where_their_parameters_are_full(
    harness: Harness, info: Info, format: int
) -> None:
    check_launches_split_where_their_parameters_are_full(harness, info, format)


def test_tensors_at_rest_cost_no_launch(harness: Harness, info: Info) -> None:
    case = StepCase(0, SecondMoment.MONOTONE, ROWS, [])
    tensors = tiny_tensors(case, 2 * info.large[0].tensors, len(ROWS))
    idle = [replace(tensor, grad=None) for tensor in tensors]
    cases = [
        replace(case, tensors=chosen)
        for chosen in ([], idle, [*idle, tensors[0]], [tensors[0], *idle, tensors[1]])
    ]
    results = harness.step_cuda(cases)
    check(cases, results)
    assert [result.launches for result in results] == [0, 0, 1, 2]


# Tables that C++ and Python share.


def test_formats_are_those_of_python(info: Info) -> None:
    assert [Format(*(DTYPES[code] for code in codes)) for codes in info.formats] == list(FORMATS)


@pytest.mark.parametrize(("code", "dtype"), SIXTEEN_BIT)
def test_decode_of_every_pattern(harness: Harness, code: int, dtype: torch.dtype) -> None:
    found = harness.decode(code, PATTERNS)
    assert differing(found, decoded(PATTERNS, dtype), torch.float32).size == 0


@pytest.mark.parametrize(("code", "dtype"), SIXTEEN_BIT)
def test_encode(harness: Harness, code: int, dtype: torch.dtype) -> None:
    check_encode(harness, code, dtype)


def test_scalars_are_those_of_python(harness: Harness) -> None:
    check_scalars_are_those_of_python(harness)
