"""The kernels that derive scalars and add norms on the device, run on the host under sanitizers."""

from __future__ import annotations

import re

import numpy as np
import pytest
from helpers.device_kernels import (
    INPUTS,
    OTHERS,
    bucket,
    check_buckets_of_several_launches,
    check_norms_are_those_of_python,
    check_norms_of_many_chunks_use_every_lane,
    check_steps_are_those_of_python,
)
from helpers.native_harness import Command, DeviceCase, Harness
from helpers.native_programs import CSRC

from adamal_kernels.build_config import source_files
from adamal_kernels.core.buffers import SecondMoment


def test_what_the_kernels_ask_of_the_cuda_runtime() -> None:
    """No device is made current, which makes a context there, and no host memory is copied.

    The plan does both by torch: its guard makes no context, and it frees no pinned memory that a
    copy has yet to read.
    """
    asked: set[str] = set()
    for source in source_files(CSRC):
        asked.update(re.findall(r"\b(cu(?:da)?[A-Z]\w*)\(", source.read_text()))
    assert asked == {
        "cudaDriverGetVersion",
        "cudaFuncGetAttributes",
        "cudaGetErrorString",
        "cudaGetLastError",
        "cudaMemsetAsync",
        "cudaStreamIsCapturing",
    }


@pytest.fixture(scope="module")
def harness() -> Harness:
    return Harness()


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("by_address", [False, True], ids=["numbers", "addresses"])
def test_steps_are_those_of_python(harness: Harness, name: str, by_address: bool) -> None:
    check_steps_are_those_of_python(harness, name, by_address)


@pytest.mark.parametrize("small", [True, False], ids=["small", "large"])
def test_buckets_of_several_launches(harness: Harness, small: bool) -> None:
    check_buckets_of_several_launches(harness, small)


def test_a_skip_is_counted_once(harness: Harness) -> None:
    case = bucket(0, SecondMoment.MONOTONE, [1] * 700)
    device = DeviceCase(OTHERS, np.zeros(700, np.float32), found_inf=1.0)
    (result,) = harness.step_on_device([case], [device])
    assert result.skipped_steps == 1
    assert (result.counts == 0).all()


@pytest.mark.parametrize("command", [Command.NORM_CPU, Command.NORM_CUDA])
def test_norms_are_those_of_python(harness: Harness, command: Command) -> None:
    check_norms_are_those_of_python(harness, command)


def test_norms_of_many_chunks_use_every_lane(harness: Harness) -> None:
    check_norms_of_many_chunks_use_every_lane(harness)
