"""``optimizer.watch()``: what is seen, and that seeing changes nothing."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from helpers.steady_steps import REPEATED, checked  # noqa: F401
from helpers.strange_moments import watch_strange_moments
from helpers.support import DEVICES, Place
from torch import Tensor

from adamal_kernels import Adam, AdamAL, AdamALW, Box, NonNegative, ParameterStatistics
from adamal_kernels.build_info import load_extension
from adamal_kernels.core.stats import WORDS
from adamal_kernels.step.stepper import Stepper
from adamal_kernels.verify import different_values, same_bits

SHAPES = ((3,), (4, 5), (), (0,), (5000,))


class Run:
    """An optimizer over a few parameters, whose gradients depend on the step's number alone."""

    def __init__(self, place: Place, cls: type = AdamAL, **options: Any) -> None:
        torch.manual_seed(0)
        self.params = [torch.randn(shape).to(place.device).requires_grad_() for shape in SHAPES]
        groups = [{"params": self.params[:2]}, {"params": self.params[2:], "lr": 0.05}]
        self.optimizer = cls(groups, backend=place.backend, **options)
        self.taken = 0

    def set_gradients(self) -> None:
        self.taken += 1
        generator = torch.Generator().manual_seed(self.taken)
        for p in self.params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.device)

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.set_gradients()
            self.optimizer.step()

    def values(self) -> list[dict[str, Tensor]]:
        return [{"param": p.detach(), **self.optimizer.state[p]} for p in self.params]


def one_step(optimizer: torch.optim.Optimizer, param: Tensor, *values: float) -> None:
    param.grad = torch.tensor(values, dtype=param.dtype, device=param.device)
    optimizer.step()


def same(first: ParameterStatistics, second: ParameterStatistics) -> bool:
    return same_bits(first.as_tensor(), second.as_tensor())


def exact(place: Place, cls: type = AdamAL, **options: Any) -> tuple[Tensor, Any]:
    """An optimizer of whose steps everything is an exact number: ``v = g * g``, ``d = |g|``."""
    param = torch.zeros(3, device=place.device, requires_grad=True)
    settings = {"lr": 0.5, "betas": (0.0, 0.0), "eps": 0.0, "bias_correction": False, **options}
    return param, cls([param], backend=place.backend, **settings)


def test_statistics_are_those_of_the_formula(place: Place) -> None:
    p, optimizer = exact(place)
    watch = optimizer.watch()
    one_step(optimizer, p, 2.0, 4.0, 8.0)
    first = watch.read()[p]
    assert (first.step, first.watched_steps, first.numel) == (1, 1, 3)
    assert (first.grown_fraction, first.steps_since_growth) == (1.0, 0)
    assert (first.smallest_step, first.largest_step) == (0.5 / 8, 0.5 / 2)
    assert math.isnan(first.least_budget_change)

    one_step(optimizer, p, 4.0, 1.0, 16.0)  # d: 2, 4, 8 to 4, 4, 16
    second = watch.read()[p]
    assert (second.grown_fraction, second.steps_since_growth) == (2 / 3, 0)
    assert (second.smallest_step, second.largest_step) == (0.5 / 16, 0.5 / 4)
    assert second.least_budget_change == 0.0

    optimizer.param_groups[0]["lr"] = 0.25
    one_step(optimizer, p, 1.0, 1.0, 1.0)  # d / lr: 8, 8, 32 to 16, 16, 64
    third = watch.read()[p]
    assert (third.grown_fraction, third.steps_since_growth) == (0.0, 1)
    assert (third.smallest_step, third.largest_step) == (0.25 / 16, 0.25 / 4)
    assert third.least_budget_change == 8.0

    one_step(optimizer, p, 5.0, 6.0, 32.0)  # 16, 16, 64 to 20, 24, 128
    fourth = watch.read()[p]
    assert (fourth.grown_fraction, fourth.steps_since_growth) == (1.0, 0)
    assert fourth.least_budget_change == 4.0
    assert (fourth.step, fourth.watched_steps) == (4, 4)


