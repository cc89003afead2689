"""Every backend over the table of cases: the reference's bits, the oracle's values."""

from __future__ import annotations

import functools

import pytest
import torch
from support import PLACES, Place, name_of

from adamal_kernels import info
from adamal_kernels.backends import BACKENDS
from adamal_kernels.backends.foreach import ForeachBackend
from adamal_kernels.bucket import BucketKey, SecondMoment
from adamal_kernels.cases import Case, cases
from adamal_kernels.dtypes import DTYPE_PAIRS, DtypePair
from adamal_kernels.verify import (
    Values,
    different_values,
    outside_tolerance,
    run_case,
    run_oracle,
)


# Backends vary fastest below: the next one finds the results of the last one's cases here.
@functools.lru_cache(maxsize=16)
def reference(case: Case, device: torch.device) -> Values:
    return run_case(case, "reference", device)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("second_moment", SecondMoment, ids=lambda kind: kind.name.lower())
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=name_of)
def test_cases(place: Place, second_moment: SecondMoment, dtypes: DtypePair) -> None:
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
    dtypes = DtypePair(torch.float32, torch.float32)
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
def test_a_fused_backend_is_usable_on_the_gpu() -> None:
    states = info.collect()["backends"]
    assert "usable" in (states["cuda"]["cuda:0"], states["triton"]["cuda:0"])


@pytest.mark.parametrize("name", BACKENDS)
def test_types_outside_the_table_are_unsupported(name: str) -> None:
    dtypes = DtypePair(torch.int32, torch.int32)
    key = BucketKey(torch.device("cpu"), dtypes, SecondMoment.MONOTONE)
    assert "int32" in BACKENDS[name].unsupported(key)
