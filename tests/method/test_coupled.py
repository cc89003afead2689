"""Sets that couple elements: the nearest point in the step's metric, on every backend."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers.property_testing import given, settings, st
from helpers.support import Place, refused
from torch import Tensor

from adamal_kernels import Adam, AdamAL, L1Ball, L2Ball, Simplex
from adamal_kernels.backends.eager import sets as coupled
from adamal_kernels.backends.eager.sets import project_rows
from adamal_kernels.core.norm import chunk_elements
from adamal_kernels.core.rows import coupled_rows, inside_tolerance, multiplier_strides
from adamal_kernels.core.storage import Format, compute_dtype
from adamal_kernels.projections import CoupledSet
from adamal_kernels.verify import same_bits
from adamal_kernels.verify.oracle import TOLERANCES, nearest_point

SETS = (L2Ball, L1Ball, Simplex)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CHUNK = chunk_elements(torch.float64)


def project(y: Tensor, d: Tensor, projection: CoupledSet, start: float = 0.0) -> Tensor:
    """Return the nearest points of the rows of ``y``, float64 ``[rows, length]``."""
    rows = coupled_rows(y, projection)
    last = torch.full((len(y),), start, dtype=torch.float64)
    return project_rows(y, d, last, rows, CHUNK)[0]


def size_of(x: Tensor, projection: CoupledSet) -> Tensor:
    """Return each row's norm or sum."""
    if isinstance(projection, L2Ball):
        return torch.linalg.vector_norm(x.double(), dim=1)
    return x.double().abs().sum(dim=1)