def test_adams_budget_falls(place: Place) -> None:
    for amsgrad in (False, True):
        p, optimizer = exact(place, Adam, amsgrad=amsgrad)
        watch = optimizer.watch()
        one_step(optimizer, p, 2.0, 4.0, 8.0)
        one_step(optimizer, p, 4.0, 1.0, 6.0)
        found = watch.read()[p]
        # d: 2, 4, 8 to 4, 1, 6; with the maximum, to 4, 4, 8.
        assert found.least_budget_change == (0.0 if amsgrad else -6.0)
        assert found.grown_fraction == 1 / 3
        assert found.largest_step == (0.5 / 4 if amsgrad else 0.5)


def test_eps_and_bias_correction_are_part_of_the_denominator(place: Place) -> None:
    p, optimizer = exact(place, betas=(0.5, 0.75), eps=1.0, bias_correction=True)
    watch = optimizer.watch()
    one_step(optimizer, p, 1.0, 3.0, 7.0)
    # v = g*g / 4, over 1 - 0.75; the step size is 0.5 / (1 - 0.5).
    found = watch.read()[p]
    assert (found.smallest_step, found.largest_step) == (1.0 / 8, 1.0 / 2)


def test_a_learning_rate_of_0_has_no_budget(place: Place) -> None:
    p, optimizer = exact(place)
    watch = optimizer.watch()
    changes = []
    for lr in (0.5, 0.5, 0.0, 0.5, 0.5):
        optimizer.param_groups[0]["lr"] = lr
        one_step(optimizer, p, 2.0, 4.0, 8.0)
        changes.append(watch.read()[p].least_budget_change)
        if lr == 0:
            assert (watch.read()[p].smallest_step, watch.read()[p].largest_step) == (0.0, 0.0)
    assert [math.isnan(change) for change in changes] == [True, False, True, True, False]


def test_what_is_not_finite(place: Place) -> None:
    p, optimizer = exact(place)
    watch = optimizer.watch()
    one_step(optimizer, p, 2.0, 4.0, 0.0)
    assert watch.read()[p].largest_step == math.inf  # d = 0
    one_step(optimizer, p, 3.0, math.inf, 1.0)
    one_step(optimizer, p, 5.0, 4.0, 4.0)
    found = watch.read()[p]
    # The element whose v is infinite has no change and no steps any more.
    assert found.least_budget_change == (5.0 - 3.0) / 0.5
    assert (found.smallest_step, found.largest_step) == (0.0, 0.5 / 4)

    p, optimizer = exact(place, Adam)
    watch = optimizer.watch()
    one_step(optimizer, p, 2.0, math.nan, 1.0)
    one_step(optimizer, p, 4.0, 1.0, 2.0)
    found = watch.read()[p]
    assert math.isnan(found.smallest_step)
    assert math.isnan(found.largest_step)
    assert found.least_budget_change == 2.0
    assert found.grown_fraction == 2 / 3


@pytest.mark.parametrize("amsgrad", [False, True, None])
def test_moments_that_no_step_makes(place: Place, amsgrad: bool | None) -> None:
    kind = (AdamAL, {}) if amsgrad is None else (Adam, {"amsgrad": amsgrad})
    found, expected = (
        watch_strange_moments(backend, place.device, kind[0], **kind[1])
        for backend in (place.backend, "reference")
    )
    for seen, wanted in zip(found, expected, strict=True):
        assert same_bits(seen, wanted)


def test_nothing_yet(place: Place) -> None:
    run = Run(place)
    watch = run.optimizer.watch()
    found = watch.read()
    assert list(found) == run.params
    for p, statistics in found.items():
        assert (statistics.step, statistics.watched_steps) == (0, 0)
        assert statistics.numel == p.numel()
        assert statistics.steps_since_growth is None
        numbers = (
            statistics.grown_fraction,
            statistics.smallest_step,
            statistics.largest_step,
            statistics.least_budget_change,
            statistics.boundary_fraction,
        )
        assert all(map(math.isnan, numbers))


def test_nothing_grows_without_gradients_that_do(place: Place) -> None:
    p, optimizer = exact(place)
    watch = optimizer.watch()
    for _ in range(2):
        one_step(optimizer, p, 0.0, 0.0, 0.0)
    found = watch.read()[p]
    assert (found.watched_steps, found.grown_fraction, found.steps_since_growth) == (2, 0.0, None)


