"""Steps that autograd differentiates through."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.support import refused
from torch import Tensor, nn

import adamal_kernels
from adamal_kernels import Adam, AdamAL, AdamALW, AdamW, Box
from adamal_kernels.verify import different_values, same_bits

STEPS = 4
CLASSES = (AdamAL, AdamALW, Adam, AdamW)


def draw(seed: int, size: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, dtype=torch.float64, generator=generator)


def inputs(size: int = 5) -> dict[str, Tensor]:
    """Return what a run may be differentiated with respect to."""
    made = {
        "lr": torch.tensor(0.05, dtype=torch.float64),
        "beta1": torch.tensor(0.8, dtype=torch.float64),
        "beta2": torch.tensor(0.9, dtype=torch.float64),
        "param": draw(1, size),
        "scale": draw(2, size),
    }
    return {name: value.requires_grad_() for name, value in made.items()}


def run(make: Any, given: dict[str, Tensor], steps: int = STEPS, **options: Any) -> Tensor:
    """Return the parameter after some steps; gradients hang on it and on ``scale``."""
    param = given["param"].clone()
    betas = (given["beta1"], given["beta2"])
    optimizer = make([param], lr=given["lr"], betas=betas, differentiable=True, **options)
    for step in range(steps):
        # Kept in the graph: the gradient of a loss of the parameter as it stands.
        param.grad = given["scale"] * param.clone() ** 2 + draw(10 + step, param.numel())
        optimizer.step()
    return param


OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "maximize": True, "eps": 1e-3},
    # One step of it: torch's own graph breaks in the second.
    {"amsgrad": True, "steps": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_derivatives_are_torchs(name: str, options: dict[str, Any]) -> None:
    """Of all that a step depends on, through several steps."""
    found = []
    for module in (adamal_kernels, torch.optim):
        given = inputs()
        param = run(getattr(module, name), given, **options)
        (param * draw(3)).sum().backward()
        found.append((param.detach(), {name: value.grad for name, value in given.items()}))
    torch.testing.assert_close(*found)
    # In the first step the betas and the size of the gradient cancel.
    seen = ("lr", "param") if options.get("steps") == 1 else found[0][1]
    assert [name for name in seen if found[0][1][name].abs().min() < 1e-6] == []


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (AdamAL, {}),
        (AdamAL, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
        (AdamAL, {"weight_decay": 0.1, "maximize": True, "bias_correction": False}),
        (AdamAL, {"projection": Box(-0.9, 0.9)}),
        (AdamAL, {"max_grad_norm": 2.0}),
        (Adam, {"amsgrad": True}),
    ],
    ids=str,
)
def test_derivatives_are_those_of_differences(cls: type, options: dict[str, Any]) -> None:
    """At a point away from where g*g crosses v, and the parameter the box."""
    given = inputs(4)

    def stepped(*values: Tensor) -> Tensor:
        return run(cls, dict(zip(given, values, strict=True)), 3, **options)

    assert torch.autograd.gradcheck(stepped, tuple(given.values()))


def test_derivatives_of_derivatives() -> None:
    given = inputs(2)

    def stepped(*values: Tensor) -> Tensor:
        return run(AdamAL, dict(zip(given, values, strict=True)), 2)

    assert torch.autograd.gradgradcheck(stepped, tuple(given.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", CLASSES)
def test_values_are_those_of_the_plain_step(cls: type, dtype: torch.dtype) -> None:
    shapes = ((3, 4), (), (0,), (2, 3, 4, 5), (6, 7))
    starts = [draw(i, math.prod(shape)).view(shape).to(dtype) for i, shape in enumerate(shapes)]
    starts[3] = starts[3].contiguous(memory_format=torch.channels_last)
    starts[4] = starts[4].t()[::2]
    params = [[start.clone(memory_format=torch.preserve_format) for start in starts] for _ in "ab"]
    options = {"lr": 0.1, "weight_decay": 0.1, "projection": Box(-1, 1)}
    optimizers = [cls(params[0], differentiable=True, **options), cls(params[1], **options)]
    for step in range(STEPS):
        for both, optimizer in zip(params, optimizers, strict=True):
            for i, param in enumerate(both):
                values = draw(100 * step + i, param.numel()).view(param.shape)
                param.grad = None if (step + i) % 3 == 2 else values.to(dtype)
            optimizer.step()
    found, expected = (
        [{"param": param, **optimizer.state[param]} for param in both]
        for both, optimizer in zip(params, optimizers, strict=True)
    )
    assert different_values(found, expected) == []
    assert optimizers[0].backends_used == ("reference",)


def test_the_norm_is_differentiated() -> None:
    """Clipping is part of the step: its factor has a derivative, and last_grad_norm no graph."""
    given = inputs()
    param = given["param"].clone()
    optimizer = AdamAL([param], differentiable=True, max_grad_norm=0.5, eps=1.0)
    param.grad = given["scale"] * 3
    optimizer.step()
    assert optimizer.last_grad_norm is not None
    assert not optimizer.last_grad_norm.requires_grad
    (found,) = torch.autograd.grad(param.sum(), given["scale"])

    scale = given["scale"].detach().clone().requires_grad_()
    grad = scale * 3
    clipped = grad * (0.5 / (grad.norm() + 1e-6))
    stepped = given["param"].detach() - 1e-3 * clipped / (clipped.abs() + 1.0)
    (expected,) = torch.autograd.grad(stepped.sum(), scale)
    torch.testing.assert_close(found, expected)


def test_a_leaf_is_refused_as_torch_refuses_it() -> None:
    """In the words of torch's own error; what came before it is as it was."""
    messages = []
    for make in (AdamAL, torch.optim.Adam):
        first, leaf = draw(0).requires_grad_().clone(), nn.Parameter(draw(1))
        optimizer = make([first, leaf], lr=0.1, differentiable=True)
        first.grad, leaf.grad = draw(2), draw(3)
        with pytest.raises(RuntimeError) as caught:
            optimizer.step()
        messages.append(str(caught.value))
    assert messages[1] in messages[0]
    optimizer = AdamAL([first, leaf], lr=0.1, differentiable=True)
    before = first.detach().clone()
    with refused(optimizer, RuntimeError, "a leaf Variable", "params[1] of group 0"):
        optimizer.step()
    assert same_bits(first.detach(), before)
    assert not optimizer.state


