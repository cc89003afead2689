"""The step in a CUDA graph: replayed with other gradients, rates and verdicts than captured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.support import PLACES, Place
from torch import Tensor

from adamal_kernels import AdamAL, L1Ball, L2Ball, Simplex
from adamal_kernels.backends import FUSED
from adamal_kernels.projections import Projection
from adamal_kernels.verify import different_values, same_bits

pytestmark = pytest.mark.gpu

GPU_PLACES = [
    place
    for place in PLACES
    if place.values[0].device.type == "cuda" and place.values[0].backend in FUSED
]
SIZES = (1, 7, 1024, 5000, 300_000)


@pytest.fixture(
    params=GPU_PLACES or [pytest.param(None, marks=pytest.mark.skip(reason="no CUDA device"))]
)
def place(request: pytest.FixtureRequest) -> Place:
    """The backends with kernels of their own, on every GPU here."""
    return request.param


class Run:
    """An optimizer whose learning rate, scale and verdict on the gradients are the device's."""

    def __init__(
        self,
        device: torch.device,
        backend: str,
        max_grad_norm: float | None,
        is_scaled: bool,
        projection: Projection | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params = [
            torch.randn(numel, generator=generator).to(device).requires_grad_() for numel in SIZES
        ]
        self.lr = torch.tensor(0.05, dtype=torch.float64, device=device)
        self.optimizer = AdamAL(
            self.params,
            lr=self.lr,
            capturable=True,
            max_grad_norm=max_grad_norm,
            projection=projection,
            backend=backend,
        )
        if is_scaled:
            self.optimizer.grad_scale = torch.tensor(4.0, device=device)
            self.optimizer.found_inf = torch.tensor(0.0, device=device)

    def set_gradients(self, step: int, into: list[Tensor] | None = None) -> list[Tensor]:
        generator = torch.Generator().manual_seed(step)
        values = [torch.randn(p.shape, generator=generator).to(p.device) for p in self.params]
        if into is not None:
            torch._foreach_copy_(into, values)
            return into
        for p, value in zip(self.params, values, strict=True):
            p.grad = value
        return values

    def change_scalars(self, step: int) -> None:
        self.lr.mul_(0.7)
        if hasattr(self.optimizer, "found_inf"):
            self.optimizer.found_inf.fill_(step % 3 == 0)

    def values(self) -> list[dict[str, Any]]:
        return [{"param": p.detach(), **self.optimizer.state[p]} for p in self.params]


@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize("max_grad_norm", [None, 10.0])
@pytest.mark.parametrize("steps_before", [1, 3])
def test_replays_step_by_what_is_there_then(
    place: Place, steps_before: int, max_grad_norm: float | None, is_scaled: bool
) -> None:
    ours = Run(place.device, place.backend, max_grad_norm, is_scaled)
    theirs = Run(place.device, "reference", max_grad_norm, is_scaled)
    side = torch.cuda.Stream(place.device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in range(steps_before):
            ours.set_gradients(step)
            ours.optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    for step in range(steps_before):
        theirs.set_gradients(step)
        theirs.optimizer.step()

    static = ours.set_gradients(50)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.optimizer.step()
    norm = ours.optimizer.last_grad_norm
    for step in range(60, 66):
        for run in (ours, theirs):
            run.change_scalars(step)
        theirs.set_gradients(step)
        theirs.optimizer.step()
        if step == 62:
            ours.set_gradients(step)
            ours.optimizer.step()
        else:
            ours.set_gradients(step, into=static)
            graph.replay()
            if max_grad_norm is not None:
                assert same_bits(norm, theirs.optimizer.last_grad_norm)
        # Whatever the capture gave back to torch's pool of pinned memory, is overwritten here.
        junk = [torch.full((64 << i,), 255, dtype=torch.uint8).pin_memory() for i in range(12)]
        assert different_values(ours.values(), theirs.values()) == [], f"step {step}"
        assert torch.equal(ours.optimizer.skipped_steps, theirs.optimizer.skipped_steps)
        del junk


@pytest.mark.parametrize("projection", [L2Ball(3.0), L1Ball(3.0), Simplex(2.0)], ids=repr)
def test_replays_search_for_their_own_multipliers(place: Place, projection: Projection) -> None:
    runs = [
        Run(place.device, backend, None, True, projection) for backend in (place.backend, "foreach")
    ]
    ours, theirs = runs
    for run in runs:
        run.set_gradients(0)
        run.optimizer.step()
    static = ours.set_gradients(50)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.optimizer.step()
    for step in range(60, 66):
        for run in runs:
            run.change_scalars(step)
        theirs.set_gradients(step)
        theirs.optimizer.step()
        ours.set_gradients(step, into=static)
        graph.replay()
        assert different_values(ours.values(), theirs.values()) == [], f"step {step}"
