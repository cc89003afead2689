"""``step_in_backward``: the bits of the plain step, gradients freed, and no surprise after."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.support import Place, refused
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import adamal_kernels
from adamal_kernels import Adam, AdamAL, AdamALW, Box, InBackwardHandle
from adamal_kernels.step import stepper as stepper_module
from adamal_kernels.verify import different_values, same_bits


class Net(nn.Module):
    """Layers of one width, the first of which is used twice."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(layers))
        self.spare = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers, self.layers[0]):
            x = torch.tanh(layer(x))
        return x


class Job:
    def __init__(self, cls: type = AdamAL, device: Any = "cpu", **options: Any) -> None:
        torch.manual_seed(0)
        self.model = Net().to(device)
        first, *others = self.model.layers
        self.optimizer = cls(
            [
                {"params": [*first.parameters(), *self.model.spare.parameters()]},
                {"params": [p for layer in others for p in layer.parameters()], "lr": 0.03},
            ],
            **options,
        )
        self.taken = 0

    def loss(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.taken)
        self.taken += 1
        x = torch.randn(5, 4, generator=generator).to(self.model.spare.weight.device)
        return (self.model(x) - 1).square().mean()

    def backward(self) -> None:
        """Train where backward() steps."""
        self.loss().backward()

    def step(self) -> None:
        """Train plainly."""
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def values(self) -> list[dict[str, Tensor]]:
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        return [{"param": p.detach(), **self.optimizer.state.get(p, {})} for p in params]

    def check_equals(self, plain: Job) -> None:
        assert different_values(self.values(), plain.values()) == []


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (AdamAL, {}),
        (AdamALW, {"projection": Box(-0.4, 0.4), "maximize": True}),
        (Adam, {"amsgrad": True, "lr": torch.tensor(0.01)}),
        (AdamAL, {"capturable": True}),
    ],
    ids=["default", "decoupled", "amsgrad", "capturable"],
)
def test_the_bits_of_the_plain_step(place: Place, cls: type, options: dict[str, Any]) -> None:
    options = {**options, "backend": place.backend}
    plain, job = Job(cls, place.device, **options), Job(cls, place.device, **options)
    job.optimizer.step_in_backward(job.model)
    for _ in range(4):
        plain.step()
        job.backward()
        job.check_equals(plain)
        assert all(p.grad is None for p in job.model.parameters())
    assert job.optimizer.backends_used == (place.backend,)
    assert job.model.spare.weight not in job.optimizer.state


def test_gradients_are_freed_as_they_are_used() -> None:
    """At no time is more than one there, of ten layers."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(10)))
    optimizer = AdamAL(model.parameters())
    live: list[int] = []

    def count(_: Tensor) -> None:
        live.append(sum(p.grad is not None for p in model.parameters()))

    for param in model.parameters():  # called before the optimizer's
        param.register_post_accumulate_grad_hook(count)
    model(torch.ones(2, 4)).sum().backward()
    assert live == list(range(1, 11))
    model.zero_grad()
    live.clear()
    with optimizer.step_in_backward():
        model(torch.ones(2, 4)).sum().backward()
    assert live == [1] * 10


def test_a_context_ends_it() -> None:
    plain, job = Job(), Job()
    with job.optimizer.step_in_backward(job.model) as handle:
        plain.step()
        job.backward()
    for _ in range(2):
        plain.step()
        job.step()
    handle.remove()
    job.check_equals(plain)
    with pytest.raises(KeyError), job.optimizer.step_in_backward():
        raise KeyError
    before = copy.deepcopy(job.values())
    job.backward()
    assert different_values(job.values(), before) == []


def test_a_shared_parameter_is_stepped_once() -> None:
    job = Job()
    job.model.layers[1].weight = job.model.layers[0].weight
    with job.optimizer.step_in_backward(job.model):
        job.backward()
    assert job.optimizer.state[job.model.layers[0].weight]["step"] == 1


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpoints(use_reentrant: bool) -> None:
    def trained(job: Job, end: Callable[[], None]) -> None:
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
        for layer in job.model.layers:
            x = checkpoint(layer, x, use_reentrant=use_reentrant)
        x.square().mean().backward()
        end()

    plain, job = Job(), Job()
    job.optimizer.step_in_backward(job.model)
    for _ in range(3):
        trained(plain, plain.optimizer.step)
        trained(job, lambda: None)
        plain.optimizer.zero_grad()
    job.check_equals(plain)


def test_every_backward_is_a_step() -> None:
    job = Job()
    job.optimizer.step_in_backward()
    job.backward()
    job.backward()
    assert job.optimizer.state[job.model.layers[0].weight]["step"] == 2


def test_step_takes_what_backward_left() -> None:
    """One layer in backward, the others after it; a schedule between."""
    plain, job = Job(), Job()
    schedules = [
        torch.optim.lr_scheduler.ExponentialLR(each.optimizer, 0.8) for each in (plain, job)
    ]
    job.optimizer.step_in_backward(job.model.layers[1])
    for _ in range(4):
        plain.step()
        job.optimizer.zero_grad()
        job.backward()
        assert job.model.layers[1].weight.grad is None
        assert job.model.layers[2].weight.grad is not None
        job.optimizer.step()
        for schedule in schedules:
            schedule.step()
        job.check_equals(plain)


@pytest.mark.parametrize("part", ["all", "layer"])
def test_neither_is_checked_again(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both go on as C++'s alone, side by side."""
    job = Job(backend="cpu")
    job.optimizer.step_in_backward(job.model if part == "all" else job.model.layers[1])
    job.backward()
    job.optimizer.step()
    job.optimizer.zero_grad()

    def fail(*args: Any) -> None:
        raise AssertionError("checked again")

    monkeypatch.setattr(stepper_module, "check_entry", fail)
    for number in range(3):
        job.optimizer.param_groups[0]["lr"] = 0.1 / (1 + number)
        job.backward()
        job.optimizer.step()
        job.optimizer.zero_grad()
    assert job.optimizer.state[job.model.layers[1].weight]["step"] == 4


