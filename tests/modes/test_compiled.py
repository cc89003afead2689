"""``step()`` in ``torch.compile(fullgraph=True)``: the bits of the eager step, compiled once."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.support import DEVICES, Place, unscaling
from torch import Tensor, nn
from torch._dynamo.exc import InternalTorchDynamoError
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import Optimizer

from adamal_kernels import Adam, AdamAL, AdamALW, Box, L2Ball
from adamal_kernels.modes.compiled import new_handle
from adamal_kernels.verify import different_values, same_bits


@pytest.fixture(autouse=True)
def dynamo() -> Iterator[None]:
    """Nothing compiled before; ``backward()`` is traced only where this is set."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        yield
    torch._dynamo.reset()


class Job:
    """A small model, its optimizer, and one step over data that depends on its number alone."""

    def __init__(self, cls: type = AdamAL, *, dtype: torch.dtype = torch.float32, **options: Any):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).to(dtype)
        self.unused = nn.Parameter(torch.ones(3, dtype=dtype))
        first, second = self.model[0], self.model[2]
        self.optimizer = cls(
            [
                {"params": [*first.parameters(), self.unused]},
                {"params": second.parameters(), "weight_decay": 0.1},
            ],
            **{key: copy.deepcopy(value) for key, value in options.items()},
        )
        self.taken = 0

    def loss(self, x: Tensor) -> Tensor:
        return (self.model(x) - 1).square().mean()

    def train(self, x: Tensor) -> Tensor:
        loss = self.loss(x)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def step(self, train: Callable[[Tensor], Any] | None = None) -> None:
        generator = torch.Generator().manual_seed(self.taken)
        x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
        self.optimizer.zero_grad()
        (train or self.train)(x.to(self.unused.dtype))
        self.taken += 1

    def values(self) -> list[dict[str, Tensor]]:
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        return [{"param": p.detach(), **self.optimizer.state.get(p, {})} for p in params]


def compiled(train: Callable[..., Any], backend: str) -> tuple[Callable[..., Any], Any]:
    counter = CompileCounterWithBackend(backend)
    return torch.compile(train, backend=counter, fullgraph=True), counter


OPTIONS: dict[str, tuple[type, dict[str, Any]]] = {
    "default": (AdamAL, {}),
    "decoupled": (AdamALW, {"lr": 0.03, "projection": Box(-0.4, 0.4)}),
    "amsgrad": (Adam, {"amsgrad": True}),
    "tensors": (AdamAL, {"lr": torch.tensor(0.03), "betas": (torch.tensor(0.8),) * 2}),
    "capturable": (AdamAL, {"capturable": True, "lr": torch.tensor(0.03, dtype=torch.float64)}),
    "clipped": (AdamAL, {"max_grad_norm": 0.05}),
    "reference": (AdamAL, {"backend": "reference"}),
}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("options", OPTIONS)
def test_whole_step_has_the_bits_of_the_eager_one(options: str, backend: str) -> None:
    cls, kwargs = OPTIONS[options]
    eager, job = Job(cls, **kwargs), Job(cls, **kwargs)
    train, counter = compiled(job.train, backend)
    for _ in range(5):
        eager.step()
        job.step(train)
        assert different_values(job.values(), eager.values()) == []
    # A second compilation at most: the first step moves the counts into one pack.
    assert 1 <= counter.frame_count <= 2
    assert job.unused not in job.optimizer.state
    assert job.optimizer.backends_used == eager.optimizer.backends_used
    if "max_grad_norm" in kwargs:
        assert same_bits(job.optimizer.last_grad_norm, eager.optimizer.last_grad_norm)


def test_step_alone_has_the_bits_of_the_eager_one_in_inductor() -> None:
    eager, job = Job(), Job()
    step, counter = compiled(job.optimizer.step, "inductor")

    def train(x: Tensor) -> None:
        job.loss(x).backward()
        step()

    for _ in range(4):
        eager.step()
        job.step(train)
        assert different_values(job.values(), eager.values()) == []
    assert counter.frame_count <= 2


