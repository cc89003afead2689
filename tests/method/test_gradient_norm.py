"""The norm of all gradients: one order of sums, and so the same bits on every backend."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction

import pytest
import torch
from helpers.error_bounds import error_bound
from helpers.support import Place, name_of
from torch import Tensor

from adamal_kernels import AdamAL
from adamal_kernels.core.norm import LANES, chunk_elements, squared_norm
from adamal_kernels.core.storage import FORMATS, Format, compute_dtype
from adamal_kernels.verify import same_bits

# About a chunk of either compute type, and about a work item of the CPU's.
SIZES = (1, 2, 1023, 1024, 1025, 2047, 2048, 2049, 16383, 16384, 16385)
MORE_CHUNKS_THAN_LANES = 257 * 2048 + 77


def draw(size: int | tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)


def params_like(grads: Sequence[Tensor | None], dtypes: Format, place: Place) -> list[Tensor]:
    """Return parameters with copies of ``grads``; of one element where there is none."""
    params = []
    for grad in grads:
        like = torch.zeros(1) if grad is None else grad
        param = torch.zeros_like(like, dtype=dtypes.param, device=place.device).requires_grad_()
        param.grad_dtype = dtypes.grad
        if grad is not None:
            param.grad = grad.to(place.device, copy=True)
        params.append(param)
    return params


def norms_of(place: Place, *groups: Sequence[Tensor], steps: int = 3) -> list[Tensor]:
    """Return the norm that each of ``steps`` steps finds; the first is checked, later ones not."""
    optimizer = AdamAL(
        [{"params": params} for params in groups], backend=place.backend, max_grad_norm=1.0
    )
    norms = []
    for _ in range(steps):
        optimizer.step()
        assert optimizer.last_grad_norm is not None
        norms.append(optimizer.last_grad_norm.cpu())
    assert [norm.dtype for norm in norms] == [torch.float64] * steps
    return norms


def tree(values: list[float]) -> float:
    """Add pairs of neighbours until one is left; ``values`` are as many as a power of two."""
    while len(values) > 1:
        values = [a + b for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def written_out(grad: Tensor, chunk: int) -> float:
    """Return the sum of squares in the documented order, in Python's floats."""
    squares = [value * value for value in grad.double().tolist()]
    squares += [0.0] * (-len(squares) % chunk)
    lanes = [0.0] * LANES
    for i, first in enumerate(range(0, len(squares), chunk)):
        lanes[i % LANES] += tree(squares[first : first + chunk])
    return tree(lanes)


@pytest.mark.parametrize("dtypes", FORMATS, ids=name_of)
def test_bits_are_those_of_the_documented_order(place: Place, dtypes: Format) -> None:
    place.skip_unless_supported(dtypes)
    sizes = (*SIZES, MORE_CHUNKS_THAN_LANES) if dtypes in FORMATS[:3] else SIZES
    chunk = chunk_elements(compute_dtype(dtypes.param))
    expected, _ = sums_of_squares(sizes, dtypes.grad, chunk)
    grads = [draw(size, dtypes.grad, seed) for seed, size in enumerate(sizes)]
    found = norms_of(place, params_like(grads, dtypes, place), steps=2)
    assert [norm.item() for norm in found] == [math.sqrt(expected)] * 2


@functools.cache
def sums_of_squares(sizes: tuple[int, ...], dtype: torch.dtype, chunk: int) -> tuple[float, float]:
    """Return the sum of squares in the documented order, and of one after another."""
    expected, plain = 0.0, 0.0
    for seed, size in enumerate(sizes):
        grad = draw(size, dtype, seed)
        expected += written_out(grad, chunk)
        for value in grad.double().tolist():  # sum() compensates, from Python 3.12 on
            plain += value * value
    return expected, plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_other_orders_give_other_bits(dtype: torch.dtype) -> None:
    """The bits above mean something: the sum of one square after another misses them."""
    expected, plain = sums_of_squares((2049, 16385), dtype, chunk_elements(dtype))
    assert plain != expected