def test_an_empty_parameter(place: Place) -> None:
    run = Run(place)
    watch = run.optimizer.watch()
    run.step(2)
    found = watch.read()[run.params[3]]
    assert (found.step, found.watched_steps, found.numel) == (2, 0, 0)
    assert math.isnan(found.grown_fraction)


@pytest.mark.parametrize(
    ("projection", "fraction"),
    [(Box(0.0, 0.25), 2 / 3), (Box(-math.inf, 0.25), 1 / 3), (NonNegative(), 1 / 3), (None, None)],
)
def test_the_boundary(place: Place, projection: Any, fraction: float | None) -> None:
    p, optimizer = exact(place, projection=projection)
    watch = optimizer.watch()
    with torch.no_grad():
        p.copy_(torch.tensor([0.5, 0.125, 0.125]))
    one_step(optimizer, p, 4.0, -4.0, 0.0)  # by -0.5, 0.5 and 0: to 0, 0.625 and 0.125
    found = watch.read()[p].boundary_fraction
    assert math.isnan(found) if fraction is None else found == fraction


# What watching leaves as it is.


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (AdamAL, {"projection": Box(-0.5, 0.5)}),
        (AdamALW, {"capturable": True}),
        (Adam, {"amsgrad": True}),
        (AdamAL, {"max_grad_norm": 0.5}),
    ],
)
def test_a_watched_run_has_the_same_bits(place: Place, cls: type, options: dict[str, Any]) -> None:
    watched, plain = (Run(place, cls, **options) for _ in range(2))
    for times in (1, 3, 2):
        watch = watched.optimizer.watch()
        for run in (watched, plain):
            run.step(times)
        watch.stop()
        for run in (watched, plain):
            run.step(times)
        assert different_values(watched.values(), plain.values()) == []
        # What was seen while it was on.
        assert all(s.watched_steps == times for p, s in watch.read().items() if p.numel())


def test_state_and_checkpoints_are_what_they_are_without(place: Place) -> None:
    watched, plain = Run(place), Run(place)
    watched.optimizer.watch()
    for run in (watched, plain):
        run.step(2)
    found, expected = (run.optimizer.state_dict() for run in (watched, plain))
    assert found["param_groups"] == expected["param_groups"]
    assert [*found["state"][0]] == [*expected["state"][0]]


def test_copies_are_not_watched(place: Place) -> None:
    run = Run(place)
    watch = run.optimizer.watch()
    run.step(2)
    seen = watch.read()
    for copied in (copy.deepcopy(run.optimizer), pickle.loads(pickle.dumps(run.optimizer))):
        with copied.watch() as other:
            assert all(s.watched_steps == 0 for s in other.read().values())
    assert all(map(same, watch.read().values(), seen.values()))


def test_loading_begins_anew(place: Place) -> None:
    run = Run(place)
    watch = run.optimizer.watch()
    run.step(2)
    run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    assert {s.watched_steps for s in watch.read().values()} == {0}
    run.step()
    found = watch.read()[run.params[0]]
    assert (found.step, found.watched_steps) == (3, 1)
    assert math.isnan(found.least_budget_change)


def test_a_second_watch_is_refused_and_a_new_one_begins_anew(place: Place) -> None:
    run = Run(place)
    with run.optimizer.watch() as watch:
        run.step(3)
        with pytest.raises(RuntimeError, match=r"being watched already.*stop"):
            run.optimizer.watch()
        assert watch.is_on
        run.step()
        assert watch.read()[run.params[0]].watched_steps == 4
    assert not watch.is_on
    with run.optimizer.watch() as other:
        watch.stop()  # Which is not the one that is on.
        assert other.is_on
        run.step(2)
        assert other.read()[run.params[0]].watched_steps == 2
    assert watch.read()[run.params[0]].watched_steps == 4


# Steps of every kind.


def reference_of(place: Place, cls: type = AdamAL, **options: Any) -> Run:
    return Run(Place(place.device, "reference"), cls, **options)


def assert_alike(first: Run, first_watch: Any, second: Run, second_watch: Any) -> None:
    assert different_values(first.values(), second.values()) == []
    seen = zip(first_watch.read().values(), second_watch.read().values(), strict=True)
    assert [pair for pair in seen if not same(*pair)] == []


