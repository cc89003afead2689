"""Every case of the bench command, one contender at a time, under pytest-benchmark.

    python -m pytest benchmarks -k "2000x16" --benchmark-group-by=group

``python -m adamal_kernels bench`` is the fairer comparison: there two contenders take turns.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from adamal_kernels.bench.cases import CASES, BenchCase
from adamal_kernels.bench.contenders import OURS, PEERS, Contender, Entrant
from adamal_kernels.bench.run import Gate, Venue, case_room, gradients, why_no_room

ROUNDS = 5

TYPED_CASES = [
    pytest.param(case, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for name, case in CASES.items()
    for dtype in case.dtypes
]
CONTENDERS = [
    pytest.param(contender, id=contender.name) for contender in (*OURS.values(), *PEERS.values())
]


@pytest.fixture(autouse=True)
def collected(venue: Venue) -> Iterator[None]:
    yield
    gc.collect()
    if venue.device.type == "cuda":
        torch.cuda.empty_cache()


@pytest.mark.parametrize(("case", "dtype"), TYPED_CASES)
@pytest.mark.parametrize("contender", CONTENDERS)
def test_step(
    benchmark: Any,
    case: BenchCase,
    dtype: torch.dtype,
    contender: Contender,
    venue: Venue,
    gate: Gate,
) -> None:
    if reason := contender.unavailable(venue.device):
        pytest.skip(reason)
    if contender.backend is not None:
        assert gate.check(contender.backend, dtype) == []
    shapes = case.shapes(case_room(dtype, [contender], venue))
    if reason := why_no_room([contender], shapes, dtype, venue):
        pytest.skip(reason)
    fresh = case.fresh_gradients(len(shapes))
    grads = gradients(shapes, dtype, venue.device)
    entrant = Entrant(contender, shapes, dtype, venue.device, case.group_each)
    benchmark.group = benchmark.extra_info["case"] = f"{case.title}, {dtype}"
    benchmark.extra_info["contender"] = contender.name
    benchmark.pedantic(
        _step(entrant, venue.device),
        setup=lambda: entrant.take_gradients(grads, fresh=fresh),
        rounds=ROUNDS,
        warmup_rounds=2,
    )


def _step(entrant: Entrant, device: torch.device) -> Callable[[], None]:
    def step() -> None:
        entrant.optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step
