"""Parameters in memory: those that share elements are refused, those that do not are stepped."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.property_testing import given, st
from helpers.support import Place, refused
from torch import Tensor, nn

from adamal_kernels import AdamAL
from adamal_kernels.core.layout import overlapping_pair
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
    "halves of experts' fused weights": lambda x: list(x.view(2, 5, 6).chunk(2, dim=-1)),
    "the last dimension": lambda x: list(x.view(2, 5, 6).unbind(-1)),
    "heads": lambda x: list(x.view(5, 3, 4).unbind(1)),
    "real and imaginary parts": lambda x: [
        torch.view_as_complex(x.view(30, 2)).real,
        torch.view_as_complex(x.view(30, 2)).imag,
    ],
    "of unequal strides": lambda x: [x[::4], x[1::2], x[2::4]],
    "a block and columns beside it": lambda x: [x.view(6, 10)[:, :7], *x.view(6, 10)[:, 7:].T],
}


@st.composite
def views(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.float64]))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    strides = [draw(st.sampled_from([0, 1, 2, 3, 4, 6, 8, 12, 24])) for _ in shape]
    return MEMORY.view(dtype).as_strided(shape, strides, draw(st.integers(0, 30)))


MEMORY = torch.zeros(1000, dtype=torch.float64)


def bytes_of(view: Tensor) -> list[set[int]]:
    """Return the bytes of each element."""
    size = view.element_size()
    places = [view.storage_offset()]
    for n, stride in zip(view.shape, view.stride(), strict=True):
        places = [place + stride * i for place in places for i in range(n)]
    return [set(range(place * size, (place + 1) * size)) for place in places]


@given(st.lists(views(), min_size=1, max_size=3), st.lists(views(), max_size=1))
def test_overlaps_are_what_the_elements_say(written: list[Tensor], read: list[Tensor]) -> None:
    elements = [bytes_of(view) for view in (*written, *read)]
    own = [set().union(*each) for each in elements]
    expected = {
        (i, j)
        for i in range(len(written))
        for j in range(i + 1, len(own))
        if not own[i].isdisjoint(own[j])
    }
    expected |= {
        (i, i) for i in range(len(written)) if len(own[i]) < sum(len(e) for e in elements[i])
    }
    found = overlapping_pair(written, read)
    assert (found in expected) if expected else (found is None)


def test_long_views() -> None:
    x = torch.zeros(6_000_000)
    assert overlapping_pair([x[::3], x[1::3], x[2::6], x[5::6]]) is None
    assert overlapping_pair([x[::2_000_001], x[1::3]]) is None
    assert overlapping_pair([x[::2], x[1::3]]) == (0, 1)


def test_thousands_of_views_are_told_apart_in_little_time() -> None:
    parts = torch.zeros(3, 2, 512).unbind(-1)
    assert overlapping_pair(parts) is None
    assert overlapping_pair([*parts, parts[77][1:]]) == (77, 512)


@pytest.mark.parametrize("beside", [True, False])
def test_a_gradient_in_the_storage_of_its_parameter(place: Place, beside: bool) -> None:
    memory = torch.ones(8, device=place.device)
    param = memory[:4].detach().requires_grad_()
    optimizer = AdamAL([param], lr=0.5, backend=place.backend)
    for _ in range(3):
        param.grad = torch.ones(4, device=place.device)
        optimizer.step()
    param.grad = memory[4:] if beside else memory[2:6]
    steady = optimizer._stepper._steady_state
    if not beside:
        with refused(optimizer, ValueError, "the gradient of params[0]", "share memory"):
            optimizer.step()
        return
    optimizer.step()
    assert optimizer._stepper._steady_state is steady
    assert optimizer.state[param]["step"].item() == 4
    assert torch.equal(memory[4:], torch.ones(4, device=place.device))


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