def test_whole_step_in_inductor() -> None:
    """Inductor rounds the model's arithmetic otherwise; the oracle's limits are for the step."""
    eager, job = Job(dtype=torch.float64, lr=0.01), Job(dtype=torch.float64, lr=0.01)
    train, counter = compiled(job.train, "inductor")
    for _ in range(4):
        eager.step()
        job.step(train)
    for found, expected in zip(job.values(), eager.values(), strict=True):
        torch.testing.assert_close(found, expected)
    assert counter.frame_count <= 2


def _set(job: Job, lr: float) -> None:
    job.optimizer.param_groups[0]["lr"] = lr
    job.optimizer.param_groups[1]["lr"] = lr / 2


def _fill(job: Job, lr: float) -> None:
    for group in job.optimizer.param_groups:
        group["lr"].fill_(lr)


def _replace(job: Job, lr: float) -> None:
    for group in job.optimizer.param_groups:
        group["lr"] = torch.tensor(lr, dtype=torch.float64)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("change", [_set, _fill, _replace])
def test_a_changed_lr_is_not_compiled_anew(change: Callable[..., None], backend: str) -> None:
    lr = 0.1 if change is _set else torch.tensor(0.1, dtype=torch.float64)
    eager, job = Job(lr=lr), Job(lr=lr)
    train, counter = compiled(job.train, backend)
    for number in range(11):
        for each in (eager, job):
            change(each, 0.1 / (1 + number))
        eager.step()
        job.step(train)
        assert different_values(job.values(), eager.values()) == []
    # torch 2.11 guards it, and compiles it as a variable from the second value on.
    assert counter.frame_count <= 3


def test_a_schedule_beside_a_compiled_step() -> None:
    eager, job = Job(), Job()
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(each.optimizer, 0.1, total_steps=12)
        for each in (eager, job)
    ]
    train, counter = compiled(job.train, "eager")
    for _ in range(11):
        eager.step()
        job.step(train)
        for schedule in schedules:
            schedule.step()
        assert different_values(job.values(), eager.values()) == []
    assert counter.frame_count <= 3


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_lr_that_the_graph_changes(backend: str) -> None:
    lr = torch.tensor(0.125)  # torch 2.13 forgets changes of a float64 scalar on the CPU

    def decayed(job: Job, x: Tensor) -> None:
        job.loss(x).backward()
        for group in job.optimizer.param_groups:
            group["lr"].mul_(0.5)
        job.optimizer.step()

    eager, job = Job(lr=lr), Job(lr=lr)
    train, _ = compiled(lambda x: decayed(job, x), backend)
    for _ in range(3):
        eager.step(lambda x: decayed(eager, x))
        job.step(train)
        assert different_values(job.values(), eager.values()) == []
    assert job.optimizer.param_groups[0]["lr"].item() == 0.125 * 0.5**6


def test_gradients_of_a_functional_transform() -> None:
    eager, job = Job(), Job()

    def functional(x: Tensor) -> None:
        params = dict(job.model.named_parameters())

        def loss(values: dict[str, Tensor]) -> Tensor:
            return (torch.func.functional_call(job.model, values, (x,)) - 1).square().mean()

        grads = torch.func.grad(loss)({name: p.detach() for name, p in params.items()})
        for name, param in params.items():
            param.grad = grads[name]
        job.optimizer.step()

    with torch._dynamo.config.patch(trace_autograd_ops=False):
        train, _ = compiled(functional, "aot_eager")
        for _ in range(3):
            eager.step()
            job.step(train)
            assert different_values(job.values(), eager.values()) == []


def test_closure() -> None:
    eager, job = Job(), Job()

    def train(x: Tensor) -> Tensor:
        def closure() -> Tensor:
            loss = job.loss(x)
            loss.backward()
            return loss

        return job.optimizer.step(closure).detach()

    compiled_train, _ = compiled(train, "aot_eager")
    for _ in range(3):
        eager.step()
        job.step(compiled_train)
        assert different_values(job.values(), eager.values()) == []


def test_step_hooks_are_traced() -> None:
    eager, job = Job(), Job()
    for each in (eager, job):
        each.optimizer.register_step_pre_hook(halve_gradients)
    train, _ = compiled(job.train, "aot_eager")
    for _ in range(2):
        eager.step()
        job.step(train)
        assert different_values(job.values(), eager.values()) == []


