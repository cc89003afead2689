"""Parameters in memory: those that share elements are refused, those that do not are stepped."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import Place, refused
from torch import Tensor, nn

from adamal_kernels import AdamAL
from adamal_kernels.verify import same_bits

BASE = torch.arange(60.0)

# Views of one tensor; the last two, where there are two, overlap.
OVERLAPS: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "the same twice": lambda x: [x.view(-1), x.view(60)],
    "ends": lambda x: [x[:10], x[9:20]],
    "within": lambda x: [x[20:30], x[:40]],
    "rows and columns": lambda x: [x.view(6, 10)[:, 3], x.view(6, 10)[2]],
    "other strides": lambda x: [x[::2], x[::3]],
    "a column and its end, with another between": lambda x: [
        x.view(20, 3)[:, 0],
        x.view(20, 3)[:, 1],
        x.view(20, 3)[5:, 0],
    ],
    "an expanded one": lambda x: [x[:1].expand(5)],
    "one of overlapping windows": lambda x: [x[:10].unfold(0, 3, 1)],
}

APART: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "halves": lambda x: [x[:30], x[30:]],
    "even and odd": lambda x: [x[::2], x[1::2]],
    "columns": lambda x: list(x.view(6, 10).unbind(1)),
    "blocks of columns": lambda x: list(x.view(6, 10).split(5, dim=1)),
    "an empty one": lambda x: [x[3:3], x],
}


def leaves(views: list[Tensor]) -> list[Tensor]:
    return [view.detach().requires_grad_() for view in views]


@pytest.mark.parametrize("kind", OVERLAPS)
def test_parameters_that_share_memory(place: Place, kind: str) -> None:
    params = leaves(OVERLAPS[kind](BASE.to(place.device, copy=True)))
    optimizer = AdamAL(params, backend=place.backend)
    for param in params:
        param.grad = torch.ones_like(param)
    with refused(optimizer, ValueError, "share memory", "params[", "clone()"):
        optimizer.step()


@pytest.mark.parametrize("kind", APART)
def test_parameters_that_lie_beside_each_other(place: Place, kind: str) -> None:
    base = BASE.to(place.device, copy=True)
    params = leaves(APART[kind](base))
    optimizer = AdamAL(params, lr=0.5, backend=place.backend)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    alone = nn.Parameter(BASE.to(place.device, copy=True))
    alone.grad = torch.ones_like(alone)
    AdamAL([alone], lr=0.5, backend=place.backend).step()
    assert same_bits(base, alone)
