"""Two optimizers that take the same steps, one of them repeated by C++."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch

from adamal_kernels import AdamAL, Box
from adamal_kernels.backends import FUSED
from adamal_kernels.step import stepper as stepper_module
from adamal_kernels.verify import different_values
from helpers.support import PLACES, Place

SHAPES = ((3,), (4, 5), (2, 3, 4, 5), (), (0,), (1000,))


class Pair:
    """Two optimizers over equal parameters: the one under test, and reference, never steady."""

    def __init__(
        self,
        place: Place,
        cls: type = AdamAL,
        shapes: Sequence[tuple[int, ...]] = SHAPES,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        start = [torch.randn(shape).to(place.device) for shape in shapes]
        start[2] = start[2].contiguous(memory_format=torch.channels_last)
        self.params = [[p.clone().requires_grad_() for p in start] for _ in range(2)]
        self.optimizers = [
            cls(
                [{"params": params[:4]}, {"params": params[4:], "lr": 0.05}],
                backend=backend,
                **options,
            )
            for params, backend in zip(self.params, (place.backend, "reference"), strict=True)
        ]
        self.taken = 0

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.taken += 1
            for params, optimizer in zip(self.params, self.optimizers, strict=True):
                generator = torch.Generator().manual_seed(self.taken)
                for p in params:
                    values = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                    p.grad = torch.empty_like(p, requires_grad=False).copy_(values)
                optimizer.step()

    def both(self, change: Callable[[Any, list[torch.Tensor]], None]) -> None:
        for params, optimizer in zip(self.params, self.optimizers, strict=True):
            change(optimizer, params)

    def assert_equal(self) -> None:
        found, expected = (
            [{"param": p, **optimizer.state[p]} for p in params]
            for params, optimizer in zip(self.params, self.optimizers, strict=True)
        )
        assert different_values(found, expected) == []


REPEATED = [p for p in PLACES if p.values[0].backend in FUSED]

# For tests of other modules, whose places are all there are.
on_places_of_steady_steps = pytest.mark.parametrize("place", REPEATED)


@pytest.fixture
def new_pair(place: Place) -> Callable[..., Pair]:
    return partial(Pair, place)


@pytest.fixture
def checked(place: Place, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parameters that Python has checked, of the optimizer under test."""
    seen: list[str] = []
    check_entry = stepper_module.check_entry

    def recording(param: torch.Tensor, options: Any, where: str, *more: Any) -> Any:
        if options.backend == place.backend:
            seen.append(where)
        return check_entry(param, options, where, *more)

    monkeypatch.setattr(stepper_module, "check_entry", recording)
    return seen


def set_option(name: str, value: Any, group: int = 0) -> Callable[[Any, Any], None]:
    def change(optimizer: Any, params: Any) -> None:
        optimizer.param_groups[group][name] = value

    change.__name__ = f"{name}={value}"
    return change


