"""Steps repeated by C++: taken where nothing changed, and right where anything did."""

from __future__ import annotations

import collections
import copy
import warnings
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from helpers.steady_steps import (
    CHANGES,
    REPEATED,
    SHAPES,
    Pair,
    checked,
    new_pair,
    replace_storage,
    set_option,
    skip_all,
    with_gradients_missing,
)
from helpers.support import Place, refused

from adamal_kernels import Adam, AdamAL, Box
from adamal_kernels.step import stepper as stepper_module
from adamal_kernels.verify import different_values

__all__ = ["checked", "new_pair"]  # fixtures


@pytest.fixture(params=REPEATED)
def place(request: pytest.FixtureRequest) -> Place:
    """Every backend whose steps C++ repeats, wherever it can run."""
    return request.param


def move_gradients_only(optimizer: Any, params: list[torch.Tensor]) -> None:
    for p in params:
        p.grad = p.grad.clone(memory_format=torch.preserve_format)


def misalign_a_gradient(optimizer: Any, params: list[torch.Tensor]) -> None:
    room = params[5].grad.new_zeros(1001)
    params[5].grad = room[1:].copy_(params[5].grad)
    optimizer.step()


@pytest.mark.parametrize(
    "change",
    [
        set_option("lr", 0.3),
        set_option("lr", 0.0),
        set_option("betas", (0.5, 0.6)),
        set_option("eps", 1e-3),
        set_option("weight_decay", 0.2),
        set_option("betas", [0.5, 0.6]),
        set_option("betas", np.array([0.5, 0.6])),
        set_option("betas", (np.float32(0.5), Fraction(3, 5))),
        set_option("betas", collections.UserList([0.5, 0.6])),
        set_option("betas", torch.tensor([0.5, 0.6])),
        *[
            set_option(name, number)
            for name in ("lr", "eps", "weight_decay")
            for number in (1, np.float32(0.25), np.int64(1), np.array(0.3), Fraction(1, 3))
        ],
        set_option("lr", Decimal("0.3")),
        with_gradients_missing,
        skip_all,
        move_gradients_only,
        misalign_a_gradient,
    ],
)
def test_is_taken_over_without_python(
    new_pair: Callable[..., Pair], change: Callable[[Any, Any], None], checked: list[str]
) -> None:
    pair = new_pair(projection=Box(-0.5, 0.5))
    pair.step(2)
    assert len(checked) == len(SHAPES), "the first step is checked, the second is not"
    pair.both(change)
    pair.step(3)
    pair.assert_equal()
    assert len(checked) == len(SHAPES)


# What a config, a schedule in numpy or a checkpoint from JSON brings.
PAIRS: dict[str, Callable[[], Any]] = {
    "a list": lambda: [0.5, 0.6],
    "a config's list": lambda: collections.UserList([0.5, 0.6]),
    "an array": lambda: np.array([0.5, 0.6]),
    "an array of objects": lambda: np.array([0.5, Fraction(3, 5)], dtype=object),
}


def edit_first_beta(optimizer: Any, params: list[torch.Tensor]) -> None:
    optimizer.param_groups[0]["betas"][0] = 0.25


@pytest.mark.parametrize("kind", PAIRS)
def test_betas_of_any_sequence(
    new_pair: Callable[..., Pair], kind: str, checked: list[str]
) -> None:
    """A group that is added has a tuple; what is put there later may be edited in place."""
    pair = new_pair(betas=PAIRS[kind]())
    assert all(group["betas"] == (0.5, 0.6) for group in pair.optimizers[0].param_groups)
    pair.step(2)
    pair.both(lambda optimizer, params: set_option("betas", PAIRS[kind]())(optimizer, params))
    pair.step(2)
    pair.both(edit_first_beta)
    pair.step(2)
    pair.assert_equal()
    assert len(checked) == len(SHAPES)


def edit_numbers(optimizer: Any, params: list[torch.Tensor]) -> None:
    optimizer.param_groups[0]["lr"][...] = 0.5
    optimizer.param_groups[0]["eps"][...] = 0.25


