"""What jobs do to a model and its optimizer between steps, where other optimizers went wrong.

Every scenario is run four times: with Adam and with torch's for-loop Adam, its control, in
float64, and with AdamAL and its reference backend, to the bit, in float32.
"""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from helpers.support import Place
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from adamal_kernels import Adam, AdamAL
from adamal_kernels.core.storage import Format
from adamal_kernels.verify import same_bits

OPTIONS = {"lr": 0.01, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def equal_gradients() -> Iterator[None]:
    """In every run: a convolution's depend on the number of threads, and on cuDNN's algorithm.

    A forked process needs the one thread too.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False, allow_tf32=False):
        yield
    torch.set_num_threads(threads)


class Net(nn.Module):
    """A small network whose convolution channels_last lays out otherwise; ``tied`` has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.inner = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        features = torch.tanh(self.conv(x)).mean((2, 3))
        return self.tied(torch.tanh(self.inner(features)))


class Job:
    """A model, its optimizer, and data that depends on the step's number alone."""

    def __init__(
        self,
        make: Callable[[Iterable[Any]], Optimizer],
        device: torch.device,
        dtype: torch.dtype,
        prepare: Callable[[Net], None] = lambda model: None,
    ) -> None:
        torch.manual_seed(0)
        self.model = Net().to(device, dtype)
        prepare(self.model)
        self.optimizer = make(self.model.parameters())
        self.taken = 0

    def batch(self) -> Tensor:
        weight = self.model.conv.weight
        generator = torch.Generator().manual_seed(self.taken)
        values = torch.randn(8, 3, 5, 5, generator=generator, dtype=torch.float64)
        return values.to(weight.device, weight.dtype)

    def backward(self, call: Callable[[Tensor], Tensor] | None = None) -> None:
        self.optimizer.zero_grad()
        x = self.batch()
        output = (call or self.model)(x)
        (output - x.mean((2, 3)).repeat(1, 2)[:, :4]).square().mean().backward()
        self.taken += 1

    def step(self, times: int = 3, call: Callable[[Tensor], Tensor] | None = None) -> None:
        for _ in range(times):
            self.backward(call)
            self.optimizer.step()


def shared_by_two_modules(job: Job) -> None:
    assert job.model.tied.weight is job.model.inner.weight
    assert len(job.optimizer.param_groups[0]["params"]) == 4
    job.step(6)


def _tie(model: Net) -> None:
    model.tied.weight = model.inner.weight


def thawed_later(job: Job) -> None:
    before = job.model.conv.weight.detach().clone()
    job.step()
    assert same_bits(job.model.conv.weight, before)
    assert job.model.conv.weight not in job.optimizer.state
    for param in job.model.conv.parameters():
        param.requires_grad_(True)
    job.step()
    assert job.optimizer.state[job.model.conv.weight]["step"] == 3
    job.model.inner.requires_grad_(False)
    job.step()
    assert job.optimizer.state[job.model.inner.weight]["step"] == 6


def _freeze(model: Net) -> None:
    model.conv.requires_grad_(False)


def state_offloaded_and_back(job: Job) -> None:
    """As offload tools do around every step: each tensor is replaced, twice."""
    for _ in range(5):
        job.step(1)
        for values in job.optimizer.state.values():
            for key, value in values.items():
                values[key] = value.to("cpu", copy=True)
        for param, values in job.optimizer.state.items():
            for key, value in values.items():
                if key != "step":
                    values[key] = value.to(param.device, copy=True)


def evaluated_with_averaged_weights(job: Job) -> None:
    """``p.data`` is another tensor for a while, and the old one comes back."""
    for _ in range(3):
        job.step(2)
        kept = [param.data for param in job.model.parameters()]
        for param in job.model.parameters():
            param.data = param.data * 0.5
        job.model(job.batch())
        for param, data in zip(job.model.parameters(), kept, strict=True):
            param.data = data
    for param in job.model.parameters():
        param.data = param.data.clone()
    job.step()


def channels_last_while_training(job: Job) -> None:
    job.step()
    job.model.to(memory_format=torch.channels_last)
    assert not job.model.conv.weight.is_contiguous()
    job.step()
    job.model.to(memory_format=torch.contiguous_format)
    job.step()


def gradients_of_other_strides(job: Job) -> None:
    job.step()
    for _ in range(3):
        job.backward()
        for param in job.model.parameters():
            if param.dim() > 1:
                param.grad = param.grad.transpose(0, 1).contiguous().transpose(0, 1)
        job.optimizer.step()


def gradients_in_one_buffer(job: Job) -> None:
    """As views of a bucket, which is how DDP keeps them; each is misaligned by the one before."""
    params = list(job.model.parameters())
    bucket = params[0].new_zeros(1 + sum(param.numel() for param in params))
    for _ in range(4):
        job.backward()
        offset = 1
        for param in params:
            view = bucket[offset : offset + param.numel()].view(param.shape)
            param.grad = view.copy_(param.grad)
            offset += param.numel()
        job.optimizer.step()


def gradients_sliced_and_expanded(job: Job) -> None:
    job.step()
    for _ in range(3):
        job.backward()
        for i, param in enumerate(job.model.parameters()):
            wide = torch.cat([param.grad, param.grad], dim=-1)
            sliced = wide[..., : param.shape[-1]]
            param.grad = sliced if i % 2 else param.grad.mean().expand(param.shape)
        job.optimizer.step()


def double_before_the_first_step(job: Job) -> None:
    job.model.double()
    job.step()


def in_shared_memory_while_training(job: Job) -> None:
    """The storage moves under the tensor, as ``share_memory`` leaves it."""
    job.step()
    before = job.model.inner.weight.data_ptr()
    job.model.share_memory()
    assert job.model.inner.weight.is_cuda or job.model.inner.weight.data_ptr() != before
    job.step()


def data_parallel(job: Job) -> None:
    """Without GPUs it calls the module itself; with one, after it has moved the module there."""
    device = job.model.conv.weight.device
    if device.type == "cpu" and torch.cuda.is_available():
        pytest.skip("DataParallel takes the CPU's modules only where there are no GPUs")
    job.step(4, nn.DataParallel(job.model, [device] if device.type == "cuda" else None))


def _replicas(model: Net, count: int) -> list[nn.Module]:
    """Return what ``torch.nn.parallel.replicate`` makes, on one device.

    Modules without parameters of their own, whose attributes are results of autograd.
    """
    copies = []
    for _ in range(count):
        modules = {module: module._replicate_for_data_parallel() for module in model.modules()}
        for module, replica in modules.items():
            for name, child in module._modules.items():
                setattr(replica, name, modules[child])
            for name, param in module._parameters.items():
                setattr(replica, name, None if param is None else param.view_as(param))
        copies.append(modules[model])
    return copies


def data_parallel_replicas(job: Job) -> None:
    def call(x: Tensor) -> Tensor:
        replicas = _replicas(job.model, 2)
        assert [list(replica.parameters()) for replica in replicas] == [[], []]
        return torch.cat([m(part) for m, part in zip(replicas, x.chunk(2), strict=True)])

    job.step(4, call)


def beside_forked_workers(job: Job) -> None:
    """Forked after the optimizer has bound its tensors; a worker holds copies of all of them."""
    job.step()
    loader = DataLoader(range(4), num_workers=2, multiprocessing_context="fork")
    for _ in loader:
        job.step(1)


def copied_alone(job: Job) -> None:
    """A copy of the optimizer has copies of the parameters, and leaves ours to us."""
    job.step()
    for other in (copy.deepcopy(job.optimizer), pickle.loads(pickle.dumps(job.optimizer))):
        before = [param.detach().clone() for param in job.model.parameters()]
        theirs = other.param_groups[0]["params"]
        for param in theirs:
            param.grad = torch.ones_like(param)
        other.step()
        assert all(same_bits(a, b) for a, b in zip(job.model.parameters(), before, strict=True))
        assert not any(same_bits(a, b) for a, b in zip(theirs, before, strict=True))
    job.step()


def steps_without_gradients(job: Job) -> None:
    job.step(2)
    for _ in range(2):
        job.optimizer.zero_grad()
        job.optimizer.step()
    job.step(2)


Scenario = Callable[[Job], None]
SCENARIOS: dict[Scenario, Callable[[Net], None]] = {
    shared_by_two_modules: _tie,
    thawed_later: _freeze,
    **dict.fromkeys(
        (
            state_offloaded_and_back,
            evaluated_with_averaged_weights,
            channels_last_while_training,
            gradients_of_other_strides,
            gradients_in_one_buffer,
            gradients_sliced_and_expanded,
            double_before_the_first_step,
            in_shared_memory_while_training,
            data_parallel,
            data_parallel_replicas,
            beside_forked_workers,
            copied_alone,
            steps_without_gradients,
        ),
        lambda model: None,
    ),
}


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
class TestScenario:
    def run(
        self, scenario: Scenario, place: Place, dtype: torch.dtype, cls: type, **options: Any
    ) -> Net:
        def make(params: Iterable[Any]) -> Optimizer:
            return cls(params, **OPTIONS, **options)

        job = Job(make, place.device, dtype, SCENARIOS[scenario])
        start = [param.detach().clone() for param in job.model.parameters()]
        scenario(job)
        for before, param in zip(start, job.model.parameters(), strict=True):
            assert not torch.equal(param, before.to(param.dtype))
        return job.model

    def test_follows_torchs_adam(self, place: Place, scenario: Scenario) -> None:
        dtype = torch.float64
        place.skip_unless_supported(Format(dtype, dtype))
        ours = self.run(scenario, place, dtype, Adam, backend=place.backend)
        theirs = self.run(scenario, place, dtype, torch.optim.Adam, foreach=False)
        torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))

    def test_has_the_references_bits(self, place: Place, scenario: Scenario) -> None:
        dtype = torch.float32
        found = self.run(scenario, place, dtype, AdamAL, backend=place.backend)
        expected = self.run(scenario, place, dtype, AdamAL, backend="reference")
        for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
            assert same_bits(ours, theirs)


