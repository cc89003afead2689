"""What only a GPU can show of a step: it waits for nothing, and is right on any stream."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.support import PLACES, Place
from torch import Tensor

from adamal_kernels import AdamAL
from adamal_kernels.backends import FUSED
from adamal_kernels.verify import same_bits

pytestmark = pytest.mark.gpu

GPU_PLACES = [
    place
    for place in PLACES
    if place.values[0].device.type == "cuda" and place.values[0].backend in FUSED
]
STEPS = 20


@pytest.fixture(
    params=GPU_PLACES or [pytest.param(None, marks=pytest.mark.skip(reason="no CUDA device"))]
)
def place(request: pytest.FixtureRequest) -> Place:
    """Every fused backend that can run on a GPU here."""
    return request.param


class Run:
    """An optimizer over tensors of all alignments, and gradients that move in every step."""

    def __init__(self, device: torch.device, backend: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(numel: int, offset: int = 0) -> Tensor:
            return torch.randn(offset + numel, generator=generator).to(device)[offset:]

        sizes = (1, 7, 1024, 5000, 40_000)
        self.params = [draw(numel, i % 2).requires_grad_() for i, numel in enumerate(sizes)]
        self.grads = [
            [draw(numel, (i + step) % 3) for i, numel in enumerate(sizes)] for step in range(STEPS)
        ]
        groups = [{"params": [p], "lr": 0.01 * (i + 1)} for i, p in enumerate(self.params)]
        self.optimizer = AdamAL(groups, backend=backend)

    def step(self, number: int) -> None:
        for p, grad in zip(self.params, self.grads[number], strict=True):
            p.grad = grad
        self.optimizer.step()

    def values(self) -> list[Tensor]:
        state = self.optimizer.state
        return [t for p in self.params for t in (p.detach(), *state[p].values())]


def assert_equal_to_reference(run: Run) -> None:
    expected = Run(run.params[0].device, "reference")
    for number in range(STEPS):
        expected.step(number)
    pairs = zip(run.values(), expected.values(), strict=True)
    assert [same_bits(found, wanted) for found, wanted in pairs] == [True] * 4 * len(run.params)


def test_steps_wait_for_nothing(place: Place) -> None:
    """Many are enqueued while the device is at work, and none reads what a later one wrote."""
    run = Run(place.device, place.backend)
    for number in range(3):
        run.step(number)
    torch.cuda.synchronize()
    reached = torch.cuda.Event()
    torch.cuda._sleep(4_000_000_000)  # cycles: two seconds and more
    reached.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(3, STEPS):
            run.step(number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not reached.query(), "a step waited for the device"
    assert_equal_to_reference(run)


def test_streams_take_turns(place: Place) -> None:
    run = Run(place.device, place.backend)
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    last = streams[0]
    for number in range(STEPS):
        stream = streams[number % len(streams) if number > 4 else 0]
        stream.wait_stream(last)
        with torch.cuda.stream(stream):
            run.step(number)
            torch.full((1000,), -1.0, device=place.device)  # what was freed too early, is this
        last = stream
    torch.cuda.current_stream().wait_stream(last)
    assert_equal_to_reference(run)


@pytest.fixture
def second(place: Place) -> Place:
    """The same backend on another device than the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    return Place(torch.device("cuda", 1), place.backend)


def test_steps_on_another_device_than_the_current_one(second: Place) -> None:
    """Which stays the current one."""
    run = Run(second.device, second.backend)
    for number in range(STEPS):
        run.step(number)
        assert torch.cuda.current_device() == 0
    assert_equal_to_reference(run)


def test_one_optimizer_steps_on_two_devices(place: Place, second: Place) -> None:
    runs = [Run(each.device, each.backend) for each in (place, second)]
    groups = [group for run in runs for group in run.optimizer.param_groups]
    optimizer = AdamAL(groups, backend=place.backend)
    for number in range(STEPS):
        for run in runs:
            for p, grad in zip(run.params, run.grads[number], strict=True):
                p.grad = grad
        optimizer.step()
        assert torch.cuda.current_device() == 0
    for run in runs:
        run.optimizer = optimizer
        assert_equal_to_reference(run)


def test_a_process_of_the_second_device_leaves_the_first_alone(second: Place) -> None:
    """A context there would take half a GiB of it, in every process of a node."""
    code = f"""
import torch
from adamal_kernels import AdamAL
p = torch.ones(5000, device={str(second.device)!r}, requires_grad=True)
optimizer = AdamAL([p], backend={second.backend!r}, max_grad_norm=1.0)
for _ in range(3):
    p.grad = torch.ones_like(p)
    optimizer.step()
torch.cuda.synchronize(p.device)
assert torch._C._cuda_hasPrimaryContext(1)
assert not torch._C._cuda_hasPrimaryContext(0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_triton_launches_the_compiled_kernel(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no longer asks which one."""
    if place.backend != "triton":
        pytest.skip("about Triton")
    from adamal_kernels.backends.triton.element import step_kernel
    from adamal_kernels.backends.triton.launcher import triton_version

    if triton_version() > (3, 9):
        pytest.skip("later versions launch by kernel[grid]")
    run = Run(place.device, place.backend)
    run.grads = [run.grads[0]] * STEPS
    for number in range(3):
        run.step(number)
    asked: list[Any] = []
    original: Callable[..., Any] = step_kernel.run

    def counting(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(step_kernel, "run", counting)
    for number in range(3, STEPS):
        run.step(number)
    assert asked == []


def test_tables_that_wait_for_the_device(place: Place) -> None:
    """Host memory that a copy has yet to read is given to no other copy."""
    for _ in range(2):  # The second time, kernels are compiled and the allocators have memory.
        runs = [Run(place.device, place.backend) for _ in range(4)]
        torch.cuda.synchronize()
        torch.cuda._sleep(1_000_000_000)
        for number in range(STEPS):
            for run in runs:  # Each binds tables of the same size.
                run.step(number)
    for run in runs:
        assert_equal_to_reference(run)