def with_gradients_missing(optimizer: Any, params: list[torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(77)
    for i, p in enumerate(params):
        values = torch.randn(p.shape, generator=generator)
        p.grad = None if i % 2 else torch.empty_like(p, requires_grad=False).copy_(values)
    optimizer.step()


def skip_all(optimizer: Any, params: list[torch.Tensor]) -> None:
    optimizer.zero_grad()
    optimizer.step()


def replace_storage(optimizer: Any, params: list[torch.Tensor]) -> None:
    params[1].data = params[1].data.clone() + 1


def replace_storage_transposed(optimizer: Any, params: list[torch.Tensor]) -> None:
    params[1].data = params[1].data.t().contiguous().t()


def replace_moment(optimizer: Any, params: list[torch.Tensor]) -> None:
    state = optimizer.state[params[0]]
    state["exp_avg"] = state["exp_avg"].clone().mul_(2)


def replace_second_moment_transposed(optimizer: Any, params: list[torch.Tensor]) -> None:
    state = optimizer.state[params[1]]
    state["exp_avg_sq"] = state["exp_avg_sq"].t().contiguous().t()


def swap_moment_storage(optimizer: Any, params: list[torch.Tensor]) -> None:
    moment = optimizer.state[params[5]]["exp_avg"]
    moment.set_(moment.clone().mul_(3))


def swap_moment_tensor(optimizer: Any, params: list[torch.Tensor]) -> None:
    moment = optimizer.state[params[5]]["exp_avg"]
    torch.utils.swap_tensors(moment, moment.clone().mul_(3))


def replace_dict_of_state(optimizer: Any, params: list[torch.Tensor]) -> None:
    state = dict(optimizer.state[params[0]])
    optimizer.state[params[0]] = state
    optimizer.step()
    state["exp_avg"] = state["exp_avg"].clone().mul_(2)


def swap_step_storage(optimizer: Any, params: list[torch.Tensor]) -> None:
    optimizer.state[params[0]]["step"].data = torch.tensor(7.0)


def replace_step(optimizer: Any, params: list[torch.Tensor]) -> None:
    optimizer.state[params[0]]["step"] = torch.tensor(100.0)


def edit_step_in_place(optimizer: Any, params: list[torch.Tensor]) -> None:
    optimizer.state[params[0]]["step"].fill_(50)


def clear_state(optimizer: Any, params: list[torch.Tensor]) -> None:
    optimizer.state.clear()


def forget_one(optimizer: Any, params: list[torch.Tensor]) -> None:
    del optimizer.state[params[1]]


def reorder_state(optimizer: Any, params: list[torch.Tensor]) -> None:
    optimizer.state[params[0]] = optimizer.state.pop(params[0])


def add_group(optimizer: Any, params: list[torch.Tensor]) -> None:
    params.append(torch.ones(6, device=params[0].device, requires_grad=True))
    optimizer.add_param_group({"params": params[-1], "lr": 0.2})


def move_between_groups(optimizer: Any, params: list[torch.Tensor]) -> None:
    first, second = optimizer.param_groups
    second["params"].append(first["params"].pop())


def rebuild_groups(optimizer: Any, params: list[torch.Tensor]) -> None:
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    optimizer.param_groups[0]["lr"] = 0.4


def reload(optimizer: Any, params: list[torch.Tensor]) -> None:
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg"].mul_(5)
    optimizer.load_state_dict(saved)


def to_float64(optimizer: Any, params: list[torch.Tensor]) -> None:
    for p in params:
        p.grad = None
        p.data = p.data.double()


def to_bfloat16(optimizer: Any, params: list[torch.Tensor]) -> None:
    for p in params:
        p.grad = None
        p.data = p.data.bfloat16()


def grow_in_place(optimizer: Any, params: list[torch.Tensor]) -> None:
    optimizer.param_groups[0]["note"] = "a key that is no option"


def freeze_one(optimizer: Any, params: list[torch.Tensor]) -> None:
    optimizer.param_groups[0]["params"].pop(1)


def replace_list_of_parameters(optimizer: Any, params: list[torch.Tensor]) -> None:
    group = optimizer.param_groups[0]
    group["params"] = list(group["params"])
    optimizer.step()
    group["params"].pop(1)


def mutable_betas(optimizer: Any, params: list[torch.Tensor]) -> None:
    optimizer.param_groups[0]["betas"] = [0.7, 0.8]
    optimizer.step()
    optimizer.param_groups[0]["betas"][0] = 0.1


def gradient_of_other_strides(optimizer: Any, params: list[torch.Tensor]) -> None:
    for p in params:
        if p.dim() == 2:
            p.grad = p.grad.t().contiguous().t()
    optimizer.step()


def negated_view_as_gradient(optimizer: Any, params: list[torch.Tensor]) -> None:
    z = torch.complex(torch.ones(1000), torch.arange(1000.0)).to(params[5].device)
    params[5].grad = z.conj().imag
    assert params[5].grad.is_neg()
    optimizer.step()


CHANGES = [
    replace_storage,
    replace_storage_transposed,
    replace_moment,
    replace_second_moment_transposed,
    swap_moment_storage,
    swap_moment_tensor,
    replace_dict_of_state,
    swap_step_storage,
    replace_step,
    edit_step_in_place,
    clear_state,
    forget_one,
    reorder_state,
    add_group,
    move_between_groups,
    rebuild_groups,
    reload,
    to_float64,
    to_bfloat16,
    grow_in_place,
    freeze_one,
    replace_list_of_parameters,
    mutable_betas,
    gradient_of_other_strides,
    negated_view_as_gradient,
    set_option("lr", 1),
    set_option("maximize", True),
    set_option("bias_correction", False),
    set_option("decoupled_weight_decay", True),
    set_option("projection", Box(-0.1, 0.1)),
    set_option("projection", None, group=1),
]
