"""What a step that works by address owes to those who own the memory."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.between_workers import locked
from helpers.support import Place

from adamal_kernels import AdamAL, Box
from adamal_kernels.verify import same_bits


def stepped(params: list[torch.Tensor], backend: str, times: int = 2) -> AdamAL:
    optimizer = AdamAL(params, lr=0.1, backend=backend)
    for _ in range(times):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    return optimizer


def no_cycle(optimizer: Any, param: torch.Tensor) -> None:
    """Leave both as they are."""


def through_the_parameter(optimizer: Any, param: torch.Tensor) -> None:
    param.optimizer = optimizer


def through_a_group(optimizer: Any, param: torch.Tensor) -> None:
    optimizer.param_groups[0]["owner"] = optimizer
    param.grad = torch.ones_like(param)
    optimizer.step()


@pytest.mark.parametrize("tie", [no_cycle, through_the_parameter, through_a_group])
def test_parameters_are_released_with_the_optimizer(
    place: Place, tie: Callable[[Any, torch.Tensor], None]
) -> None:
    param = torch.ones(4, device=place.device, requires_grad=True)
    optimizer = stepped([param], place.backend)
    tie(optimizer, param)
    alive = weakref.ref(param)
    del optimizer, param
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("steps", [1, 3])
def test_autograd_sees_that_a_saved_parameter_changed(place: Place, steps: int) -> None:
    a, u = (torch.ones(3, device=place.device, requires_grad=True) for _ in range(2))
    optimizer = stepped([a], place.backend, steps)
    loss = (a * u).square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("freed", ["parameter", "gradient", "moment"])
def test_freed_storage_is_refused(place: Place, freed: str, steps: int) -> None:
    kept, p = (torch.ones(8, device=place.device, requires_grad=True) for _ in range(2))
    optimizer = stepped([kept, p], place.backend, max(steps, freed == "moment"))
    kept.grad, p.grad = torch.ones_like(kept), torch.ones_like(p)
    tensors = {"parameter": p, "gradient": p.grad}
    tensor = tensors[freed] if freed in tensors else optimizer.state[p]["exp_avg"]
    before = kept.detach().clone()
    tensor.untyped_storage().resize_(0)
    with pytest.raises((RuntimeError, ValueError), match=r"freed"):
        optimizer.step()
    assert same_bits(kept, before)


def test_parameters_that_come_to_overlap_while_one_has_no_gradient(place: Place) -> None:
    a, b = (torch.ones(4, device=place.device, requires_grad=True) for _ in range(2))
    optimizer = stepped([a, b], place.backend)
    b.grad = None
    b.data = a.data
    optimizer.step()
    b.grad = torch.ones_like(b)
    with pytest.raises(ValueError, match="share memory"):
        optimizer.step()


@pytest.mark.parametrize("steps", [0, 2])
def test_a_gradient_that_lies_in_a_parameter_is_refused(place: Place, steps: int) -> None:
    buffer = torch.ones(33, device=place.device)
    p = buffer[1:].requires_grad_()
    optimizer = AdamAL([p], backend=place.backend)
    for _ in range(steps):  # with gradients that lie like the last one in their own buffers
        p.grad = torch.ones_like(buffer)[:32]
        optimizer.step()
    p.grad = buffer[:32]
    with pytest.raises(ValueError, match="share memory"):
        optimizer.step()


def in_another(params: list[torch.Tensor], optimizer: AdamAL) -> torch.Tensor:
    return params[0].detach()


def in_a_second_moment(params: list[torch.Tensor], optimizer: AdamAL) -> torch.Tensor:
    return optimizer.state[params[0]]["exp_avg_sq"]


def in_its_own_moment(params: list[torch.Tensor], optimizer: AdamAL) -> torch.Tensor:
    return optimizer.state[params[1]]["exp_avg"]


def across_the_end(params: list[torch.Tensor], optimizer: AdamAL) -> torch.Tensor:
    """Return what begins in the room before a parameter."""
    return params[0]._base.detach()[:64]


def by_another_storage(params: list[torch.Tensor], optimizer: AdamAL) -> torch.Tensor:
    if params[1].device.type != "cpu":
        return torch.from_dlpack(params[1].detach())
    return torch.from_numpy(params[1].detach().numpy())


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize(
    "alias",
    [in_another, in_a_second_moment, in_its_own_moment, across_the_end, by_another_storage],
)
def test_a_gradient_in_any_memory_that_is_written_is_refused(
    place: Place, alias: Callable[..., torch.Tensor], steps: int
) -> None:
    rooms = [torch.ones(72, device=place.device) for _ in range(2)]
    params = [room[8:].requires_grad_() for room in rooms]
    optimizer = AdamAL(params, lr=0.1, backend=place.backend)
    grads = [torch.ones(64, device=place.device) for _ in params]
    for _ in range(steps):
        params[0].grad, params[1].grad = grads
        optimizer.step()
    before = copy.deepcopy([(p, optimizer.state[p]) for p in params])
    params[1].grad = alias(params, optimizer)
    with pytest.raises(ValueError, match="share memory"):
        optimizer.step()
    assert all(same_bits(p, old) for p, (old, _) in zip(params, before, strict=True))
    for p, (_, held) in zip(params, before, strict=True):
        assert all(same_bits(optimizer.state[p][key], held[key]) for key in held)
    params[1].grad = grads[1]
    optimizer.step()
    assert optimizer.state[params[1]]["step"] == steps + 1


def test_one_gradient_may_serve_many_parameters(place: Place) -> None:
    params = [torch.ones(4, device=place.device, requires_grad=True) for _ in range(3)]
    optimizer = stepped(params, place.backend)
    shared = torch.full((4,), 0.5, device=place.device)
    for p in params:
        p.grad = shared
    optimizer.step()
    assert all(same_bits(p, params[0]) for p in params)


def test_a_default_device_changes_nothing(place: Place) -> None:
    params, others = ([torch.ones(4, device=place.device, requires_grad=True)] for _ in range(2))
    with torch.device("meta"):
        options = {"lr": 0.1, "projection": Box(-1, 0.9), "backend": place.backend}
        optimizer = AdamAL(params, **options)
        for _ in range(3):
            params[0].grad = torch.ones_like(params[0], device=place.device)
            optimizer.step()
    expected = AdamAL(others, **options)
    for _ in range(3):
        others[0].grad = torch.ones_like(others[0])
        expected.step()
    assert same_bits(params[0], others[0])
    assert optimizer.state[params[0]]["step"].device.type == "cpu"


def test_steps_go_on_across_inference_mode(place: Place) -> None:
    params = [torch.ones(4, device=place.device, requires_grad=True)]
    optimizer = AdamAL(params, lr=0.1, backend=place.backend)
    for inference in (True, False, True, False):
        params[0].grad = torch.ones(4, device=place.device)
        with torch.inference_mode(inference):
            optimizer.step()
    expected = [torch.ones(4, device=place.device, requires_grad=True)]
    stepped(expected, place.backend, 4)
    assert same_bits(params[0], expected[0])


def test_groups_in_a_tuple_are_stepped(place: Place) -> None:
    params = [torch.ones(4, device=place.device, requires_grad=True)]
    optimizer = stepped(params, place.backend)
    optimizer.param_groups[0]["params"] = tuple(params)
    optimizer.param_groups = tuple(optimizer.param_groups)
    optimizer.step()
    optimizer.step()
    expected = [torch.ones(4, device=place.device, requires_grad=True)]
    stepped(expected, place.backend, 4)
    assert same_bits(params[0], expected[0])


def test_a_very_large_step_count_keeps_its_own_row(place: Place) -> None:
    results = []
    for backend in (place.backend, "reference"):
        params = [torch.ones(4, device=place.device, requires_grad=True) for _ in range(2)]
        optimizer = AdamAL(
            [{"params": params[0], "lr": 0.1}, {"params": params[1], "lr": 1.0}], backend=backend
        )
        for step in range(3):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
            if step == 0:
                optimizer.state[params[0]]["step"].fill_(2.0**40)
                optimizer.state[params[1]]["step"].fill_(0)
        results.append(params)
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.fixture
def empty_gpu() -> Iterator[None]:
    """What torch keeps of its memory is given back, before and after."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    gc.collect()
    torch.cuda.empty_cache()
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.large
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_more_than_2_to_the_31_elements(
    backend: str, empty_gpu: None, session_folder: Path
) -> None:
    """Offsets are 64 bits wide: the last elements are stepped as the first are."""
    numel = 2**31 + 8
    with locked(session_folder / "large"):  # Workers of one run take it in turn.
        free, _ = torch.cuda.mem_get_info()
        if free < 14 * numel:  # bfloat16 parameter and gradient, float32 moments, and some room
            pytest.skip(f"needs {14 * numel / 2**30:.0f} GiB of free GPU memory")
        step_the_ends(backend, numel)
        torch.cuda.empty_cache()


def step_the_ends(backend: str, numel: int) -> None:
    """Check both ends of a parameter of ``numel`` elements against small ones."""
    p = torch.ones(numel, dtype=torch.bfloat16, device="cuda").requires_grad_()
    p.grad = torch.full_like(p, 0.5, requires_grad=False)
    p.grad[-8:] = torch.arange(8)
    windows = [slice(0, 4096), slice(numel - 8 - 4096, numel)]
    small = [p.detach()[window].clone().requires_grad_() for window in windows]
    for part, window in zip(small, windows, strict=True):
        part.grad = p.grad[window].clone()
    optimizer = AdamAL([p], lr=0.1, backend=backend)
    expected = AdamAL(small, lr=0.1, backend="reference")
    for _ in range(2):
        optimizer.step()
        expected.step()
    for part, window in zip(small, windows, strict=True):
        assert same_bits(p.detach()[window], part)
        assert same_bits(
            optimizer.state[p]["exp_avg_sq"][window], expected.state[part]["exp_avg_sq"]
        )
