"""Adam and AdamW against torch.optim's for-loop, within torch.testing's own tolerances."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.support import Place
from torch import Tensor

import adamal_kernels
from adamal_kernels.core.buffers import SecondMoment
from adamal_kernels.core.storage import Format

STEPS = 10
SHAPES = ((), (1,), (0,), (7,), (3, 5), (2, 3, 4, 5), (4099,))
DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)

Grads = Callable[[int, int, Tensor], Tensor | None]


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def grad_of(step: int, index: int, param: Tensor) -> Tensor:
    return draw(tuple(param.shape), param.dtype, 100 * step + index).to(param.device)


def skip_unless_supported(place: Place, dtype: torch.dtype, *, amsgrad: bool) -> None:
    real = dtype.to_real() if dtype.is_complex else dtype
    second_moment = SecondMoment.AMSGRAD if amsgrad else SecondMoment.PLAIN
    place.skip_unless_supported(Format(real, real), second_moment)


def assert_agree(
    name: str,
    place: Place,
    make_params: Callable[[], list[Tensor]],
    options: dict[str, Any],
    grads: Grads = grad_of,
    steps: int = STEPS,
) -> None:
    """Step equal parameters with both optimizers; then compare them and their state."""
    ours, theirs = make_params(), make_params()
    optimizer = getattr(adamal_kernels, name)(ours, backend=place.backend, **options)
    torchs = getattr(torch.optim, name)(theirs, foreach=False, fused=False, **options)
    for step in range(steps):
        for index, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            our.grad, their.grad = grads(step, index, our), grads(step, index, their)
        optimizer.step()
        torchs.step()
    torch.testing.assert_close(ours, theirs)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(dict(optimizer.state[our]), dict(torchs.state[their]))


# Every option has its place in the product; AdamW's decay is decoupled, Adam's either.
VARIANTS = [
    ("Adam", {"amsgrad": amsgrad, "maximize": maximize, "weight_decay": decay, **decoupled})
    for amsgrad, maximize, (decay, decoupled) in itertools.product(
        (False, True),
        (False, True),
        ((0.0, {}), (0.1, {}), (0.1, {"decoupled_weight_decay": True})),
    )
] + [
    ("AdamW", {"amsgrad": amsgrad, "maximize": maximize})
    for amsgrad, maximize in itertools.product((False, True), (False, True))
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "options"),
    VARIANTS,
    ids=lambda v: v if isinstance(v, str) else ",".join(f"{k}={v[k]}" for k in v),
)
def test_options(place: Place, name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    skip_unless_supported(place, dtype, amsgrad=options["amsgrad"])

    def make_params() -> list[Tensor]:
        made = [draw(shape, dtype, seed).to(place.device) for seed, shape in enumerate(SHAPES)]
        return [param.requires_grad_() for param in made]

    options = {"lr": 0.02, **options}
    assert_agree(name, place, make_params, options, steps=4)
    options |= {"betas": (0.5, 0.8), "eps": 1e-3}
    assert_agree(name, place, make_params, options, steps=4)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_default_options(name: str, place: Place) -> None:
    def make_params() -> list[Tensor]:
        return [draw((33,), torch.float32, 1).to(place.device).requires_grad_()]

    assert_agree(name, place, make_params, {})


@pytest.mark.parametrize("amsgrad", [False, True])
def test_groups_with_options_of_their_own(place: Place, amsgrad: bool) -> None:
    def make_groups() -> list[dict[str, Any]]:
        a, b, c = (draw((9,), torch.float32, seed).to(place.device) for seed in range(3))
        return [
            {"params": [a.requires_grad_()], "lr": 0.1, "weight_decay": 0.2},
            {"params": [b.requires_grad_()], "betas": (0.2, 0.4), "maximize": True},
            {"params": [c.requires_grad_()], "eps": 1e-2, "amsgrad": not amsgrad},
        ]

    ours, theirs = make_groups(), make_groups()
    optimizer = adamal_kernels.Adam(ours, backend=place.backend, amsgrad=amsgrad)
    torchs = torch.optim.Adam(theirs, foreach=False, amsgrad=amsgrad)
    for step in range(STEPS):
        for group, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            for param in (*our["params"], *their["params"]):
                param.grad = grad_of(step, group, param)
        optimizer.step()
        torchs.step()
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our["params"][0], their["params"][0])


@pytest.mark.parametrize("amsgrad", [False, True])
def test_intermittent_gradients(place: Place, amsgrad: bool) -> None:
    """Each parameter counts its own steps."""

    def make_params() -> list[Tensor]:
        made = [draw((5,), torch.float32, seed).to(place.device) for seed in range(4)]
        return [param.requires_grad_() for param in made]

    def grads(step: int, index: int, param: Tensor) -> Tensor | None:
        return None if step and (step + index) % 3 == 0 else grad_of(step, index, param)

    assert_agree("Adam", place, make_params, {"lr": 0.1, "amsgrad": amsgrad}, grads)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
}


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("param_layout", LAYOUTS)
def test_layouts(place: Place, param_layout: str, grad_layout: str) -> None:
    """torch's own fused kernel on the CPU is wrong here, in silence."""

    def make_params() -> list[Tensor]:
        values = draw((2, 3, 4, 5), torch.float32, 1).to(place.device)
        return [LAYOUTS[param_layout](values).requires_grad_()]

    def grads(step: int, index: int, param: Tensor) -> Tensor:
        return LAYOUTS[grad_layout](grad_of(step, index, param))

    assert_agree("Adam", place, make_params, {"lr": 0.1, "weight_decay": 0.1}, grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_sixteen_bit_parameters(place: Place, name: str, dtype: torch.dtype) -> None:
    """One step equals torch's in float32, rounded to the type: torch's moments are 16-bit ones."""
    place.skip_unless_supported(Format(dtype, dtype), SecondMoment.PLAIN)
    ours = draw((999,), torch.float32, 1).to(place.device, dtype)
    theirs = ours.float()
    ours.grad = draw((999,), torch.float32, 2).to(place.device, dtype)
    theirs.grad = ours.grad.float()
    ours.requires_grad_()
    getattr(adamal_kernels, name)([ours], lr=0.1, backend=place.backend).step()
    getattr(torch.optim, name)([theirs.requires_grad_()], lr=0.1, foreach=False).step()
    torch.testing.assert_close(ours, theirs.to(dtype))


def test_training_follows_torch(place: Place) -> None:
    """Gradients of the optimizer's own making: a small network, both optimizers in turn."""
    inputs, targets = draw((64, 6), torch.float64, 1), draw((64, 2), torch.float64, 2)
    place.skip_unless_supported(Format(torch.float64, torch.float64), SecondMoment.PLAIN)
    losses = []
    for make in (
        lambda params: adamal_kernels.Adam(params, lr=0.01, backend=place.backend),
        lambda params: torch.optim.Adam(params, lr=0.01, foreach=False),
    ):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
        ).to(place.device, torch.float64)
        optimizer = make(model.parameters())
        for _ in range(30):
            optimizer.zero_grad()
            difference = model(inputs.to(place.device)) - targets.to(place.device)
            loss = difference.square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1])