@pytest.mark.parametrize("change", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
@pytest.mark.parametrize("steps", [0, 3])
def test_cast_after_the_optimizer_was_made(
    place: Place, steps: int, change: Callable[[nn.Module], nn.Module]
) -> None:
    """torch's Adam has no answer where it has taken a step: it keeps the old type's moments."""
    models = []
    for backend in (place.backend, "reference"):
        job = Job(
            lambda params, backend=backend: AdamAL(params, backend=backend, **OPTIONS),
            place.device,
            torch.float32,
        )
        job.step(steps)
        change(job.model)
        job.step()
        wide = torch.float64 if change is nn.Module.double else torch.float32
        for values in job.optimizer.state.values():
            assert values["exp_avg"].dtype == values["exp_avg_sq"].dtype == wide
            assert values["step"] == steps + 3
        models.append(job.model)
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert same_bits(ours, theirs)


def _train_in_child(job: Job, queue: Any) -> None:
    job.step()
    queue.put([param.detach().numpy() for param in job.model.parameters()])


def test_steps_in_a_forked_process() -> None:
    """With the optimizer it was forked with, bound to the parent's addresses, which are its own.

    On one thread, as all of torch: a pool of OpenMP threads does not outlive a fork.
    """
    place = Place(torch.device("cpu"), "cpu")
    job = Job(lambda params: AdamAL(params, backend="cpu", **OPTIONS), place.device, torch.float32)
    job.step()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_train_in_child, args=(job, queue), daemon=True)
    before = [param.detach().clone() for param in job.model.parameters()]
    process.start()
    process.join(60)
    assert process.exitcode == 0
    theirs = [torch.from_numpy(values) for values in queue.get()]
    assert all(same_bits(a, b) for a, b in zip(job.model.parameters(), before, strict=True))
    job.step()
    assert all(same_bits(a, b) for a, b in zip(job.model.parameters(), theirs, strict=True))