def test_numbers_that_change_in_place(new_pair: Callable[..., Pair], checked: list[str]) -> None:
    pair = new_pair()
    for optimizer in pair.optimizers:
        optimizer.param_groups[0].update(lr=np.array(0.1), eps=np.array(1e-3))
    pair.step(3)
    pair.both(edit_numbers)
    pair.step(2)
    pair.assert_equal()
    assert len(checked) == len(SHAPES)


class Pair2(tuple):
    """As a named tuple is: equal, and not of the same class."""


def edit_tensor_beta(optimizer: Any, params: list[torch.Tensor]) -> None:
    optimizer.param_groups[0]["betas"][0].fill_(0.25)


def test_tensors_in_a_tuple_of_another_class_are_read_anew(
    new_pair: Callable[..., Pair], checked: list[str]
) -> None:
    pair = new_pair()
    for optimizer in pair.optimizers:
        betas = Pair2(torch.tensor(beta, dtype=torch.float64) for beta in (0.5, 0.6))
        optimizer.param_groups[0]["betas"] = betas
    pair.step(3)
    pair.both(edit_tensor_beta)
    pair.step(2)
    pair.assert_equal()
    assert len(checked) == len(SHAPES)


@pytest.mark.parametrize(
    "betas", ["ab", b"\0\0", {0.5: 0, 0.6: 0}, {0.5, 0.6}, np.zeros((2, 1)), [0.5, None]], ids=str
)
def test_what_is_no_pair_is_refused_by_a_running_optimizer(
    new_pair: Callable[..., Pair], betas: Any
) -> None:
    pair = new_pair()
    pair.step(3)
    pair.optimizers[0].param_groups[0]["betas"] = betas
    with pytest.raises(TypeError, match="betas"):
        pair.optimizers[0].step()


@pytest.mark.parametrize("shape", [(), (1,)])
def test_counts_in_shared_memory_stay_there(
    place: Place, shape: tuple[int, ...], checked: list[str]
) -> None:
    """Of one process they are counted where the others see them, and count what those add."""
    if place.device.type != "cpu":
        pytest.skip("such counts are on the CPU")
    found = []
    for backend in (place.backend, "reference"):
        params = [torch.ones(4, requires_grad=True) for _ in range(3)]
        optimizer = Adam(params, lr=0.1, backend=backend)
        placed = [torch.zeros(shape).share_memory_() for _ in params[:2]]
        for param, count in zip(params, placed, strict=False):
            optimizer.state[param] = {
                "step": count,
                "exp_avg": torch.zeros(4).share_memory_(),
                "exp_avg_sq": torch.zeros(4).share_memory_(),
            }
        for step in range(6):
            for i, param in enumerate(params):
                param.grad = None if (i, step) == (1, 2) else torch.full((4,), step + 1.0)
            if step == 4:
                placed[0] += 10
            optimizer.step()
        assert [count.item() for count in placed] == [16, 5]
        assert all(optimizer.state[p]["step"].is_shared() for p in params[:2])
        assert not optimizer.state[params[2]]["step"].is_shared()
        found.append([{"param": p, **optimizer.state[p]} for p in params])
    assert different_values(*found) == []
    assert len(checked) == 3


def test_counts_that_come_to_be_shared(new_pair: Callable[..., Pair], checked: list[str]) -> None:
    """As what is sent through a queue is, wherever it lies."""
    pair = new_pair()
    pair.step(2)
    if pair.params[0][0].device.type != "cpu":
        pytest.skip("such counts are on the CPU")
    count = pair.optimizers[0].state[pair.params[0][0]]["step"].share_memory_()
    pair.step(1)
    checked.clear()
    pair.step(2)
    pair.assert_equal()
    assert checked == []
    assert count.is_shared()
    assert count.item() == 5