def exact_sum_of_squares(grads: Sequence[Tensor]) -> Fraction:
    return sum((Fraction(x) ** 2 for grad in grads for x in grad.double().tolist()), Fraction(0))


@pytest.mark.parametrize("dtypes", FORMATS, ids=name_of)
@pytest.mark.parametrize("size", [1, 2049, 16385])
def test_is_near_the_exact_sum(dtypes: Format, size: int) -> None:
    """A square, its way up two trees and along a lane, and the tensors' sum: all positive."""
    grads = [draw(size, dtypes.grad, seed) * 10.0**seed for seed in (-3, 0, 3)]
    compute = compute_dtype(dtypes.param)
    chunk = chunk_elements(compute)
    levels = int(math.log2(chunk)) + int(math.log2(LANES))
    roundings = 1 + levels + math.ceil(size / chunk / LANES) + len(grads)
    exact = exact_sum_of_squares(grads)
    found = Fraction(squared_norm(grads, compute).item())
    assert abs(found - exact) <= exact * Fraction(error_bound(roundings))
    assert found > 0


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: torch.stack([x, x], dim=-1)[..., 1],
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "expanded": lambda x: x[:1].expand(x.shape),
    "negated": lambda x: torch.complex(x, -x).conj().imag,
}


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("param_layout", ["contiguous", "transposed", "channels_last", "strided"])
def test_layouts(place: Place, param_layout: str, grad_layout: str) -> None:
    """Squares are added in the order in which the parameter lies in memory."""
    values = draw((6, 8, 7, 11), torch.float32)
    grad = LAYOUTS[grad_layout](values)
    param = LAYOUTS[param_layout](values.clone().to(place.device)).detach().requires_grad_()
    in_order = grad.contiguous()
    if param_layout in ("transposed", "channels_last"):
        in_order = LAYOUTS[param_layout](grad)
        order = sorted(range(4), key=lambda dim: -in_order.stride(dim))
        in_order = in_order.permute(order)
        assert in_order.is_contiguous()
    expected = math.sqrt(written_out(in_order.flatten(), chunk_elements(torch.float32)))
    param.grad = grad.to(place.device)
    assert [norm.item() for norm in norms_of(place, [param])] == [expected] * 3


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_gradients_are_pairs_of_reals(place: Place, dtype: torch.dtype) -> None:
    grad = torch.randn(2048, dtype=dtype, generator=torch.Generator().manual_seed(0))
    param = torch.zeros_like(grad, device=place.device).requires_grad_()
    param.grad = grad.to(place.device)
    pairs = torch.view_as_real(grad).flatten()
    expected = math.sqrt(written_out(pairs, chunk_elements(dtype.to_real())))
    assert [norm.item() for norm in norms_of(place, [param])] == [expected] * 3


def test_one_without_a_gradient_changes_nothing(place: Place) -> None:
    dtypes = FORMATS[0]
    grads = [draw(size, torch.float32, size) for size in (2049, 0, 5, 16385)]
    with_gaps = [grads[0], None, grads[1], grads[2], None, grads[3]]
    params = [params_like(made, dtypes, place) for made in (grads, with_gaps)]
    found = [norms_of(place, made)[-1] for made in params]
    assert same_bits(found[0], found[1])


def test_gradients_that_come_and_go_between_steady_steps(place: Place) -> None:
    params = params_like([draw(3000, torch.float32, seed) for seed in range(4)], FORMATS[0], place)
    grads = [param.grad for param in params]
    optimizer = AdamAL(params, backend=place.backend, max_grad_norm=1.0)
    optimizer.step()
    for missing in ({0}, {1, 3}, set(), {0, 1, 2, 3}):
        present = [grad for i, grad in enumerate(grads) if i not in missing]
        for i, param in enumerate(params):
            param.grad = None if i in missing else grads[i]
        optimizer.step()
        assert optimizer.last_grad_norm is not None
        expected = math.sqrt(squared_norm(present, torch.float32).item())
        assert optimizer.last_grad_norm.item() == expected


