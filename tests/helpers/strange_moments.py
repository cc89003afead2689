"""What a step watches of second moments that no step makes, but a checkpoint may hold."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# Ordinary ones among them.
STRANGE_MOMENTS = (-4.0, -0.0, 0.0, 1e-40, 1e-30, 1.0, 4.0, 1e30, math.inf, math.nan, -math.inf)


def watch_strange_moments(
    backend: str, device: torch.device, cls: type, **options: Any
) -> list[Tensor]:
    """Return what ``backend`` watches of parameters with such moments, step by step."""
    params = [torch.ones(5, device=device, requires_grad=True) for _ in STRANGE_MOMENTS]
    optimizer = cls(params, backend=backend, **options)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, moment in zip(params, STRANGE_MOMENTS, strict=True):
        for name in optimizer.state[p].keys() & {"exp_avg_sq", "max_exp_avg_sq"}:
            optimizer.state[p][name][3] = moment
    watch = optimizer.watch()
    found = []
    for scale in (0.0, 0.0, 1.0, 0.5):
        for p in params:
            p.grad = torch.arange(5.0, device=device) * scale
        optimizer.step()
        found += [statistics.as_tensor() for statistics in watch.read().values()]
    return found
