"""Steady steps over so many tensors that torch's threads share the look at them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from adamal_kernels import AdamAL
from adamal_kernels import plan as plan_module
from adamal_kernels.verify import different_values

TENSORS = 2100
SIZES = [1 + i % 5 for i in range(TENSORS)]
# In another share than the first thread's, and the last of all.
PLACES = (1300, TENSORS - 1)


@pytest.fixture
def threads() -> Iterator[int]:
    """More than the machine may have."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield 4
    torch.set_num_threads(before)


class Many:
    """An optimizer over small tensors; its steps are the same in any number of threads."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(sum(SIZES), generator=generator).split(SIZES)
        self.params = [values.clone().requires_grad_() for values in start]
        self.optimizer = AdamAL(self.params, backend="cpu")
        self.taken = 0

    def step(self, times: int = 1, *, without: int | None = None) -> None:
        for _ in range(times):
            self.taken += 1
            generator = torch.Generator().manual_seed(self.taken)
            grads = torch.randn(sum(SIZES), generator=generator).split(SIZES)
            for i, (p, grad) in enumerate(zip(self.params, grads, strict=True)):
                p.grad = None if i == without else grad
            self.optimizer.step()

    def values(self) -> list[dict[str, Any]]:
        return [{"param": p, **self.optimizer.state[p]} for p in self.params]


def replace_a_state_tensor(many: Many, i: int) -> None:
    state = many.optimizer.state[many.params[i]]
    state["exp_avg_sq"] = state["exp_avg_sq"].clone() + 1


def replace_a_state(many: Many, i: int) -> None:
    state = many.optimizer.state
    state[many.params[i]] = {k: v.clone() for k, v in state[many.params[i]].items()}
    state[many.params[i]]["exp_avg"] -= 1


def replace_a_storage(many: Many, i: int) -> None:
    many.params[i].data = many.params[i].data + 1


def reorder_the_state(many: Many, i: int) -> None:
    state = many.optimizer.state
    state[many.params[i]] = state.pop(many.params[i])


def change_the_learning_rate(many: Many, i: int) -> None:
    many.optimizer.param_groups[0]["lr"] = 0.1 + i


def leave_a_gradient_out(many: Many, i: int) -> None:
    many.step(without=i)


CHANGES = [
    replace_a_state_tensor,
    replace_a_state,
    replace_a_storage,
    reorder_the_state,
    change_the_learning_rate,
    leave_a_gradient_out,
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_anywhere_is_seen_by_all_threads(
    threads: int, change: Callable[[Many, int], None], place: int
) -> None:
    found = []
    for count in (threads, 1):
        torch.set_num_threads(count)
        many = Many()
        many.step(3)
        change(many, place)
        many.step(3)
        found.append(many.values())
    assert different_values(*found) == []


def test_nothing_changed_is_no_python_work(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    many = Many()
    many.step(3)

    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"checked in Python by {threads} threads")

    monkeypatch.setattr(plan_module, "check_entry", refuse)
    many.step(3)
    reorder_the_state(many, 1300)
    with pytest.raises(AssertionError, match="checked in Python"):
        many.step()


def test_a_refused_step_leaves_all_as_it_was(threads: int) -> None:
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