@pytest.mark.parametrize("place", REPEATED)
def test_repeated_steps_are_watched_by_cpp(place: Place, checked: list[str]) -> None:  # noqa: F811
    run, expected = Run(place), reference_of(place)
    watches = [r.optimizer.watch() for r in (run, expected)]
    for r in (run, expected):
        r.step(6)
    assert len(checked) == len(SHAPES), "the first step is checked, the others are not"
    assert_alike(run, watches[0], expected, watches[1])


@pytest.mark.parametrize("capturable", [False, True])
def test_gradients_that_come_and_go(place: Place, capturable: bool) -> None:
    runs = [Run(place, capturable=capturable), reference_of(place, capturable=capturable)]
    watches = [run.optimizer.watch() for run in runs]
    for step in range(9):
        for run in runs:
            run.set_gradients()
            run.params[step % 4].grad = None
            run.params[4].grad = run.params[4].grad if step % 3 else None
            run.optimizer.step()
    assert_alike(runs[0], watches[0], runs[1], watches[1])
    found = watches[0].read()[runs[0].params[4]]
    assert found.watched_steps == found.step == 6


@pytest.mark.parametrize("capturable", [False, True])
def test_skipped_steps_are_not_seen(place: Place, capturable: bool) -> None:
    run = Run(place, capturable=capturable)
    watch = run.optimizer.watch()
    run.step(2)
    seen = watch.read()
    run.optimizer.grad_scale = torch.tensor(1.0, device=place.device)
    for found_inf in (1.0, 1.0):
        run.optimizer.found_inf = torch.tensor(found_inf, device=place.device)
        run.step()
    assert all(map(same, watch.read().values(), seen.values()))
    run.optimizer.found_inf = torch.tensor(0.0, device=place.device)
    run.step()
    assert watch.read()[run.params[0]].watched_steps == 3


def test_steps_in_backward(place: Place) -> None:
    runs = [Run(place), reference_of(place)]
    watches = [run.optimizer.watch() for run in runs]
    with runs[0].optimizer.step_in_backward():
        for _ in range(3):
            for run in runs:
                run.set_gradients()
            grads = [p.grad for p in runs[0].params]
            for p in runs[0].params:
                p.grad = None
            torch.autograd.backward([p * 1 for p in runs[0].params], grads)
            runs[1].optimizer.step()
    assert_alike(runs[0], watches[0], runs[1], watches[1])