def random_rows(rows: int, length: int, seed: int, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    """Return points, and a metric over some powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(rows, length, generator=generator, dtype=torch.float64)
    d = 10 ** (spread * torch.rand(rows, length, generator=generator, dtype=torch.float64) - 2)
    return y, d


problems = given(
    st.sampled_from(SETS),
    st.integers(1, 40),
    st.integers(0, 2**32),
    st.floats(0.01, 30),
    st.floats(0, 6),
)


@problems
@settings(max_examples=150)
def test_the_point_satisfies_the_optimality_conditions(
    cls: type[CoupledSet], length: int, seed: int, size: float, spread: float
) -> None:
    """Karush, Kuhn and Tucker: d * (y - x) is m times the constraint's gradient at x."""
    projection = cls(size, dim=1)
    y, d = random_rows(2, length, seed, spread)
    x = project(y, d, projection)
    scale = (y.abs().amax(1, keepdim=True) + size) * d.amax(1, keepdim=True)
    rtol, atol = TOLERANCES[torch.float64][0]
    near = 100 * (rtol + atol)
    assert (size_of(x, projection) <= size * (1 + near)).all()
    force = d * (y - x)
    if isinstance(projection, L2Ball):
        inside = size_of(y, projection) <= size
        assert same_bits(x[inside], y[inside])
        m = (force * x).sum(1, keepdim=True) / (x * x).sum(1, keepdim=True)
        assert (m[~inside] >= 0).all()
        assert (force - m * x).abs()[~inside].le(near * scale[~inside]).all()
        return
    if isinstance(projection, Simplex):
        assert (x >= 0).all()
        assert (size_of(x, projection) >= size * (1 - near)).all()
    else:
        inside = size_of(y, projection) <= size
        assert same_bits(x[inside], y[inside])
        assert (x * y >= 0).all()
        x, y, d, scale = (t[~inside] for t in (x.abs(), y.abs(), d, scale))
        force = d * (y - x)
    # Where x > 0 the force is the multiplier, elsewhere it is at most that.
    for of_row, positive, most in zip(force, x > 0, scale, strict=True):
        assert positive.any()
        m = of_row[positive].mean()
        assert (of_row[positive] - m).abs().max() <= near * most
        assert (of_row - m).max() <= near * most
        assert isinstance(projection, Simplex) or m >= 0


@problems
def test_the_point_is_the_oracle_s(
    cls: type[CoupledSet], length: int, seed: int, size: float, spread: float
) -> None:
    projection = cls(size, dim=1)
    y, d = random_rows(2, length, seed, spread)
    found = project(y, d, projection)
    expected = nearest_point(y.numpy(), d.numpy(), projection)
    rtol, atol = TOLERANCES[torch.float64][0]
    scale = float(y.abs().max()) + size
    np.testing.assert_allclose(found.numpy(), expected, rtol=100 * rtol, atol=100 * atol * scale)


@problems
def test_the_map_is_nonexpansive_in_its_metric(
    cls: type[CoupledSet], length: int, seed: int, size: float, spread: float
) -> None:
    projection = cls(size, dim=1)
    y, d = random_rows(2, length, seed, spread)
    x = project(y, d[:1].expand(2, -1).contiguous(), projection)
    after, before = ((d[0] * (t[0] - t[1]) ** 2).sum().sqrt() for t in (x, y))
    assert after <= before * (1 + 1e-9)


@pytest.mark.parametrize("cls", SETS)
@pytest.mark.parametrize(
    "start", [0.0, 1e-300, 1e-3, 1.0, 1e6, math.inf, -math.inf, math.nan, -5.0]
)
def test_the_point_is_the_same_from_every_start(cls: type[CoupledSet], start: float) -> None:
    y, d = random_rows(20, 300, 0)
    projection = cls(2.0, dim=1)
    found, expected = project(y, d, projection, start), project(y, d, projection)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("cls", SETS)
def test_hard_problems_end(cls: type[CoupledSet]) -> None:
    """Metrics over two hundred powers of ten, sizes far from the points', zeros, equal elements."""
    exponents = torch.linspace(-100, 100, 500, dtype=torch.float64)
    y = torch.stack(
        [
            torch.ones(500),
            torch.logspace(-30, 30, 500),
            torch.zeros(500).index_fill_(0, torch.tensor([3]), 1e30),
            torch.full((500,), 1e-3),
        ]
    ).double()
    for d in (10**exponents, 10 ** (-exponents), torch.ones(500), torch.zeros(500)):
        metric = d.double().expand(4, -1).contiguous()
        for size in (1e-20, 1.0, 1e20):
            x = project(y, metric, cls(size, dim=1))
            assert (size_of(x, cls(size)) <= size * (1 + 1e-9)).all()
            assert x.isfinite().all()
            if cls is Simplex:
                # What is left of y after m / d is taken away is y's own rounding at best.
                rounding = 1e-13 * y.abs().amax(1)
                assert (x.sum(1) >= size * (1 - 1e-9) - rounding).all()


LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Any]] = {
    # shape, order of the dimensions in memory, dim
    "whole": ((6, 7), (0, 1), None),
    "number": ((), (), None),
    "rows": ((6, 7), (0, 1), 1),
    "columns": ((6, 7), (0, 1), 0),
    "rows, transposed": ((6, 7), (1, 0), -1),
    "middle": ((4, 5, 6), (0, 1, 2), 1),
    "outer": ((4, 5, 6), (0, 1, 2), (0, 2)),
    "channels last, filters": ((3, 4, 2, 5), (0, 2, 3, 1), (1, 2, 3)),
    "channels last, channels": ((3, 4, 2, 5), (0, 2, 3, 1), 1),
    "shuffled": ((3, 4, 2, 5), (2, 0, 3, 1), (0, 1)),
    "chunks": ((3, 5000), (0, 1), 1),
    "long": ((40_000,), (0,), 0),
    "long rows": ((2, 33_000), (0, 1), 1),
    "long columns": ((17_000, 2), (0, 1), 0),
    "no rows": ((0, 5), (0, 1), 1),
}


