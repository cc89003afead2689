"""Steady steps over so many tensors that torch's threads share the look at them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adamal_kernels import AdamAL
from adamal_kernels.step import stepper as stepper_module
from adamal_kernels.verify import different_values

TENSORS = 2100
SIZES = [1 + i % 5 for i in range(TENSORS)]
# In another share than the first thread's.
FAR = 1300


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Many:
    """An optimizer over small tensors, and gradients that depend on the step's number alone."""

    def __init__(self, backend: str = "cpu", *, group_each: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(sum(SIZES), generator=generator).split(SIZES)
        self.params = [values.clone().requires_grad_() for values in start]
        groups = [{"params": [p]} for p in self.params] if group_each else self.params
        self.optimizer = AdamAL(groups, backend=backend)
        self.taken = 0

    def step(self, times: int = 1, *, without: int | None = None) -> None:
        for _ in range(times):
            self.taken += 1
            generator = torch.Generator().manual_seed(self.taken)
            grads = torch.randn(sum(SIZES), generator=generator).split(SIZES)
            for i, (p, grad) in enumerate(zip(self.params, grads, strict=True)):
                p.grad = None if i == without else grad.clone()
            self.optimizer.step()

    def values(self) -> list[dict[str, Any]]:
        return [{"param": p, **self.optimizer.state[p]} for p in self.params]


def replace_a_state_tensor(many: Many) -> None:
    state = many.optimizer.state[many.params[-1]]
    state["exp_avg_sq"] = state["exp_avg_sq"].clone() + 1


def replace_a_state(many: Many) -> None:
    state = many.optimizer.state
    state[many.params[FAR]] = {k: v.clone() for k, v in state[many.params[FAR]].items()}
    state[many.params[FAR]]["exp_avg"] -= 1


def replace_a_storage(many: Many) -> None:
    many.params[FAR].data = many.params[FAR].data + 1


def reorder_the_state(many: Many) -> None:
    state = many.optimizer.state
    state[many.params[FAR]] = state.pop(many.params[FAR])


def rename_a_state(many: Many) -> None:
    """Leave all where it was, but for whose the last state is: its parameter begins anew."""
    state = many.optimizer.state
    state[torch.zeros(1)] = state.pop(many.params[-1])


def change_an_option(many: Many) -> None:
    many.optimizer.param_groups[-1]["lr"] = 0.5


def take_a_parameter_out(many: Many) -> None:
    many.optimizer.param_groups[-1]["params"].pop()


def replace_a_list_of_parameters(many: Many) -> None:
    group = many.optimizer.param_groups[-1]
    group["params"] = list(group["params"])
    many.step()
    group["params"].pop()


def leave_a_gradient_out(many: Many) -> None:
    many.step(without=TENSORS - 1)


CHANGES = [
    replace_a_state_tensor,
    replace_a_state,
    replace_a_storage,
    reorder_the_state,
    rename_a_state,
    leave_a_gradient_out,
]
CHANGES_OF_GROUPS = [change_an_option, take_a_parameter_out, replace_a_list_of_parameters]


@pytest.mark.parametrize(
    ("change", "group_each"),
    [(change, False) for change in CHANGES + CHANGES_OF_GROUPS]
    + [(change, True) for change in CHANGES_OF_GROUPS],
    ids=lambda value: value.__name__ if callable(value) else f"group_each={value}",
)
def test_a_change_anywhere_is_seen(change: Callable[[Many], None], group_each: bool) -> None:
    found = []
    for backend in ("cpu", "reference"):
        many = Many(backend, group_each=group_each)
        many.step(3)
        change(many)
        many.step(2)
        found.append(many.values())
    assert different_values(*found) == []


def test_nothing_changed_is_no_python_work(monkeypatch: pytest.MonkeyPatch) -> None:
    many = Many()
    many.step(3)

    def refuse(*arguments: Any) -> None:
        raise AssertionError("checked in Python")

    monkeypatch.setattr(stepper_module, "check_entry", refuse)
    many.step(3)
    rename_a_state(many)
    with pytest.raises(AssertionError, match="checked in Python"):
        many.step()


def test_what_is_watched() -> None:
    found = []
    for backend in ("cpu", "reference"):
        many = Many(backend)
        many.step(2)
        watch = many.optimizer.watch()
        many.step(3)
        found.append([statistics.as_tensor() for statistics in watch.read().values()])
    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)


def test_a_refused_step_leaves_all_as_it_was() -> None:
    many = Many()
    many.step(3)
    counts = [many.optimizer.state[p]["step"].item() for p in many.params]
    versions = [p._version for p in many.params]
    before = [p.detach().clone() for p in many.params]
    many.optimizer.state[many.params[-1]]["exp_avg"] = torch.zeros(1000)
    for p in many.params:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="exp_avg"):
        many.optimizer.step()
    assert [many.optimizer.state[p]["step"].item() for p in many.params] == counts
    assert [p._version for p in many.params] == versions
    torch.testing.assert_close([p.detach() for p in many.params], before, rtol=0, atol=0)


class Refuse(TorchDispatchMode):
    """Fails where a number is read from a tensor."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("no number is read here")
        return func(*args, **(kwargs or {}))


def test_an_error_while_the_others_are_woken_leaves_all_as_it_was() -> None:
    """Options are read then, and reading a tensor may call Python."""
    found = []
    for backend in ("cpu", "reference"):
        many = Many(backend)
        many.optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
        many.step(3)
        if backend == "cpu":
            versions = [p._version for p in many.params]
            with Refuse(), pytest.raises(RuntimeError, match="no number is read"):
                many.optimizer.step()
            assert [p._version for p in many.params] == versions
        many.step(2)
        found.append(many.values())
    assert different_values(*found) == []