def test_thawed_later() -> None:
    plain, job = Job(), Job()
    for each in (plain, job):
        each.model.layers[1].requires_grad_(False)
    job.optimizer.step_in_backward(job.model)
    assert not job.model.layers[1].weight.requires_grad
    for thawed in (False, True):
        for each in (plain, job):
            each.model.layers[1].requires_grad_(thawed)
        plain.step()
        job.backward()
        job.check_equals(plain)
    assert job.optimizer.state[job.model.layers[1].weight]["step"] == 1


def reload(job: Job) -> None:
    saved = pickle.loads(pickle.dumps(job.optimizer.state_dict()))
    for held in saved["state"].values():
        held["exp_avg"].mul_(2)
    job.optimizer.load_state_dict(saved)


def replace_moments(job: Job) -> None:
    for held in job.optimizer.state.values():
        held["exp_avg"] = held["exp_avg"].clone().mul_(2)


def clear(job: Job) -> None:
    job.optimizer.state.clear()


def exchange_groups(job: Job) -> None:
    job.optimizer.param_groups.reverse()


def change_options(job: Job) -> None:
    job.optimizer.param_groups[1].update(lr=0.2, betas=(0.5, 0.6), weight_decay=0.1)


def cast(job: Job) -> None:
    job.model.double().float()


@pytest.mark.parametrize(
    "change", [reload, replace_moments, clear, exchange_groups, change_options, cast]
)
def test_nothing_is_stale(change: Callable[[Job], None]) -> None:
    plain, job = Job(), Job()
    job.optimizer.step_in_backward(job.model)
    for number in range(6):
        if number == 3:
            change(plain)
            change(job)
        plain.step()
        job.backward()
        job.check_equals(plain)


def test_a_checkpoint_between_is_the_plain_one() -> None:
    plain, job = Job(), Job()
    job.optimizer.step_in_backward()
    for _ in range(2):
        plain.step()
        job.backward()
    found, expected = job.optimizer.state_dict(), plain.optimizer.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    for key, held in expected["state"].items():
        assert all(same_bits(found["state"][key][name], held[name]) for name in held)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda job: pickle.loads(pickle.dumps(job))], ids=["copy", "pickle"]
)
def test_a_copy_steps_plainly(copied: Callable[[Job], Job]) -> None:
    job = Job()
    job.optimizer.step_in_backward()
    job.backward()
    twin = copied(job)
    job.backward()
    twin.step()
    twin.check_equals(job)
    before = copy.deepcopy(twin.values())
    twin.backward()
    assert different_values(twin.values(), before) == []


def test_nothing_leaks() -> None:
    job = Job()
    job.optimizer.step_in_backward()
    job.backward()
    dead = [weakref.ref(job.optimizer), weakref.ref(job.model.layers[0].weight)]
    del job
    gc.collect()
    assert [ref() for ref in dead] == [None, None]


