"""The methods that the paper compares, by its names; its Adams run through our own kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from adamal_kernels import Adam, AdamAL

__all__ = ["ADAMS", "METHODS", "Method", "denominator_sq"]


@dataclass(frozen=True)
class Method:
    """An optimizer of the comparison."""

    make: Callable[..., Optimizer]
    """``make(params, lr=..., **options)``."""
    lr: float
    """Learning rate where none is tuned. The paper gives none: the usual ones."""
    colour: str
    line: str = "-"


def _vanilla(params: Iterable[Tensor], **options: Any) -> Optimizer:
    return SGD(params, **options)


def _momentum(params: Iterable[Tensor], momentum: float = 0.9, **options: Any) -> Optimizer:
    return SGD(params, momentum=momentum, **options)


def _amsgrad(params: Iterable[Tensor], **options: Any) -> Optimizer:
    return Adam(params, amsgrad=True, **options)


ADAMS: dict[str, Method] = {
    "Adam": Method(Adam, 1e-3, "#2563eb"),
    "AMSGrad": Method(_amsgrad, 1e-3, "#7c3aed"),
    "AdamAL": Method(AdamAL, 1e-3, "#c2410c", "--"),  # Dashed: what lies beneath is seen.
}
METHODS: dict[str, Method] = {
    "VSGD": Method(_vanilla, 0.1, "#64748b"),
    "SGDM": Method(_momentum, 0.01, "#15803d"),
    **ADAMS,
}


def denominator_sq(optimizer: Optimizer, param: Tensor) -> Tensor:
    """Return what the step takes the root of, before bias correction: v, or AMSGrad's maximum."""
    state = optimizer.state[param]
    found = state.get("max_exp_avg_sq", state["exp_avg_sq"])
    assert isinstance(found, torch.Tensor)
    return found
