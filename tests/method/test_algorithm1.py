"""The method: Algorithm 1 as printed, what it promises of v and the set, and where Adam fails."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers.property_testing import given, settings, st
from helpers.support import Place, name_of
from torch import Tensor

from adamal_kernels import Adam, AdamAL, Box, NonNegative
from adamal_kernels.core.storage import FORMATS, Format
from adamal_kernels.verify import same_bits
from adamal_kernels.verify.oracle import TOLERANCES, is_within

DOUBLE = Format(torch.float64, torch.float64)
SINGLE = Format(torch.float32, torch.float32)

ELEMENTS = 3


def vectors(elements: st.SearchStrategy[float]) -> st.SearchStrategy[list[list[float]]]:
    """Gradients of some steps, for a parameter of ``ELEMENTS``."""
    return st.lists(st.lists(elements, min_size=ELEMENTS, max_size=ELEMENTS), min_size=1)


ANY_FLOAT = st.floats(width=32)
# Neither so small that a square vanishes nor so unequal that rounding is all that is left.
ORDINARY = st.one_of(st.floats(1e-3, 1), st.floats(-1, -1e-3))


def new_param(place: Place, values: list[float], dtypes: Format) -> Tensor:
    param = torch.tensor(values, dtype=dtypes.param, device=place.device).requires_grad_()
    if dtypes.grad != dtypes.param:
        param.grad_dtype = dtypes.grad
    return param


def set_grad(param: Tensor, values: list[float], dtypes: Format) -> None:
    param.grad = torch.tensor(values, dtype=torch.float64).to(param.device, dtypes.grad)


def algorithm1(
    x: list[float],
    grads: list[list[float]],
    alpha: float,
    beta1: float,
    beta2: float,
    lower: float = -math.inf,
    upper: float = math.inf,
) -> tuple[np.ndarray, np.ndarray]:
    """Lines 2 to 9 of Algorithm 1 in float64; line 7 with ``beta2``, as in equation 18."""
    x_t = np.array(x)
    m = np.zeros_like(x_t)
    v = np.zeros_like(x_t)
    for g in map(np.array, grads):
        m = beta1 * m + (1 - beta1) * g
        g_hat = np.maximum(g**2, v)
        v = beta2 * v + (1 - beta2) * g_hat
        x_t = np.clip(x_t - alpha / np.sqrt(v) * m, lower, upper)
    return x_t, v


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.9), (0.0, 0.5)], ids=str)
@pytest.mark.parametrize("bounds", [(-math.inf, math.inf), (-0.25, 0.5)], ids=str)
@given(grads=vectors(ORDINARY))
@settings(max_examples=15, deadline=None)
def test_is_algorithm_1(
    place: Place,
    betas: tuple[float, float],
    bounds: tuple[float, float],
    grads: list[list[float]],
) -> None:
    """Equal betas make it the algorithm with line 7 as printed, where beta1 stands for beta2."""
    place.skip_unless_supported(DOUBLE)
    start = [0.5, -0.25, 0.0]
    param = new_param(place, start, DOUBLE)
    optimizer = AdamAL(
        [param],
        lr=1e-2,
        betas=betas,
        eps=0.0,
        bias_correction=False,
        projection=Box(*bounds),
        backend=place.backend,
    )
    for values in grads:
        set_grad(param, values, DOUBLE)
        optimizer.step()
    x, v = algorithm1(start, grads, 1e-2, *betas, *bounds)
    for_params, for_moments = TOLERANCES[torch.float64]
    assert is_within(param, x, for_params)
    assert is_within(optimizer.state[param]["exp_avg_sq"], v, for_moments)


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("cls", [AdamAL, Adam])
def test_zero_by_zero_stays(place: Place, cls: type, bias_correction: bool) -> None:
    """Zero gradients from zero moments; afterwards the parameter moves as if they had not been."""
    param = new_param(place, [1.0, -0.0, 3e-39], SINGLE)
    start = param.detach().clone()
    optimizer = cls([param], eps=0.0, bias_correction=bias_correction, backend=place.backend)
    for zero in (0.0, -0.0, 0.0):
        set_grad(param, [zero] * ELEMENTS, SINGLE)
        optimizer.step()
        assert same_bits(param, start)
    set_grad(param, [1.0, 0.0, -1.0], SINGLE)
    optimizer.step()
    assert (param != start).tolist() == [True, False, True]
    assert param.isfinite().all()


def test_bias_correction_makes_the_first_step_lr(place: Place) -> None:
    """Corrected it is lr whatever the gradient; uncorrected, (1-beta1)/sqrt(1-beta2) times that."""
    place.skip_unless_supported(DOUBLE)
    for correct, factor in ((True, 1.0), (False, 0.1 / math.sqrt(0.001))):
        param = new_param(place, [0.0, 0.0, 0.0], DOUBLE)
        optimizer = AdamAL(
            [param], lr=0.01, eps=0.0, bias_correction=correct, backend=place.backend
        )
        set_grad(param, [5.0, -0.1, 1e-6], DOUBLE)
        optimizer.step()
        expected = torch.tensor([-0.01, 0.01, -0.01], dtype=torch.float64) * factor
        torch.testing.assert_close(param.detach().cpu(), expected)


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("dtypes", FORMATS, ids=name_of)
@given(grads=vectors(ANY_FLOAT), beta2=st.sampled_from([0.0, 0.5, 0.9, 0.999, 1 - 2.0**-24]))
@settings(max_examples=8, deadline=None)
def test_v_never_decreases(
    place: Place,
    dtypes: Format,
    bias_correction: bool,
    grads: list[list[float]],
    beta2: float,
) -> None:
    """Whatever the gradients are: NaN leaves v alone, and infinity is the end of it."""
    place.skip_unless_supported(dtypes)
    param = new_param(place, [0.5, -0.25, 0.0], dtypes)
    optimizer = AdamAL(
        [param], betas=(0.9, beta2), bias_correction=bias_correction, backend=place.backend
    )
    last = torch.zeros_like(param, dtype=torch.float64)
    for values in grads:
        set_grad(param, values, dtypes)
        optimizer.step()
        v = optimizer.state[param]["exp_avg_sq"].double()
        assert (v >= last).all(), (v, last)
        last = v


@st.composite
def boxes(draw: st.DrawFn) -> Box | NonNegative:
    lo = draw(st.one_of(st.just(-math.inf), st.floats(-1.5, 0.5)))
    hi = draw(st.one_of(st.just(math.inf), st.floats(max(lo, -1.0) + 0.01, 1.5)))
    return draw(st.sampled_from([Box(lo, hi), NonNegative()]))


@pytest.mark.parametrize("dtypes", FORMATS, ids=name_of)
@given(
    projection=boxes(),
    start=st.lists(st.floats(-2, 2), min_size=ELEMENTS, max_size=ELEMENTS),
    grads=vectors(st.one_of(ORDINARY, ANY_FLOAT)),
    options=st.fixed_dictionaries(
        {
            "lr": st.sampled_from([1e-3, 0.1, 3.0]),
            "weight_decay": st.sampled_from([0.0, 0.1]),
            "decoupled_weight_decay": st.booleans(),
            "maximize": st.booleans(),
            "bias_correction": st.booleans(),
            "eps": st.sampled_from([0.0, 1e-8]),
        }
    ),
)
@settings(max_examples=15, deadline=None)
def test_box_step_is_feasible_and_the_clamp_of_the_free_step(
    place: Place,
    dtypes: Format,
    projection: Box | NonNegative,
    start: list[float],
    grads: list[list[float]],
    options: dict[str, Any],
) -> None:
    place.skip_unless_supported(dtypes)
    param, free_param = new_param(place, start, dtypes), new_param(place, start, dtypes)
    optimizer = AdamAL([param], projection=projection, backend=place.backend, **options)
    free = AdamAL([free_param], backend=place.backend, **options)
    lower, upper = projection.bounds(dtypes.param)
    lo, hi = getattr(projection, "lo", 0.0), getattr(projection, "hi", math.inf)
    for values in grads:
        # The free step starts from where the projected one is.
        with torch.no_grad():
            free_param.copy_(param)
        set_grad(param, values, dtypes)
        set_grad(free_param, values, dtypes)
        optimizer.step()
        free.step()
        inside = (lo <= param.double()) & (param.double() <= hi)
        assert (inside | param.isnan()).all()
        # Bounds are numbers of the type, and rounding is monotone: it may come before the clamp,
        # but for a zero's sign (+ 0.0 takes that off).
        expected = torch.where(free_param < lower, lower, free_param)
        expected = torch.where(expected > upper, upper, expected)
        assert same_bits(param + 0.0, expected.to(dtypes.param) + 0.0)
        for name, value in optimizer.state[param].items():
            assert same_bits(value, free.state[free_param][name]), name


def test_lr_zero_does_not_project(place: Place) -> None:
    """Tools for checkpoints take such a step to have the state made."""
    param = new_param(place, [3.0, -3.0, 0.5], SINGLE)
    start = param.detach().clone()
    optimizer = AdamAL([param], lr=0.0, projection=Box(-1, 1), backend=place.backend)
    set_grad(param, [1.0, 1.0, 1.0], SINGLE)
    optimizer.step()
    assert same_bits(param, start)
    optimizer.param_groups[0]["lr"] = 1e-3
    optimizer.step()
    assert param.tolist()[:2] == [1.0, -1.0]


def test_reddis_example(place: Place) -> None:
    """Gradients average above zero, so that -1 is the best point of [-1, 1]. Adam ends at +1."""
    place.skip_unless_supported(DOUBLE)
    large = 4.0
    ends = {}
    for cls in (Adam, AdamAL):
        param = new_param(place, [0.0], DOUBLE)
        optimizer = cls(
            [param],
            lr=0.1,
            betas=(0.0, 1 / (1 + large**2)),
            eps=0.0,
            bias_correction=False,
            projection=Box(-1, 1),
            backend=place.backend,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / math.sqrt(t + 1))
        for step in range(900):
            set_grad(param, [large if step % 3 == 0 else -1.0], DOUBLE)
            optimizer.step()
            schedule.step()
        # Within the last cycle it wanders by no more than two steps against the trend.
        ends[cls] = (param.item(), 2 * optimizer.param_groups[0]["lr"])
    adam, wander = ends[Adam]
    assert adam >= 1 - wander
    adamal, wander = ends[AdamAL]
    assert adamal <= -1 + wander
