"""The one operation that torch does not round to nearest on every device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["rounded_sqrt"]


def rounded_sqrt(value: Tensor) -> Tensor:
    """Return the correctly rounded square root of a float32 or float64 tensor.

    ``torch.sqrt`` on x86 CPUs is one unit in the last place off for up to a fifth of all values;
    numpy's is the processor's own, which rounds to nearest. Can be differentiated; the derivative
    at 0 is taken as 0.

    Example:
        >>> rounded_sqrt(torch.tensor([2.0, 0.0, float("inf")]))
        tensor([1.4142, 0.0000,    inf])
    """
    if torch.is_grad_enabled() and value.requires_grad:
        return _RoundedSqrt.apply(value)
    return _forward(value)


def _forward(value: Tensor) -> Tensor:
    if value.device.type != "cpu":
        return torch.sqrt(value)
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(
            np.asarray(np.sqrt(value.detach().resolve_neg().contiguous().numpy()))
        )


class _RoundedSqrt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        root = _forward(value)
        ctx.save_for_backward(root)
        return root

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (root,) = ctx.saved_tensors
        return torch.where(root > 0, grad / (2 * root), 0.0)