def laid_out(
    shape: tuple[int, ...], order: tuple[int, ...], seed: int, dtype: torch.dtype
) -> Tensor:
    """Return random values whose dimensions lie in memory in ``order``."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    inverse = [order.index(dim) for dim in range(len(order))]
    return values.permute(order).contiguous().permute(inverse)


def run(
    place: Place,
    layout: str,
    projection: CoupledSet | None,
    dtype: torch.dtype,
    steps: int = 4,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor], Adam]:
    """Take some steps; return the parameter, its state and the optimizer."""
    shape, order, _ = LAYOUTS[layout]
    param = laid_out(shape, order, 0, dtype).to(place.device).requires_grad_()
    optimizer = AdamAL([param], lr=0.05, projection=projection, backend=place.backend, **options)
    for step in range(steps):
        param.grad = laid_out(shape, order, 1 + step, dtype).to(place.device)
        optimizer.step()
    return param.detach(), optimizer.state[param], optimizer


@pytest.mark.parametrize("cls", SETS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_backend_gives_the_bits_of_the_reference(
    place: Place, layout: str, cls: type[CoupledSet], dtype: torch.dtype
) -> None:
    place.skip_unless_supported(Format(dtype, dtype))
    size = {L2Ball: 0.7, L1Ball: 1.5, Simplex: 1.5}[cls]
    projection = cls(size, dim=LAYOUTS[layout][2])
    param, held, _ = run(place, layout, projection, dtype)
    expected, expected_held, _ = run(Place(place.device, "reference"), layout, projection, dtype)
    assert same_bits(param, expected)
    assert held.keys() == expected_held.keys() == {"step", "exp_avg", "exp_avg_sq", "multiplier"}
    assert [key for key in held if not same_bits(held[key], expected_held[key])] == []


@pytest.mark.parametrize("cls", SETS)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "no rows"])
def test_a_step_ends_in_the_set_and_at_the_nearest_point(
    place: Place, layout: str, cls: type[CoupledSet]
) -> None:
    dim = LAYOUTS[layout][2]
    projection = cls(0.7, dim=dim)
    outside, held, _ = run(place, layout, None, torch.float64, 1)
    found, _, optimizer = run(place, layout, projection, torch.float64, 1)
    group = optimizer.param_groups[0]
    bias2 = 1 - group["betas"][1]
    d = (held["exp_avg_sq"].cpu().numpy() / bias2) ** 0.5 + group["eps"]
    expected = nearest_point(outside.cpu().numpy(), d, projection)
    rtol, atol = TOLERANCES[torch.float64][0]
    np.testing.assert_allclose(found.cpu().numpy(), expected, rtol=10 * rtol, atol=10 * atol)


@pytest.mark.parametrize("cls", SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_projected_point_stays(place: Place, cls: type[CoupledSet], dtype: torch.dtype) -> None:
    """To the bit: a step that does not move projects nothing a second time."""
    place.skip_unless_supported(Format(dtype, dtype))
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, 64, generator=generator, dtype=torch.float64).to(dtype)
    param = values.clone().to(place.device).requires_grad_()
    optimizer = Adam(
        [param], lr=1.0, betas=(0.0, 0.9), projection=cls(0.9, dim=1), backend=place.backend
    )
    param.grad = torch.zeros_like(param)
    optimizer.step()
    once = param.detach().clone()
    assert not same_bits(once, values)
    limit = 0.9 * (1 + inside_tolerance(dtype))
    assert (size_of(once, cls(0.9)) <= limit).all()
    optimizer.step()
    assert same_bits(param, once)


@pytest.mark.parametrize("cls", SETS)
def test_rows_that_are_not_finite_are_left_alone(place: Place, cls: type[CoupledSet]) -> None:
    values = torch.full((3, 4), 2.0)
    values[0, 1], values[2, 3] = math.nan, -math.inf
    param = values.clone().to(place.device).requires_grad_()
    optimizer = AdamAL([param], lr=0.1, projection=cls(1.0, dim=1), backend=place.backend)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    found = param.detach().cpu()
    assert same_bits(found[0], values[0])
    assert (found[1] < 1).all()
    if cls is Simplex:  # of which -inf is as far as any negative number
        assert found[2].tolist() == pytest.approx([1 / 3] * 3 + [0])
    else:
        assert same_bits(found[2], values[2])


def test_what_is_not_stepped_is_not_projected(place: Place) -> None:
    with_grad, without = (torch.full((4,), 2.0, device=place.device).requires_grad_() for _ in "ab")
    optimizer = AdamAL([with_grad, without], lr=0.0, projection=L2Ball(1.0), backend=place.backend)
    with_grad.grad = torch.ones_like(with_grad)
    optimizer.step()
    assert with_grad.tolist() == without.tolist() == [2.0] * 4, "a learning rate of 0"
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert with_grad.tolist() == [0.5] * 4
    optimizer.step()
    assert without.tolist() == [2.0] * 4
    without.grad = torch.zeros_like(without)
    optimizer.step()
    assert without.tolist() == [0.5] * 4


def test_a_skipped_step_projects_nothing(place: Place) -> None:
    param = torch.full((4,), 2.0, device=place.device).requires_grad_()
    optimizer = AdamAL(
        [param], projection=L2Ball(1.0), backend=place.backend, max_grad_norm=1.0, capturable=True
    )
    for grad, expected in ((math.inf, 2.0), (0.0, 0.5), (math.nan, 0.5)):
        param.grad = torch.full_like(param, grad)
        optimizer.step()
        assert param.tolist() == [expected] * 4
    assert optimizer.skipped_steps.item() == 2


def test_a_resumed_run_has_the_same_bits(place: Place) -> None:
    """The multiplier is in the checkpoint."""
    projection = L2Ball(0.7, dim=1)
    _, _, optimizer = run(place, "rows", projection, torch.float32, 5)
    param = optimizer.param_groups[0]["params"][0]
    assert (optimizer.state[param]["multiplier"] > 0).any()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copied = param.detach().clone().requires_grad_()
    resumed = AdamAL([copied], backend=place.backend)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.param_groups[0]["projection"] == projection
    for p, o in ((param, optimizer), (copied, resumed)):
        for step in range(3):
            p.grad = laid_out((6, 7), (0, 1), 50 + step, torch.float32).to(place.device)
            o.step()
    assert same_bits(copied, param)
    held, expected = resumed.state[copied], optimizer.state[param]
    assert [key for key in expected if not same_bits(held[key], expected[key])] == []


def test_sets_come_and_go_in_a_running_group(place: Place) -> None:
    _, _, optimizer = run(place, "rows", L2Ball(0.7, dim=1), torch.float32)
    group = optimizer.param_groups[0]
    param = group["params"][0]
    for projection in (L1Ball(0.3), Simplex(dim=0), None, L2Ball(0.2, dim=0), L2Ball(0.1, dim=0)):
        group["projection"] = projection
        for _ in range(2):
            param.grad = torch.full_like(param, 0.1)
            optimizer.step()
        if projection is not None:
            dim = tuple(range(2)) if projection.dim is None else projection.dim
            x = param.detach().double()
            found = x.norm(dim=dim) if isinstance(projection, L2Ball) else x.abs().sum(dim=dim)
            assert (found <= projection.size * (1 + 1e-6)).all()
            assert isinstance(projection, L2Ball) or found.cpu().numpy() == pytest.approx(
                projection.size, rel=1e-6
            )
            assert found.max().item() == pytest.approx(projection.size, rel=1e-6)


def test_a_replaced_multiplier_counts(place: Place) -> None:
    """Whatever it holds, the point is the nearest; another shape is another set's."""
    _, held, optimizer = run(place, "rows", L2Ball(0.7, dim=1), torch.float64)
    param = optimizer.param_groups[0]["params"][0]
    for value in (
        torch.full((6, 1), math.nan),
        torch.full((6, 1), 1e9, dtype=torch.float64, device=place.device),
        torch.zeros(3),
        held["multiplier"].t().contiguous().t(),
    ):
        held["multiplier"] = value
        before = copy.deepcopy(held)
        twin = param.detach().clone().requires_grad_()
        other = AdamAL([twin], lr=0.05, projection=L2Ball(0.7, dim=1), backend="reference")
        other.state[twin].update({k: v for k, v in before.items() if k != "multiplier"})
        twin.grad = torch.ones_like(twin)
        other.step()
        param.grad = torch.ones_like(param)
        optimizer.step()
        torch.testing.assert_close(param, twin, rtol=1e-12, atol=1e-14)
        multiplier = held["multiplier"]
        assert multiplier.dtype == torch.float64
        assert multiplier.shape == (6, 1)