def halve_gradients(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None:
                param.grad = param.grad * 0.5


@pytest.mark.parametrize("cls", [AdamAL, unscaling(AdamAL)], ids=["scaler's", "step's"])
def test_grad_scaler_around_a_compiled_step(cls: type) -> None:
    """The scaler unscales and skips, or the step."""
    eager, job = Job(cls), Job(cls)
    scalers = [torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2) for _ in range(2)]
    job.optimizer.step, counter = compiled(job.optimizer.step, "aot_eager")

    def train(each: Job, scaler: torch.amp.GradScaler, x: Tensor) -> None:
        scaler.scale(each.loss(x)).backward()
        if each.taken == 2:
            each.model[0].bias.grad[1] = torch.inf
        scaler.step(each.optimizer)
        scaler.update()

    for _ in range(5):
        eager.step(lambda x: train(eager, scalers[0], x))
        job.step(lambda x: train(job, scalers[1], x))
        assert different_values(job.values(), eager.values()) == []
    assert job.optimizer.state[job.model[0].weight]["step"] == 4
    assert job.optimizer.skipped_steps == (0 if cls is AdamAL else 1)
    assert counter.frame_count <= 4


def reload(job: Job) -> None:
    job.optimizer.load_state_dict(copy.deepcopy(job.optimizer.state_dict()))


def clear(job: Job) -> None:
    job.optimizer.state.clear()


def replace_moments(job: Job) -> None:
    for held in job.optimizer.state.values():
        held["exp_avg"] = held["exp_avg"].to(torch.float64).mul_(2)


def add_group(job: Job) -> None:
    job.model.append(nn.Linear(4, 4).requires_grad_())
    with torch.no_grad():
        job.model[-1].weight.copy_(torch.eye(4))
        job.model[-1].bias.zero_()
    job.optimizer.add_param_group({"params": job.model[-1].parameters(), "lr": 0.2})


def freeze(job: Job) -> None:
    job.model[0].requires_grad_(False)


def switch_amsgrad_on(job: Job) -> None:
    job.optimizer.param_groups[0]["amsgrad"] = True


def step_eagerly(job: Job) -> None:
    job.step()


def change_options(job: Job) -> None:
    job.optimizer.param_groups[0].update(betas=(0.5, 0.6), weight_decay=0.3, maximize=True)
    job.optimizer.max_grad_norm = 0.2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "change",
    [
        reload,
        clear,
        replace_moments,
        add_group,
        freeze,
        switch_amsgrad_on,
        step_eagerly,
        change_options,
    ],
)
def test_nothing_is_stale(change: Callable[[Job], None], backend: str) -> None:
    eager, job = Job(Adam), Job(Adam)
    train, _ = compiled(job.train, backend)
    for number in range(6):
        if number == 3:
            change(eager)
            change(job)
        eager.step()
        job.step(train)
        assert different_values(job.values(), eager.values()) == []


def test_a_copy_is_stepped_by_its_own_options() -> None:
    job = Job()
    train, _ = compiled(Job.train, "aot_eager")
    job.step(lambda x: train(job, x))
    twin, eager = copy.deepcopy(job), copy.deepcopy(job)
    before = job.values()[0]["param"].clone()
    for each in (twin, eager):
        each.optimizer.param_groups[0]["lr"] = 0.2
    twin.step(lambda x: train(twin, x))
    eager.step()
    assert different_values(twin.values(), eager.values()) == []
    assert same_bits(job.values()[0]["param"], before)


