"""Steps with sets that couple elements, repeated by C++, and right where anything changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from helpers.steady_steps import (
    CHANGES,
    REPEATED,
    Pair,
    checked,  # noqa: F401
    set_option,
)
from helpers.support import Place
from torch import Tensor

from adamal_kernels import Adam, Box, L1Ball, L2Ball, Simplex

PROJECTING = [place for place in REPEATED if place.values[0].backend == "cpu"]
SHAPES = ((3,), (5, 5), (2, 3, 4, 5), (1, 1), (4, 0), (1000,))


@pytest.fixture(params=PROJECTING)
def place(request: pytest.FixtureRequest) -> Place:
    return request.param


def new_pair(place: Place, cls: type = Adam, **options: Any) -> Pair:
    return Pair(place, cls, SHAPES, **options)


def taken_over(pair: Pair, checked: list[str], change: Callable[[Any, list[Tensor]], None]) -> None:  # noqa: F811
    """Check that C++ takes a change over by itself."""
    pair.step(2)
    assert len(checked) == len(SHAPES), "the first step is checked, the second is not"
    pair.both(change)
    pair.step(3)
    pair.assert_equal()
    assert len(checked) == len(SHAPES)


def edit_multiplier(optimizer: Any, params: list[Tensor]) -> None:
    for param in params:
        if param.numel() > 0:  # That of a row of no elements is not written.
            optimizer.state[param]["multiplier"].fill_(3.0)


def change_nothing(optimizer: Any, params: list[Tensor]) -> None:
    pass


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"capturable": True}], ids=str)
@pytest.mark.parametrize("projection", [L2Ball(0.5), L1Ball(0.7, dim=-1), Simplex(dim=0)], ids=str)
@pytest.mark.parametrize(
    "change", [change_nothing, edit_multiplier, set_option("lr", 0.0)], ids=lambda c: c.__name__
)
def test_steps_are_repeated(
    place: Place,
    checked: list[str],  # noqa: F811
    projection: Any,
    options: dict[str, bool],
    change: Callable[[Any, list[Tensor]], None],
) -> None:
    taken_over(new_pair(place, projection=projection, **options), checked, change)


def replace_multiplier(optimizer: Any, params: list[Tensor]) -> None:
    state = optimizer.state[params[1]]
    state["multiplier"] = state["multiplier"].clone().add_(0.5)


def multiplier_of_another_type(optimizer: Any, params: list[Tensor]) -> None:
    state = optimizer.state[params[1]]
    state["multiplier"] = state["multiplier"].float()


def multiplier_of_another_shape(optimizer: Any, params: list[Tensor]) -> None:
    optimizer.state[params[1]]["multiplier"].resize_(2)


def forget_multiplier(optimizer: Any, params: list[Tensor]) -> None:
    del optimizer.state[params[1]]["multiplier"]


def multiplier_first(optimizer: Any, params: list[Tensor]) -> None:
    state = optimizer.state[params[1]]
    rest = {key: state.pop(key) for key in list(state) if key != "multiplier"}
    state.update(rest)
    assert next(iter(state)) == "multiplier"


def transpose_in_place(optimizer: Any, params: list[Tensor]) -> None:
    """The same addresses and sizes, and other rows."""
    held = optimizer.state[params[1]]
    for tensor in (params[1].data, held["exp_avg"], held["exp_avg_sq"]):
        tensor.set_(tensor.untyped_storage(), 0, (5, 5), (1, 5))


def switch_to_another_set(optimizer: Any, params: list[Tensor]) -> None:
    for group in optimizer.param_groups:
        group["projection"] = L1Ball(0.3, dim=0)


OTHERS = [
    replace_multiplier,
    multiplier_of_another_type,
    multiplier_of_another_shape,
    forget_multiplier,
    multiplier_first,
    transpose_in_place,
    switch_to_another_set,
    set_option("projection", Box(-0.1, 0.1)),
    set_option("projection", None, group=1),
]


@pytest.mark.parametrize("change", [*CHANGES, *OTHERS], ids=lambda change: change.__name__)
def test_change_is_seen_on_the_next_step(
    place: Place, change: Callable[[Any, list[Tensor]], None]
) -> None:
    pair = new_pair(place, projection=L2Ball(0.5, dim=-1), weight_decay=0.1)
    pair.step(3)
    pair.both(change)
    pair.step(4)
    pair.assert_equal()


def test_settles_again_after_another_order_of_state(place: Place, checked: list[str]) -> None:  # noqa: F811
    """Of amsgrad, whose state has the most tensors."""
    pair = new_pair(place, projection=L2Ball(0.5, dim=-1), amsgrad=True)
    pair.step(2)
    pair.both(multiplier_first)
    pair.step(2)
    taken = len(checked)
    pair.step(3)
    assert len(checked) == taken
    pair.assert_equal()


def test_the_norm_is_that_of_the_gradients(place: Place, checked: list[str]) -> None:  # noqa: F811
    """Items that are whole rows are none of the norm's."""
    shapes = [(3000, 7), (40_000,), (2, 3, 4, 5), (9, 9), (1,), (1000,)]
    pair = Pair(place, Adam, shapes, projection=L2Ball(0.5, dim=-1))
    pair.both(lambda optimizer, _: optimizer.__setattr__("max_grad_norm", 0.3))
    pair.step(4)
    assert len(checked) == len(shapes)
    found, expected = (optimizer.last_grad_norm for optimizer in pair.optimizers)
    assert found is not None
    assert expected is not None
    assert found.item() == expected.item() > 0.3
    pair.assert_equal()