def test_multipliers_lie_in_the_order_of_the_rows() -> None:
    param = laid_out((3, 4, 5), (2, 0, 1), 0, torch.float32)
    assert param.stride() == (4, 1, 12)
    assert multiplier_strides(param, L2Ball(1.0, dim=1)) == (1, 1, 3)
    assert coupled_rows(param, L2Ball(1.0, dim=1))[3:] == (((15, 4),), ((4, 1),))
    assert compute_dtype(param.dtype) == torch.float32


class TestRefusals:
    """An error that names the argument, the value and the remedy; nothing is changed."""

    @pytest.mark.parametrize(
        ("shape", "projection", "words"),
        [
            ((3, 4), L2Ball(1.0, dim=2), ["dim=2", "params[0]", "from -2 to 1"]),
            ((3, 4), L1Ball(1.0, dim=(0, -3)), ["dim=-3", "params[0]"]),
            ((3, 4), Simplex(dim=(1, -1)), ["twice", "params[0]"]),
            ((), Simplex(dim=1), ["dim=1", "from -1 to 0"]),
            ((0,), Simplex(), ["no elements", "(0,)", "projection=None"]),
            ((3, 0), Simplex(dim=1), ["no elements", "(3, 0)"]),
        ],
        ids=str,
    )
    def test_sets_that_do_not_fit(
        self, shape: tuple[int, ...], projection: CoupledSet, words: list[str]
    ) -> None:
        param = torch.zeros(shape, requires_grad=True)
        with pytest.raises(ValueError, match="projection") as caught:
            AdamAL([param], projection=projection)
        assert [word for word in words if word not in str(caught.value)] == []
        optimizer = AdamAL([param])
        optimizer.param_groups[0]["projection"] = projection
        param.grad = torch.zeros_like(param)
        with refused(optimizer, ValueError, *words):
            optimizer.step()

    def test_a_total_beyond_the_type(self) -> None:
        param = torch.zeros(3, dtype=torch.float16, requires_grad=True)
        with pytest.raises(ValueError, match=r"70000.*float16.*65504"):
            AdamAL([param], projection=Simplex(70000))

    def test_a_total_that_the_type_rounds_to_0(self) -> None:
        param = torch.zeros(3, dtype=torch.float16, requires_grad=True)
        with pytest.raises(ValueError, match=r"1e-08.*float16.*larger total"):
            AdamAL([param], projection=Simplex(1e-8))

    @pytest.mark.parametrize("value", ["no tensor", torch.zeros(6, dtype=torch.int64)], ids=repr)
    def test_a_checkpoint_whose_multiplier_is_none(self, value: Any) -> None:
        place = Place(torch.device("cpu"), "reference")
        _, _, optimizer = run(place, "rows", L2Ball(0.7, dim=1), torch.float32)
        saved = optimizer.state_dict()
        saved["state"][0] = {**saved["state"][0], "multiplier": value}
        with refused(optimizer, ValueError, "multiplier of parameter 0", "floating-point"):
            optimizer.load_state_dict(saved)

    def test_complex_parameters(self) -> None:
        param = torch.zeros(3, dtype=torch.complex64, requires_grad=True)
        with pytest.raises(TypeError, match=r"complex64.*L2Ball"):
            AdamAL([param], projection=L2Ball(1.0))

    def test_differentiable(self) -> None:
        param = torch.zeros(3, requires_grad=True)
        with pytest.raises(ValueError, match=r"differentiable=True.*L1Ball"):
            AdamAL([param], projection=L1Ball(1.0), differentiable=True)

    @pytest.mark.parametrize("value", ["no tensor", torch.zeros((), dtype=torch.int64)], ids=repr)
    def test_a_multiplier_that_is_none(self, value: Any) -> None:
        place = Place(torch.device("cpu"), "reference")
        _, held, optimizer = run(place, "rows", L2Ball(0.7, dim=1), torch.float32)
        held["multiplier"] = value
        with refused(optimizer, ValueError, "multiplier", "params[0]", "delete it"):
            optimizer.step()

    def test_rows_in_too_many_runs(self) -> None:
        param = torch.zeros((2,) * 10, requires_grad=True)
        with pytest.raises(NotImplementedError, match="reshape"):
            AdamAL([param], projection=L2Ball(1.0, dim=(0, 2, 4, 6, 8)))