def test_a_step_without_gradients_changes_nothing() -> None:
    job = Job()
    job.step()
    before = copy.deepcopy(job.values())
    job.optimizer.zero_grad()
    step, _ = compiled(job.optimizer.step, "eager")
    step()
    assert different_values(job.values(), before) == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_opcheck(device: torch.device, amsgrad: bool) -> None:
    torch.manual_seed(0)
    params = [torch.randn(shape, device=device).requires_grad_() for shape in ((3, 4), (5,), ())]
    lr = torch.tensor(0.1, device=device)
    optimizer = Adam(params, lr=lr, amsgrad=amsgrad, projection=L2Ball(0.5))
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    held = [optimizer.state[param] for param in params[:2]]
    assert held[0]["step"]._base is held[1]["step"]._base is not None, "views of one pack"
    lists = [
        params[:2],
        [param.grad for param in params[:2]],
        [
            values[key]
            for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "multiplier")
            if amsgrad or key != "max_exp_avg_sq"
            for values in held
        ],
        [values["step"] for values in held],
        [lr],
    ]
    for scaled in (None, torch.ones((), device=device)):
        inputs = (scaled, None if scaled is None else torch.zeros((), device=device))
        torch.library.opcheck(
            torch.ops.adamal_kernels.step,
            (*lists, *inputs, [0, 1], [0], optimizer._handle, True),
        )


def test_the_operator_on_copies_changes_what_it_was_given() -> None:
    """Also where the step keeps its state in another type."""
    job = Job()
    job.step()
    param = job.model[0].weight
    held = job.optimizer.state[param]
    before, grad = copy.deepcopy(job.values()), torch.ones_like(param)
    copies = [param.detach().clone(), *(held[key].double() for key in held)]
    values = dict(zip(("param", *held), ([copy] for copy in copies), strict=True))
    torch.ops.adamal_kernels.step(
        values["param"],
        [grad],
        [*values["exp_avg"], *values["exp_avg_sq"]],
        values["step"],
        *([], None, None, [0], [], job.optimizer._handle, True),
    )
    assert different_values(job.values(), before) == []
    param.grad = grad
    job.optimizer.step()
    found = {key: value[0] for key, value in values.items()}
    expected = {"param": param.detach(), **{k: v.double() for k, v in held.items()}}
    assert different_values([found], [expected]) == []


class TestRefusals:
    """What the compiled step cannot do is an error; parameters and state stay as they were."""

    @staticmethod
    def run(job: Job, train: Callable[..., Any], error: Any, *words: str) -> None:
        before = copy.deepcopy([p.detach() for p in job.model.parameters()])
        with pytest.raises(error) as caught:
            job.step(train)
        assert [word for word in words if word not in str(caught.value)] == []
        after = [p.detach() for p in job.model.parameters()]
        assert all(map(same_bits, after, before))
        assert torch.is_grad_enabled()

    def test_differentiable(self) -> None:
        job = Job(differentiable=True)
        train, _ = compiled(job.train, "eager")
        self.run(job, train, RuntimeError, "differentiable=True", "outside")

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_an_option_out_of_range(self, backend: str) -> None:
        job = Job()
        train, _ = compiled(job.train, backend)
        job.step(train)
        job.optimizer.param_groups[1]["lr"] = -1.0
        # torch 2.11 wraps what is raised while it traces.
        error = (ValueError, InternalTorchDynamoError)
        self.run(job, train, error, "lr=-1.0")

    def test_a_norm_inside(self) -> None:
        job = Job(max_grad_norm=1.0)

        def train(x: Tensor) -> Tensor:
            job.train(x)
            return job.optimizer.last_grad_norm

        train, _ = compiled(train, "eager")
        self.run(job, train, Exception, "last_grad_norm cannot be compiled")

    def test_an_optimizer_that_is_gone(self) -> None:
        job = Job()
        handle = new_handle(job.optimizer)
        tensors = [[torch.ones(1)] for _ in range(3)]
        del job
        gc.collect()
        with pytest.raises(RuntimeError, match="is gone"):
            torch.ops.adamal_kernels.step(
                *tensors, [torch.ones(())], [], None, None, [0], [], handle, True
            )


def test_in_place(place: Place) -> None:
    """Every backend, from gradients that are there: the step needs nothing compiled by inductor."""
    optimizers = []
    params = [torch.randn(7, device=place.device).requires_grad_() for _ in range(2)]
    params[1].data.copy_(params[0].data)
    for param in params:
        optimizers.append(AdamAL([param], backend=place.backend))
    step, _ = compiled(optimizers[0].step, "aot_eager")
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        grad = torch.randn(7, generator=generator).to(place.device)
        for param in params:
            param.grad = grad.clone()
        step()
        optimizers[1].step()
        assert same_bits(*params)
    assert optimizers[0].backends_used == (place.backend,)
