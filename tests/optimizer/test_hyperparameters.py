"""The scalars of a step: beta**t to the bit, and every field of the row."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import pytest
from helpers.error_bounds import UNIT, error_bound
from helpers.property_testing import given, st

from adamal_kernels.core.scalars import StepOptions, StepScalars, beta_power, derive_step_scalars

BETAS = (0.0, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999, 1 - UNIT)


@given(st.floats(0.5, 1, exclude_max=True), st.integers(0, 300))
def test_beta_power_is_near_the_fraction(beta: float, exponent: int) -> None:
    exact = Fraction(beta) ** exponent
    assert abs(Fraction(beta_power(beta, exponent)) - exact) <= exact * Fraction(
        error_bound(exponent)
    )


@pytest.mark.parametrize("beta", [0.9, 0.99, 0.999, 0.9999])
@pytest.mark.parametrize("exponent", [1, 2, 3, 100, 4095, 4096, 4097])
def test_beta_power_is_near_the_decimal(beta: float, exponent: int) -> None:
    with localcontext(prec=60):
        exact = Decimal(beta) ** exponent
        found = Decimal(beta_power(beta, exponent))
        assert abs(found - exact) <= exact * Decimal(error_bound(exponent))


def test_beta_power_multiplies_in_a_fixed_order() -> None:
    b = 0.999
    b2 = b * b
    b4 = b2 * b2
    b8 = b4 * b4
    assert beta_power(b, 11) == (b * b2) * b8
    assert beta_power(b, 13) == (b * b4) * b8
    assert beta_power(b, 15) == ((b * b2) * b4) * b8


@pytest.mark.parametrize(
    ("beta", "exponent", "bits"),
    [
        (0.9, 10, "0x1.650bf60432fdap-2"),
        (0.999, 1000, "0x1.788526411edacp-2"),
        (0.999, 12345, "0x1.22391fb9458b0p-18"),
        (0.9999, 100_000, "0x1.7ca6de2fe9a39p-15"),
    ],
)
def test_beta_power_bits(beta: float, exponent: int, bits: str) -> None:
    assert beta_power(beta, exponent).hex() == bits


def test_other_orders_give_other_bits() -> None:
    """The bits above mean something: pow and a running product miss them."""
    exponents = range(1, 1001)
    powers = [beta_power(0.999, exponent) for exponent in exponents]
    running, product = [], 1.0
    for _ in exponents:
        product *= 0.999
        running.append(product)
    assert sum(a != b for a, b in zip(powers, running, strict=True)) > 500
    assert any(power != 0.999**t for t, power in zip(exponents, powers, strict=True))


@pytest.mark.parametrize("beta", BETAS)
def test_beta_power_of_zero_and_one(beta: float) -> None:
    assert beta_power(beta, 0) == 1.0
    assert beta_power(beta, 1) == beta


def scalars(*, step: int = 3, **changes: Any) -> StepScalars:
    """Derive the scalars of the default options, but for ``changes``."""
    options: dict[str, Any] = {
        "lr": 0.01,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "decoupled_weight_decay": False,
        "maximize": False,
        "bias_correction": True,
    }
    return derive_step_scalars(step, StepOptions(**{**options, **changes}))


def test_default_row() -> None:
    assert scalars() == StepScalars(
        one_minus_beta1=1 - 0.9,
        one_minus_beta2=1 - 0.999,
        beta2=0.999,
        step_size=0.01 / (1 - 0.9 * (0.9 * 0.9)),
        bias2_sqrt=math.sqrt(1 - 0.999 * (0.999 * 0.999)),
        eps=1e-8,
        coupled_decay=0.0,
        decay_factor=1.0,
        grad_factor=1.0,
        lower=-math.inf,
        upper=math.inf,
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"bias_correction": False}, {"step_size": 0.01, "bias2_sqrt": 1.0}),
        ({"weight_decay": 0.1}, {"coupled_decay": 0.1}),
        (
            {"weight_decay": 0.1, "decoupled_weight_decay": True},
            {"decay_factor": 1 - 0.01 * 0.1},
        ),
        ({"maximize": True}, {"grad_factor": -1.0}),
        ({"eps": 0.0}, {"eps": 0.0}),
        ({"lower": -1.0, "upper": 2.0}, {"lower": -1.0, "upper": 2.0}),
        ({"lr": 0.0}, {"step_size": 0.0}),
        (
            {"beta1": 0.0, "beta2": 0.0},
            {
                "one_minus_beta1": 1.0,
                "one_minus_beta2": 1.0,
                "beta2": 0.0,
                "step_size": 0.01,
                "bias2_sqrt": 1.0,
            },
        ),
    ],
    ids=lambda value: ",".join(value),
)
def test_an_option_changes_its_fields_only(
    changes: dict[str, Any], expected: dict[str, float]
) -> None:
    assert scalars(**changes) == scalars()._replace(**expected)


def test_bias_corrections_are_of_beta_power() -> None:
    """At every step, of each its own beta; pow would be seen in both."""
    seen = {"step_size": 0, "bias2_sqrt": 0}
    for step in range(1, 1001):
        row = scalars(step=step)
        assert row.step_size == 0.01 / (1 - beta_power(0.9, step))
        assert row.bias2_sqrt == math.sqrt(1 - beta_power(0.999, step))
        seen["step_size"] += row.step_size != 0.01 / (1 - 0.9**step)
        seen["bias2_sqrt"] += row.bias2_sqrt != math.sqrt(1 - 0.999**step)
    assert min(seen.values()) > 0


@pytest.mark.parametrize("beta", BETAS)
def test_bias_correction_of_the_first_step_cancels_the_average(beta: float) -> None:
    """From zero, m = (1-beta1)*g and v = (1-beta2)*g*g: corrected they are g and g*g."""
    row = scalars(step=1, lr=1.0, beta1=beta, beta2=beta)
    assert row.step_size == 1 / row.one_minus_beta1
    assert row.bias2_sqrt == math.sqrt(row.one_minus_beta2)


def test_bias_correction_ends() -> None:
    row = scalars(step=10**7)
    assert (row.step_size, row.bias2_sqrt) == (0.01, 1.0)