@pytest.mark.parametrize("projection", [L2Ball(1.0), L1Ball(1.0), Simplex(1.0)], ids=repr)
def test_it_stays_at_a_solution_on_the_boundary(place: Place, projection: CoupledSet) -> None:
    """There the gradient is normal to the set; the Euclidean projection would move away."""
    curvature = torch.tensor([100.0, 10.0, 1.0, 0.1], dtype=torch.float64)
    target = torch.tensor([0.5, 1.0, -1.5, 3.0], dtype=torch.float64)
    solution = torch.from_numpy(nearest_point(target.numpy(), curvature.numpy(), projection))
    param = solution.clone().to(place.device).requires_grad_()
    optimizer = AdamAL([param], lr=0.01, projection=projection, backend=place.backend)
    for _ in range(50):
        param.grad = (curvature * (param.detach().cpu() - target)).to(place.device)
        optimizer.step()
        torch.testing.assert_close(param.detach().cpu(), solution, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        param.fill_(-0.2)
    for _ in range(800):
        param.grad = (curvature * (param.detach().cpu() - target)).to(place.device)
        optimizer.step()
    torch.testing.assert_close(param.detach().cpu(), solution, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["in backward", "compiled"])
def test_other_ways_to_step_give_the_same_bits(place: Place, way: str) -> None:
    torch.manual_seed(0)
    projection = L2Ball(0.7, dim=-1)
    models = [torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)]
    models[1].load_state_dict(models[0].state_dict())
    plain, other = (
        AdamAL(
            model.to(place.device).parameters(),
            lr=0.1,
            maximize=True,
            projection=projection,
            backend=place.backend,
        )
        for model in models
    )
    step = torch.compile(other.step, backend="eager") if way == "compiled" else other.step
    if way == "in backward":
        other.step_in_backward()
    for _ in range(3):
        batch = torch.randn(4, 5, device=place.device)
        for model, optimizer in zip(models, (plain, other), strict=True):
            optimizer.zero_grad()
            model(batch).square().sum().backward()
        plain.step()
        if way == "compiled":
            step()
    assert (plain.state[models[0].weight]["multiplier"] > 0).any()
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        assert same_bits(first, second)
        held, expected = other.state[second], plain.state[first]
        assert [key for key in expected if not same_bits(held[key], expected[key])] == []


