"""Parameters and optimizers to save, and their way through a file."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from adamal_kernels.core.storage import FORMATS, Format


def through_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def new_params(dtypes: Format = FORMATS[0], device: torch.device | str = "cpu") -> list[Tensor]:
    """Return parameters of several shapes and strides, the same values on every call."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator) for shape in ((), (5,), (3, 4), (0,))]
    made.append(torch.randn(6, 3, generator=generator).t())
    made = [x.to(device, dtypes.param).requires_grad_() for x in made]
    if dtypes.grad != dtypes.param:
        for param in made:
            param.grad_dtype = dtypes.grad
    return made


def train(optimizer: Optimizer, steps: range) -> None:
    """Step with gradients that depend on the step's number alone; some are missing."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        params = [param for group in optimizer.param_groups for param in group["params"]]
        for i, param in enumerate(params):
            values = torch.randn(param.shape, generator=generator)
            dtype = getattr(param, "grad_dtype", None) or param.dtype
            # Laid out as the parameter: torch's fused kernel for CPUs needs it, and does not say.
            grad = torch.empty_like(param, dtype=dtype, requires_grad=False).copy_(values)
            param.grad = None if (step + i) % 5 == 4 else grad
        optimizer.step()


def values_of(optimizer: Optimizer) -> list[dict[str, Tensor]]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [{"param": p.detach(), **optimizer.state.get(p, {})} for p in params]


def copy_params(source: list[Tensor], target: list[Tensor]) -> None:
    with torch.no_grad():
        for theirs, ours in zip(source, target, strict=True):
            ours.copy_(theirs)