@pytest.mark.parametrize("device", DEVICES)
def test_differentiable_steps(device: torch.device) -> None:
    leaf = torch.tensor([1.0, 2.0], device=device, requires_grad=True)
    p = leaf.clone()
    optimizer = AdamAL([p], lr=0.5, differentiable=True)
    watch = optimizer.watch()
    p.grad = p * 2
    optimizer.step()
    (grad,) = torch.autograd.grad(p.sum(), leaf)
    assert torch.isfinite(grad).all()
    assert watch.read()[p].watched_steps == 1


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_steps(device: torch.device) -> None:
    torch._dynamo.reset()
    runs = [Run(Place(device, backend)) for backend in ("auto", "reference")]
    watches = [run.optimizer.watch() for run in runs]
    step = torch.compile(runs[0].optimizer.step, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        for run in runs:
            run.set_gradients()
        step()
        runs[1].optimizer.step()
    torch._dynamo.reset()
    assert_alike(runs[0], watches[0], runs[1], watches[1])


def test_groups_and_backends_that_change(place: Place) -> None:
    run = Run(place)
    watch = run.optimizer.watch()
    run.step(2)
    added = torch.ones(4, device=place.device, requires_grad=True)
    run.optimizer.add_param_group({"params": [added], "lr": 0.5})
    run.params.append(added)
    run.step()
    assert watch.read()[added].watched_steps == 1
    assert watch.read()[run.params[0]].watched_steps == 3
    other = "foreach" if place.backend != "foreach" else "reference"
    run.optimizer.param_groups[0]["backend"] = other
    run.step()
    found = watch.read()
    assert (found[run.params[0]].watched_steps, found[added].watched_steps) == (1, 2)


def test_complex_parameters_count_as_pairs(place: Place) -> None:
    p = torch.zeros(2, dtype=torch.complex64, device=place.device, requires_grad=True)
    optimizer = AdamAL([p], backend=place.backend)
    watch = optimizer.watch()
    for _ in range(2):
        p.grad = torch.tensor([1 + 0j, 0j], device=place.device)
        optimizer.step()
    found = watch.read()[p]
    assert (found.numel, found.grown_fraction, found.watched_steps) == (4, 0.25, 2)


def test_a_parameter_of_several_items(place: Place) -> None:
    """The least change is in the first of them, the largest v in the last."""
    p = torch.zeros(40000, device=place.device, requires_grad=True)
    optimizer = AdamAL(
        [p], lr=0.5, betas=(0.0, 0.0), eps=0.0, bias_correction=False, backend=place.backend
    )
    watch = optimizer.watch()
    p.grad = torch.full_like(p, 4.0)
    optimizer.step()
    p.grad = torch.full_like(p, 16.0)
    p.grad[5], p.grad[39999] = 8.0, 32.0
    optimizer.step()
    found = watch.read()[p]
    assert found.least_budget_change == 16.0 - 8.0
    assert (found.smallest_step, found.largest_step) == (0.5 / 32, 0.5 / 8)


# Reading.


def test_the_table_names_parameters(place: Place) -> None:
    model = torch.nn.Linear(2, 3).to(place.device)
    named = AdamAL(model.named_parameters(), backend=place.backend, projection=Box(-9, 9))
    plain = AdamAL(model.parameters(), backend=place.backend)
    for optimizer, name in ((named, "weight"), (plain, "params[0] of group 0")):
        watch = optimizer.watch()
        assert name in str(watch)
        model(torch.ones(1, 2, device=place.device)).sum().backward()
        optimizer.step()
        text = str(watch)
        assert name in text
        assert "100.0%" in text
        assert len(watch.table().rows) == 2
    assert "0.0%" not in text.replace("100.0%", "")


def test_records_of_another_kind_are_refused() -> None:
    extension = load_extension("_C")
    plan = extension.cpu_plan(0, 0)
    tensors = [torch.zeros(20000)]
    buffers = [tensors, tensors, [], []]
    good = torch.zeros(2, WORDS, dtype=torch.int64)
    for bad in (good[:1], good.float(), good[:, ::2], torch.zeros(3, WORDS, dtype=torch.int64)):
        with pytest.raises(RuntimeError, match="records must be int64"):
            plan.bind(tensors, buffers, [], [bad])
    plan.bind(tensors, buffers, [], [good])


def test_off_no_records_are_asked_for(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("an unwatched step asked for records")

    run = Run(place)
    with run.optimizer.watch():
        run.step()
    monkeypatch.setattr(Stepper, "_append_records", fail)
    run.step(3)


def test_a_parameter_cast_and_not_stepped_keeps_what_was_seen(place: Place) -> None:
    params = [torch.ones(3, device=place.device).requires_grad_() for _ in range(2)]
    optimizer = AdamAL(params, backend=place.backend)
    watch = optimizer.watch()
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    before = watch.read()[params[0]]
    params[0].grad = None
    params[0].data = params[0].data.double()
    for _ in range(2):
        params[1].grad = torch.ones_like(params[1])
        optimizer.step()
    assert watch.read()[params[0]] == before
    assert watch.read()[params[1]].watched_steps == 4


def test_the_table_names_each_parameter_once_and_as_it_is_called() -> None:
    params = [(f"layer{'x' * 80}{i}[/]", torch.ones(2).requires_grad_()) for i in range(2)]
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = AdamAL([{"params": [*params, ("again", params[0][1])]}])
    watch = optimizer.watch()
    printed = str(watch)
    assert "1[/]" in printed.replace("\n", "")
    assert "again" not in printed


def test_reading_what_is_no_set_says_so() -> None:
    optimizer = AdamAL([torch.ones(2).requires_grad_()])
    watch = optimizer.watch()
    optimizer.param_groups[0]["projection"] = "ball"
    with pytest.raises(TypeError, match=r"projection must be a set.*'ball'"):
        watch.read()