def test_an_optimizer_that_is_gone_is_told_of() -> None:
    job = Job()
    job.optimizer.step_in_backward(job.model.layers[1])
    job.optimizer = None
    gc.collect()
    with pytest.warns(RuntimeWarning, match="is gone") as warned:
        job.backward()
    assert len(warned) == 2
    assert job.model.layers[1].weight.grad is not None
    AdamAL(job.model.parameters()).step_in_backward(job.model)


def test_the_handle_keeps_the_optimizer() -> None:
    model = nn.Linear(2, 2)
    handle = AdamAL(model.parameters()).step_in_backward(model)
    before = model.weight.detach().clone()
    gc.collect()
    model(torch.ones(1, 2)).sum().backward()
    assert not same_bits(model.weight, before)
    handle.remove()


def test_a_second_backward_through_a_kept_graph_is_torchs_error() -> None:
    """The parameters it saved have been stepped since."""
    job = Job()
    job.optimizer.step_in_backward()
    loss = job.loss()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_a_graph_of_the_gradients() -> None:
    plain, job = Job(), Job()
    job.optimizer.step_in_backward()
    plain.step()
    job.loss().backward(create_graph=True)
    job.check_equals(plain)


class TestRefusals:
    def test_an_error_comes_out_of_backward(self) -> None:
        job = Job()
        job.optimizer.step_in_backward(job.model)
        job.backward()
        job.optimizer.param_groups[0]["lr"] = -1.0
        job.optimizer.param_groups[1]["lr"] = -1.0
        with refused(job.optimizer, ValueError, "lr=-1.0"):
            job.backward()
        assert any(p.grad is not None for p in job.model.parameters())

    def test_a_norm(self) -> None:
        job = Job(max_grad_norm=1.0)
        with refused(job.optimizer, RuntimeError, "max_grad_norm=1.0", "None"):
            job.optimizer.step_in_backward()
        job.optimizer.max_grad_norm = None
        with job.optimizer.step_in_backward():
            job.optimizer.max_grad_norm = 2.0
            with refused(job.optimizer, RuntimeError, "max_grad_norm=2.0"):
                job.backward()
            with refused(job.optimizer, RuntimeError, "max_grad_norm=2.0"):
                job.optimizer.step()

    def test_a_scaler(self) -> None:
        job = Job()
        scaler = torch.amp.GradScaler("cpu")
        with job.optimizer.step_in_backward(job.model.layers[1]):
            scaler.scale(job.loss()).backward()
            with refused(job.optimizer, RuntimeError, "GradScaler"):
                scaler.step(job.optimizer)
        job.optimizer.grad_scale = torch.tensor(2.0)
        with refused(job.optimizer, RuntimeError, "GradScaler"):
            job.optimizer.step_in_backward()

    def test_differentiable(self) -> None:
        job = Job(differentiable=True)
        with refused(job.optimizer, RuntimeError, "differentiable=True"):
            job.optimizer.step_in_backward()

    def test_twice(self) -> None:
        job = Job()
        job.optimizer.step_in_backward(job.model.layers[1])
        other = AdamAL(job.model.parameters())
        for optimizer in (job.optimizer, other):
            with refused(optimizer, ValueError, "already", "remove()"):
                optimizer.step_in_backward()
        job.optimizer.step_in_backward(job.model.layers[2])

    def test_of_another_model(self) -> None:
        job = Job()
        with refused(job.optimizer, ValueError, "model"):
            job.optimizer.step_in_backward(nn.Linear(2, 2))
        with refused(job.optimizer, ValueError, "parameter 1", "add_param_group"):
            job.optimizer.step_in_backward([job.model.spare.weight, nn.Parameter(torch.ones(1))])

    def test_distributed_data_parallel(self) -> None:
        job = Job()
        wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
        nn.Module.__init__(wrapped)
        wrapped.module = job.model
        with refused(job.optimizer, ValueError, "DistributedDataParallel"):
            job.optimizer.step_in_backward(wrapped)

    def test_compiled(self) -> None:
        job = Job()
        step = torch.compile(job.optimizer.step, backend="eager", fullgraph=True)
        job.backward()
        job.optimizer.step_in_backward()
        with refused(job.optimizer, RuntimeError, "step_in_backward"):
            step()
        torch._dynamo.reset()


def test_a_compiled_model() -> None:
    plain, job = Job(), Job()
    job.model.compile(backend="aot_eager", fullgraph=True)
    job.optimizer.step_in_backward(job.model)
    for _ in range(3):
        plain.step()
        job.backward()
        job.check_equals(plain)
    torch._dynamo.reset()


def test_the_module_is_found_beside_the_package_as_before() -> None:
    assert adamal_kernels.in_backward.InBackwardHandle is InBackwardHandle