def test_gradients_are_enabled_as_torch_enables_them() -> None:
    """Also under no_grad, in which training loops call step()."""
    found = []
    for make in (Adam, torch.optim.Adam):
        given = inputs()
        with torch.no_grad():
            param = given["param"].clone().requires_grad_()
        param = param * 1
        betas = (given["beta1"], given["beta2"])
        optimizer = make([param], lr=given["lr"], betas=betas, differentiable=True)
        param.grad = draw(4)
        with torch.no_grad():
            optimizer.step()
        assert param.requires_grad
        found.append(torch.autograd.grad(param.sum(), given["lr"])[0])
    torch.testing.assert_close(*found)


def test_one_group_of_two() -> None:
    """The other steps as it always does, without a graph."""
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    param, leaf = draw(1).requires_grad_().clone(), nn.Parameter(draw(2))
    groups = [{"params": [leaf]}, {"params": [param], "differentiable": True, "lr": lr}]
    # Non-leaf parameters are what torch.optim.Optimizer asks the defaults about.
    optimizer = AdamAL(groups, lr=0.1, differentiable=True)
    optimizer.param_groups[0]["differentiable"] = False
    for step in range(2):
        param.grad, leaf.grad = draw(3 + step), draw(5 + step)
        optimizer.step()
    assert leaf.is_leaf
    assert not any(value.requires_grad for value in optimizer.state[leaf].values())
    assert torch.autograd.grad(param.sum(), lr)[0] != 0


@pytest.mark.parametrize("other", [{"fused": True}, {"foreach": True}, {"backend": "cpu"}], ids=str)
def test_other_backends_are_refused(other: dict[str, Any]) -> None:
    with pytest.raises((ValueError, RuntimeError), match="differentiable"):
        AdamAL([draw(1)], differentiable=True, **other)
    optimizer = AdamAL([draw(1)], differentiable=True)
    optimizer.param_groups[0].update(other)
    with refused(optimizer, (ValueError, RuntimeError), "differentiable"):  # type: ignore[arg-type]
        optimizer.step()
