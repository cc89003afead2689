"""Every backend over the table of cases: the reference's bits, the oracle's values."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch
from helpers.support import PLACES, Place, name_of

from adamal_kernels import info
from adamal_kernels.backends import BACKENDS, native, pick
from adamal_kernels.backends.eager.foreach import ForeachBackend
from adamal_kernels.build_info import ExtensionRecord, extension_record
from adamal_kernels.core.bucket import BucketKey
from adamal_kernels.core.buffers import SecondMoment
from adamal_kernels.core.storage import FORMATS, Format
from adamal_kernels.verify import (
    Values,
    different_values,
    outside_tolerance,
    run_case,
    run_oracle,
)
from adamal_kernels.verify.cases import Case, cases


# Backends vary fastest below: the next one finds the results of the last one's cases here.
@functools.lru_cache(maxsize=16)
def reference(case: Case, device: torch.device) -> Values:
    return run_case(case, "reference", device)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("second_moment", SecondMoment, ids=lambda kind: kind.name.lower())
@pytest.mark.parametrize("dtypes", FORMATS, ids=name_of)
def test_cases(place: Place, second_moment: SecondMoment, dtypes: Format) -> None:
    """The reference is within the oracle's tolerance; with its bits, so is every other."""
    place.skip_unless_supported(dtypes, second_moment)
    mine = [c for c in cases() if (c.dtypes, c.second_moment) == (dtypes, second_moment)]
    wrong = {}
    for case in mine:
        expected = reference(case, place.device)
        if place.backend == "reference":
            names = outside_tolerance(expected, run_oracle(case))
        else:
            names = different_values(run_case(case, place.backend, place.device), expected)
        if names:
            wrong[case.variant] = names
    assert mine
    assert wrong == {}


@pytest.mark.parametrize("second_moment", SecondMoment, ids=lambda kind: kind.name.lower())
def test_foreach_calls_over_lists_give_the_same_bits_on_cpus(
    second_moment: SecondMoment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other devices take them, CPUs only where the scalars are the device's."""
    monkeypatch.setattr(ForeachBackend, "_steps_in_pieces", lambda self, bucket: False)
    device = torch.device("cpu")
    dtypes = Format(torch.float32, torch.float32)
    mine = [c for c in cases() if (c.dtypes, c.second_moment) == (dtypes, second_moment)]
    wrong = [
        case.name
        for case in mine
        if different_values(run_case(case, "foreach", device), reference(case, device))
    ]
    assert mine
    assert wrong == []


def test_case_names_are_unique() -> None:
    names = [case.name for case in cases()]
    assert len(set(names)) == len(names)


def test_reference_repeats_its_own_bits(device: torch.device) -> None:
    case = next(case for case in cases() if case.special)
    first, second = (run_case(case, "reference", device) for _ in range(2))
    assert different_values(first, second) == []


def test_cpu_backends_are_all_usable() -> None:
    """Without the extension every comparison with it would vanish, and the suite stay green."""
    states = info.collect()["backends"]
    names = ("cpu", "foreach", "reference")
    assert {name: states[name]["cpu"] for name in names} == dict.fromkeys(names, "usable")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_fused_backends_are_usable_on_the_gpu() -> None:
    """Each that is there: its tests would vanish with it."""
    states = info.collect()["backends"]
    there = {"cuda": extension_record("_cuda").built, "triton": find_spec("triton") is not None}
    names = [name for name, is_there in there.items() if is_there]
    assert names
    assert {name: states[name]["cuda:0"] for name in names} == dict.fromkeys(names, "usable")


@pytest.mark.parametrize("name", BACKENDS)
def test_types_outside_the_table_are_unsupported(name: str) -> None:
    dtypes = Format(torch.int32, torch.int32)
    key = BucketKey(torch.device("cpu"), dtypes, SecondMoment.MONOTONE)
    assert "int32" in BACKENDS[name].unsupported(key)


class StandInKernels:
    """The module of CUDA kernels, as far as it is asked whether it can launch any."""

    def __init__(self, error: str | None, driver: int) -> None:
        self.error, self.driver, self.asked = error, driver, 0

    def launch_error(self) -> str | None:
        self.asked += 1
        return self.error

    def driver_version(self) -> int:
        return self.driver


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., StandInKernels]]:
    """Make it seem as if this machine had GPUs, whose kernels a stand-in is asked about."""

    def install(error: str | None, driver: int = 13000) -> StandInKernels:
        kernels = StandInKernels(error, driver)
        monkeypatch.setitem(sys.modules, "adamal_kernels._cuda", kernels)
        record = ExtensionRecord("_cuda", True, cuda="13.0", archs=("80", "100", "90a"))
        monkeypatch.setattr(native, "extension_record", lambda name: record)
        monkeypatch.setattr(native, "why_not_importable", lambda name: None)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        # It would ask the GPU, and remember.
        monkeypatch.setattr(type(BACKENDS["triton"]), "unavailable", lambda *_: "left out here")
        return kernels

    native._why_not_launchable.cache_clear()
    yield install
    native._why_not_launchable.cache_clear()


def test_a_gpu_that_the_kernels_run_on_is_asked_once(
    gpu: Callable[..., StandInKernels],
) -> None:
    kernels = gpu(None)
    for device in ("cuda:1", "cuda", "cuda:1"):
        assert BACKENDS["cuda"].unavailable(torch.device(device)) is None
    assert kernels.asked == 1
    assert BACKENDS["cuda"].unavailable(torch.device("cuda", 2)) is None
    assert kernels.asked == 2


def test_a_gpu_that_the_kernels_were_not_built_for(gpu: Callable[..., StandInKernels]) -> None:
    gpu("no kernel image is available")
    assert BACKENDS["cuda"].unavailable(torch.device("cuda", 0)) == (
        "its kernels cannot be launched on cuda:0 (no kernel image is available): they were built "
        "by CUDA 13.0 for compute capability 8.0, 9.0a, 10.0, and cuda:0 has 7.5 and a driver that "
        "runs CUDA 13.0; run: ADAMAL_CUDA_ARCHS=7.5 python -m adamal_kernels build"
    )
    # Not so much as tried: a step would end in the middle of its launches.
    key = BucketKey(torch.device("cuda", 0), FORMATS[0], SecondMoment.MONOTONE)
    with pytest.warns(UserWarning, match="cannot be launched|left out here") as warned:
        assert pick(key).name == "foreach"
    assert "because cuda: its kernels cannot be launched" in str(warned[0].message)
    with pytest.raises(RuntimeError, match="no kernel image is available"):
        pick(key, backend="cuda")


def test_a_driver_that_is_older_than_the_kernels(gpu: Callable[..., StandInKernels]) -> None:
    gpu("the driver is too old", driver=12040)
    reason = BACKENDS["cuda"].unavailable(torch.device("cuda", 0))
    assert "a driver that runs CUDA 12.4; update the driver; or, by CUDA 12.4 or older" in reason


def test_amd_gpus_are_told_of_triton_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA build would not help there, whichever extension is missing."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(native, "why_not_importable", lambda name: f"{name} was not built")
    reason = BACKENDS["cuda"].unavailable(torch.device("cuda", 0))
    assert reason == "it is written for NVIDIA GPUs; on AMD GPUs use backend='triton'"
    assert "these are on cpu" in BACKENDS["cuda"].unavailable(torch.device("cpu"))