def test_a_second_step_is_not_checked_in_python(place: Place) -> None:
    """The steady state takes sets, and sees a multiplier that was replaced."""
    _, held, optimizer = run(place, "rows", L2Ball(0.7, dim=1), torch.float32)
    steady = optimizer._stepper._steady_state
    assert (steady is not None) == (place.backend not in ("reference", "foreach"))
    param = optimizer.param_groups[0]["params"][0]
    held["multiplier"] = held["multiplier"].clone()
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert steady is None or optimizer._stepper._steady_state is not steady


@pytest.mark.parametrize(
    ("projection", "fraction"),
    [(L2Ball(1.0, dim=1), 0.5), (L1Ball(1.0, dim=1), 0.5), (Simplex(dim=1), 0.25)],
    ids=repr,
)
def test_watched_steps_project(place: Place, projection: CoupledSet, fraction: float) -> None:
    values = torch.tensor([[0.25, 0.25, 0.25, 0.25], [3.0, 3.0, -3.0, -3.0]])
    if not isinstance(projection, Simplex):
        values[0, 3] = 0.1
    params = [values.clone().to(place.device).requires_grad_() for _ in range(2)]
    watched, plain = (
        AdamAL([param], lr=1e-8, projection=projection, backend=place.backend) for param in params
    )
    watch = watched.watch()
    for _ in range(3):
        for param, optimizer in zip(params, (watched, plain), strict=True):
            param.grad = torch.full_like(param, 1e-3)
            optimizer.step()
    assert same_bits(*params)
    seen = watch.read()[params[0]]
    assert seen.boundary_fraction == fraction
    assert seen.watched_steps == 3


@pytest.mark.parametrize("cls", SETS)
def test_a_search_in_an_infinite_metric_ends(place: Place, cls: type[CoupledSet]) -> None:
    """Of the second moments that have overflowed: nothing can move, and the row is left alone."""
    values = torch.tensor([3.0, -2.0, 0.5])
    param = values.clone().to(place.device).requires_grad_()
    optimizer = AdamAL([param], lr=0.1, projection=cls(1.0), backend=place.backend)
    param.grad = torch.full_like(param, 1e30)
    optimizer.step()
    assert same_bits(param.detach().cpu(), values)


def test_a_search_starts_where_the_last_one_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a checkpoint was loaded, and not where another set has other rows."""
    starts: list[Tensor] = []

    def recorded(y: Tensor, d: Tensor, last: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
        starts.append(last.clone())
        return project_rows(y, d, last, *more)

    monkeypatch.setattr(coupled, "project_rows", recorded)
    place = Place(torch.device("cpu"), "reference")
    param, held, optimizer = run(place, "rows", L2Ball(0.7, dim=1), torch.float32, steps=1)
    (group,) = optimizer.param_groups
    first = held["multiplier"].flatten().clone()
    assert (first > 0).all()

    def step(stepped: Adam) -> None:
        (stepped_param,) = stepped.param_groups[0]["params"]
        stepped_param.grad = torch.ones_like(stepped_param)
        stepped.step()

    saved = copy.deepcopy(optimizer.state_dict())
    step(optimizer)
    resumed = AdamAL([param.clone().requires_grad_()], backend="reference")
    resumed.load_state_dict(saved)
    step(resumed)
    group["projection"] = L2Ball(0.7, dim=0)
    step(optimizer)
    expected = [torch.zeros(6), first, first, torch.zeros(7)]
    assert all(map(same_bits, starts, [start.double() for start in expected]))
    assert len(starts) == len(expected)