def test_kinds_of_tensors_are_added_in_one_order(place: Place) -> None:
    """Sorted, whatever comes first: after the large one, each of the small ones would be lost."""
    pairs = sorted([*FORMATS[:3], FORMATS[6]], key=repr)
    for dtypes in pairs:
        place.skip_unless_supported(dtypes)
    small = torch.tensor([1.8984375 * 2.0**-27], dtype=torch.float64)
    params = [
        params_like([g.to(dtypes.grad)], dtypes, place)[0]
        for dtypes, g in zip(pairs, (small, small, small, torch.ones(3)), strict=True)
    ]
    squares = [float((p.grad.double() ** 2).sum()) for p in params if p.grad is not None]
    a, b, c, large = squares
    expected = math.sqrt(((a + b) + c) + large)
    assert expected > math.sqrt(((large + a) + b) + c) == math.sqrt(3)
    for order in ((3, 2, 1, 0), (1, 3, 0, 2), (0, 1, 2, 3)):
        groups = [[params[i]] for i in order]
        assert [norm.item() for norm in norms_of(place, *groups)] == [expected] * 3


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_bits_do_not_hang_on_the_number_of_threads(dtype: torch.dtype) -> None:
    place = Place(torch.device("cpu"), "cpu")
    grads = [draw(size, dtype, size) for size in (400_003, 5, 262_144, 16_385)]
    found = []
    for count in (1, 2, 3, 4):
        with threads(count):
            found += norms_of(place, params_like(grads, Format(dtype, dtype), place), steps=2)
    assert len({norm.item() for norm in found}) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 2048, 2999])
def test_what_is_not_finite_is_seen(place: Place, value: float, at: int) -> None:
    """In the first step, whose gradients are checked, and in the third, whose are not."""
    params = params_like([draw(10, torch.float32), draw(3000, torch.float32)], FORMATS[0], place)
    optimizer = AdamAL(params, backend=place.backend, max_grad_norm=1.0)
    for spoiled in (True, False, False, True):
        grad = params[1].grad
        assert grad is not None
        grad[at] = value if spoiled else 1.0
        optimizer.step()
        assert optimizer.last_grad_norm is not None
        norm = optimizer.last_grad_norm.item()
        expected = (
            abs(value)
            if spoiled
            else math.sqrt(squared_norm([p.grad for p in params], torch.float32))
        )
        assert norm == expected or (math.isnan(norm) and math.isnan(expected))


def test_float64_squares_overflow_to_infinity_and_float32_ones_do_not(place: Place) -> None:
    for dtypes, value, expected in (
        (FORMATS[0], 2.0**127, 2.0**128),
        (FORMATS[1], 2.0**600, math.inf),
    ):
        grads = [torch.full((4,), value, dtype=dtypes.grad)]
        norms = norms_of(place, params_like(grads, dtypes, place))
        assert [norm.item() for norm in norms] == [expected] * 3


def test_of_no_elements_is_0(place: Place) -> None:
    norms = norms_of(place, params_like([torch.empty(0), torch.zeros(9)], FORMATS[0], place))
    norms += norms_of(place, params_like([torch.empty(0)], FORMATS[0], place))
    norms += norms_of(place, params_like([None], FORMATS[0], place))
    assert [norm.item() for norm in norms] == [0] * len(norms)


@pytest.mark.parametrize("dtypes", FORMATS, ids=name_of)
def test_gradients_are_not_written(place: Place, dtypes: Format) -> None:
    place.skip_unless_supported(dtypes)
    grads = [draw(size, dtypes.grad, size) * 100 for size in (5, 2049, 16385)]
    params = params_like(grads, dtypes, place)
    held = [param.grad for param in params]
    versions = [grad._version for grad in held]
    norms_of(place, params)
    assert [param.grad is grad for param, grad in zip(params, held, strict=True)] == [True] * 3
    assert [grad._version for grad in held] == versions
    assert all(same_bits(a, b) for a, b in zip(held, grads, strict=True))