def test_a_shared_count_of_skipped_and_of_the_devices_steps(place: Place) -> None:
    if place.device.type != "cpu":
        pytest.skip("such counts are on the CPU")
    for options in ({"capturable": True}, {}):
        param = torch.ones(4, requires_grad=True)
        optimizer = AdamAL([param], backend=place.backend, max_grad_norm=1.0, **options)
        count = torch.zeros(()).share_memory_()
        optimizer.state[param] = {
            "step": count,
            "exp_avg": torch.zeros(4),
            "exp_avg_sq": torch.zeros(4),
        }
        for value in (1.0, 2.0, float("nan"), 3.0):
            param.grad = torch.full((4,), value)
            optimizer.step()
        assert optimizer._stepper._steady_state is not None
        assert (count.item(), optimizer.skipped_steps.item()) == (3, 1)


def test_what_cannot_be_bound_has_been_stepped(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next steps are checked, and as right."""

    def fail(*arguments: Any) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(stepper_module, "bind", fail)
    pair = Pair(place)
    with pytest.warns(RuntimeWarning, match="planted"):
        pair.step(2)
    pair.assert_equal()


@pytest.mark.parametrize(
    "edit",
    RESTING := {
        "a count of another shape": lambda state: state.update(step=torch.zeros(1)),
        "a count that is a number": lambda state: state.update(step=3),
        "a count of integers": lambda state: state.update(step=torch.tensor(3)),
        "no count": lambda state: state.pop("step"),
        "a count on meta": lambda state: state.update(step=torch.zeros((), device="meta")),
        "no moment": lambda state: state.pop("exp_avg"),
        "a moment of None": lambda state: state.update(exp_avg=None),
        "a moment of another shape": lambda state: state.update(exp_avg=torch.zeros(9)),
        "a moment shared with the other": lambda state: state.update(exp_avg=state["exp_avg_sq"]),
    },
    ids=str,
)
def test_state_of_a_parameter_without_gradient_is_not_in_the_way(
    place: Place, edit: str, checked: list[str]
) -> None:
    stepped, resting = (torch.ones(4, device=place.device, requires_grad=True) for _ in range(2))
    optimizer = AdamAL([stepped, resting], lr=0.1, backend=place.backend)
    for param in (stepped, resting):
        param.grad = torch.ones_like(param)
    optimizer.step()
    resting.grad = None
    RESTING[edit](optimizer.state[resting])
    checked.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            optimizer.step()
    assert optimizer.state[stepped]["step"].item() == 4
    assert len(checked) == 1, "the steps after the edit are repeated by C++"


class TestCapture:
    """torch says that a CUDA graph is being captured; here all runs at once."""

    @pytest.fixture(autouse=True)
    def capturing(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
        def set_capturing(whether: bool) -> None:
            monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
            monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: whether)

        return set_capturing

    @pytest.fixture
    def place(self) -> Place:
        """One whose tables no launcher keeps."""
        return Place(torch.device("cpu"), "cpu")

    @pytest.mark.parametrize("max_grad_norm", [None, 1.0])
    def test_with_a_list_of_betas(
        self,
        new_pair: Callable[..., Pair],
        capturing: Callable[[bool], None],
        max_grad_norm: float | None,
    ) -> None:
        pair = new_pair(capturable=True, max_grad_norm=max_grad_norm, betas=[0.5, 0.75])
        pair.step()
        pair.both(set_option("betas", [0.25, 0.5]))
        steady = pair.optimizers[0]._stepper._steady_state
        capturing(True)
        pair.step()
        capturing(False)
        pair.both(replace_storage)
        pair.step(2)
        pair.assert_equal()
        assert pair.optimizers[0]._stepper._steady_state is not steady
        assert any(steady is kept for kept in pair.optimizers[0]._stepper._captured[0])

    def test_what_is_not_bound_is_refused(
        self, new_pair: Callable[..., Pair], capturing: Callable[[bool], None]
    ) -> None:
        pair = new_pair(capturable=True)
        optimizer, params = pair.optimizers[0], pair.params[0]
        words = ("captured in a CUDA graph", "params[0] of group 0", "outside of the graph")
        capturing(True)
        for p in params:
            p.grad = torch.ones_like(p)
        with refused(optimizer, RuntimeError, *words):
            optimizer.step()
        capturing(False)
        pair.step(2)
        pair.both(replace_storage)
        capturing(True)
        for p in params:
            p.grad = torch.ones_like(p)
        with refused(optimizer, RuntimeError, *words):
            optimizer.step()
        capturing(False)
        pair.step(2)
        capturing(True)
        pair.step(2)
        pair.assert_equal()

    def test_in_backward(self, capturing: Callable[[bool], None]) -> None:
        for capturable in (False, True):
            param = torch.ones(3, requires_grad=True)
            optimizer = AdamAL([param], capturable=capturable, backend="cpu")
            with optimizer.step_in_backward():
                capturing(True)
                with pytest.raises(RuntimeError, match="captured in a CUDA graph"):
                    param.sum().backward()
                capturing(False)
                param.grad = None
                param.sum().backward()
            assert torch.equal(param.detach(), torch.full((3,), 0.999))

    @pytest.mark.parametrize("backend", ["foreach", "reference"])
    def test_the_counts_of_other_backends_are_kept(
        self, capturing: Callable[[bool], None], backend: str
    ) -> None:
        param = torch.ones(3, requires_grad=True)
        optimizer = AdamAL([param], capturable=True, backend=backend)
        param.grad = torch.ones(3)
        optimizer.step()
        capturing(True)
        optimizer.step()
        count = optimizer.state[param]["step"]
        optimizer.state.clear()
        assert count.item() == 2
        assert any(count is kept for kept in optimizer._stepper._captured[0][0])


def switch_amsgrad(optimizer: Any, params: list[torch.Tensor]) -> None:
    for group in optimizer.param_groups:
        group["amsgrad"] = not group["amsgrad"]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_change_is_seen_on_the_next_step(
    new_pair: Callable[..., Pair], change: Callable[[Any, Any], None]
) -> None:
    pair = new_pair(weight_decay=0.1, projection=Box(-2, 2))
    pair.step(3)
    pair.both(change)
    pair.step(4)
    pair.assert_equal()


@pytest.mark.parametrize("amsgrad", [False, True])
def test_amsgrad_is_switched_in_a_running_optimizer(
    new_pair: Callable[..., Pair], amsgrad: bool
) -> None:
    pair = new_pair(Adam, amsgrad=amsgrad)
    pair.step(3)
    pair.both(switch_amsgrad)
    pair.step(4)
    pair.assert_equal()


def step_in_inference_mode(optimizer: Any, params: list[torch.Tensor]) -> None:
    with torch.inference_mode():
        optimizer.step()


@pytest.mark.parametrize("steps_before", [1, 2])
def test_inference_mode_comes_and_goes(new_pair: Callable[..., Pair], steps_before: int) -> None:
    pair = new_pair()
    pair.step(steps_before)
    pair.both(step_in_inference_mode)
    pair.step(3)
    pair.assert_equal()


def test_settles_again_after_a_change(new_pair: Callable[..., Pair], checked: list[str]) -> None:
    pair = new_pair()
    pair.step(2)
    pair.both(replace_storage)
    pair.step()
    checked.clear()
    pair.step(3)
    assert checked == []


def test_bad_option_is_refused_and_nothing_changes(new_pair: Callable[..., Pair]) -> None:
    pair = new_pair()
    pair.step(2)
    optimizer, params = pair.optimizers[0], pair.params[0]
    before = [copy.deepcopy({"param": p.detach(), **optimizer.state[p]}) for p in params]
    for bad in (float("nan"), -1.0, float("inf")):
        optimizer.param_groups[1]["lr"] = bad
        with pytest.raises(ValueError, match="lr="):
            optimizer.step()
    assert different_values([{"param": p, **optimizer.state[p]} for p in params], before) == []


def test_overlapping_parameters_are_refused_when_they_come_to_overlap(
    new_pair: Callable[..., Pair],
) -> None:
    pair = new_pair()
    pair.step(2)
    first, last = pair.params[0][0], pair.params[0][5]
    first.data = last.data[:3]
    with pytest.raises(ValueError, match="share memory"):
        pair.optimizers[0].step()


def steady_state_of(groups: list[dict[str, Any]], backend: str) -> tuple[AdamAL, Any]:
    """Return an optimizer that has taken two steps, and what repeats them."""
    optimizer = AdamAL(groups, backend=backend)
    for _ in range(2):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()
    return optimizer, optimizer._stepper._steady_state


def test_many_groups_share_one_plan_and_equal_options_one_row(place: Place) -> None:
    params = [torch.ones(4, device=place.device, requires_grad=True) for _ in range(50)]
    optimizer, steady = steady_state_of([{"params": [p]} for p in params], place.backend)
    assert (steady.plan_count, steady.row_count) == (1, 1)
    optimizer.param_groups[7]["lr"] = 0.5
    optimizer.step()
    assert optimizer._stepper._steady_state is steady
    assert (steady.plan_count, steady.row_count) == (1, 3)


def test_groups_of_two_types_share_a_row_of_equal_options(place: Place) -> None:
    types = (torch.bfloat16, torch.float32)
    params = [torch.ones(4, dtype=types[i % 2], device=place.device) for i in range(60)]
    groups = [{"params": params[i : i + 2]} for i in range(0, 30, 2)]
    groups += [{"params": [p]} for p in params[30:]]
    _, steady = steady_state_of(groups, place.backend)
    assert (steady.plan_count, steady.row_count) == (2, 1)


def test_equal_options_of_a_device_and_of_the_host_are_told_apart(place: Place) -> None:
    """In the host's first step its options are as new as those that the device reads."""
    dtype = torch.bfloat16  # whose plan comes first
    found = []
    for backend in (place.backend, "reference"):
        on_device = torch.ones(4, dtype=dtype, device=place.device, requires_grad=True)
        on_host = torch.ones(4, device=place.device, requires_grad=True)
        groups = [{"params": [on_device], "capturable": True}, {"params": [on_host]}]
        optimizer = AdamAL(groups, lr=0.1, backend=backend)
        for step in range(5):
            if step == 3:
                optimizer.state[on_host]["step"].fill_(0)
            for p in (on_device, on_host):
                p.grad = torch.full_like(p, 0.5, requires_grad=False)
            optimizer.step()
        found.append([{"param": p, **optimizer.state[p]} for p in (on_device, on_host)])
    assert different_values(*found) == []


def test_a_step_tensor_is_a_view_of_one_pack(new_pair: Callable[..., Pair]) -> None:
    pair = new_pair()
    pair.step(2)
    optimizer = pair.optimizers[0]
    storages = {optimizer.state[p]["step"].untyped_storage().data_ptr() for p in pair.params[0]}
    assert len(storages) == 1
    assert [optimizer.state[p]["step"].item() for p in pair.params[0]] == [2.0] * len(SHAPES)


def test_the_pack_of_counts_stays_while_its_parameters_do(place: Place) -> None:
    """A CUDA graph goes on counting in the pack it was captured with, whatever is bound later."""
    params = [torch.ones(3, device=place.device, requires_grad=True) for _ in range(2)]
    optimizer = AdamAL(params, capturable=True, backend=place.backend)

    def pack() -> int:
        for param in params:
            param.grad = torch.ones_like(param, requires_grad=False)
        optimizer.step()
        return optimizer.state[params[0]]["step"].untyped_storage().data_ptr()

    pack()
    before = pack()
    optimizer.param_groups[0]["maximize"] = True  # is checked, and bound anew
    assert pack() == before
    assert [optimizer.state[param]["step"].item() for param in params] == [3, 3]
    params.append(torch.ones(3, device=place.device, requires_grad=True))
    optimizer.add_param_group({"params": params[2:]})
    pack()
    assert [optimizer.state[param]["step"].item() for param in params] == [4, 4, 1]
