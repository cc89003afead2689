"""What every rank of a gloo world runs, against one process; ``test_distributed.py`` starts it.

The cases are collective: every rank runs all of them in one order. The one process that they are
compared with is each rank itself, stepping whole plain tensors with ``reference``.
"""

from __future__ import annotations

import copy
import math
import os
import re
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from adamal_kernels import Adam, AdamAL, AdamALW, Box
from adamal_kernels.build_info import load_extension
from adamal_kernels.step import sharded as distributed
from adamal_kernels.step import stepper as stepper_module
from adamal_kernels.step.sharded import mesh_and_placements, reduce_squared_norms
from adamal_kernels.verify import different_values, same_bits
from helpers.support import refused

CASES: dict[str, Callable[[World], None]] = {}
TIMEOUT = timedelta(seconds=60)
BACKENDS = ("cpu", "foreach", "reference")


class World(NamedTuple):
    rank: int
    size: int
    folder: Path
    """That all worlds share."""

    def mesh(self, *shape: int, names: Sequence[str] = ("dp", "tp")) -> DeviceMesh:
        shape = shape or (self.size,)
        return init_device_mesh("cpu", shape, mesh_dim_names=tuple(names[: len(shape)]))


def case(function: Callable[[World], None]) -> Callable[[World], None]:
    CASES[function.__name__] = function
    return function


def run(rank: int, size: int, folder: Path) -> None:
    """Run every case on one rank; write what each raised, or that it passed."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous-{size}",
        rank=rank,
        world_size=size,
        timeout=TIMEOUT,
    )
    world = World(rank, size, folder)
    outcomes = folder / f"outcomes-{size}-{rank}"
    outcomes.mkdir()
    for name, function in CASES.items():
        try:
            function(world)
        except BaseException:  # As pytest's own failures are.
            # The others may wait for this rank in a collective, which fails once it is gone.
            (outcomes / name).write_text(traceback.format_exc())
            os._exit(1)
        (outcomes / name).write_text("")
    dist.barrier()  # Or a rank aborts now and then.
    dist.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor.clone()


def values_of(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> list[dict[str, Any]]:
    return [
        {
            name: whole(value)
            for name, value in {"param": param, **optimizer.state.get(param, {})}.items()
        }
        for param in params
    ]


class Twin:
    """Parameters spread over processes, and the same ones whole, stepped by reference."""

    def __init__(
        self,
        params: Sequence[Tensor],
        cls: type[torch.optim.Optimizer] = AdamAL,
        backend: str = "cpu",
        **options: Any,
    ) -> None:
        self.params = list(params)
        self.wholes = [whole(p).requires_grad_() for p in self.params]
        self.optimizer = cls(self.params, backend=backend, **options)
        self.reference = cls(self.wholes, backend="reference", **options)
        self.steps = 0

    def set_gradients(self) -> None:
        """Set the same new gradients here and there."""
        self.steps += 1
        generator = torch.Generator().manual_seed(self.steps)
        for param, single in zip(self.params, self.wholes, strict=True):
            single.grad = torch.randn(single.shape, generator=generator, dtype=torch.float64).to(
                single.dtype
            )
            param.grad = single.grad.clone()
            if isinstance(param, DTensor):
                param.grad = None
                param.grad = spread(single.grad, param)

    def take_gradients(self) -> None:
        """Set the whole ones' gradients from those that a backward pass left."""
        for param, single in zip(self.params, self.wholes, strict=True):
            single.grad = None if param.grad is None else whole(param.grad)

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.set_gradients()
            self.optimizer.step()
            self.reference.step()

    def assert_equal(self) -> None:
        found = values_of(self.optimizer, self.params)
        different = different_values(found, values_of(self.reference, self.wholes))
        assert different == [], different

    def assert_sharded_alike(self) -> None:
        """Check that moments are spread as their parameters are, and steps are plain."""
        for param in self.params:
            state = self.optimizer.state[param]
            assert type(state["step"]) is Tensor
            assert state["step"].shape == ()
            for name in ("exp_avg", "exp_avg_sq"):
                assert type(state[name]) is type(param.detach()), name
                assert mesh_and_placements(state[name]) == mesh_and_placements(param), name


def spread(value: Tensor, like: DTensor) -> DTensor:
    """Return this rank's part of a tensor that every rank has, as ``like`` is spread."""
    replicate = [Replicate()] * like.device_mesh.ndim
    replicated = DTensor.from_local(value.clone(), like.device_mesh, replicate, run_check=False)
    return replicated.redistribute(like.device_mesh, like.placements)


@contextmanager
def checked_in_python() -> Iterator[list[str]]:
    """Collect the parameters that steps check in Python: none where the step before is repeated."""
    seen: list[str] = []
    check_entry = stepper_module.check_entry

    def recording(param: Tensor, options: Any, where: str, *more: Any) -> Any:
        if options.backend == "cpu":
            seen.append(where)
        return check_entry(param, options, where, *more)

    stepper_module.check_entry = recording
    try:
        yield seen
    finally:
        stepper_module.check_entry = check_entry


def parameters(mesh: DeviceMesh, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return DTensors with even, uneven and empty shards, and replicated and plain ones."""
    torch.manual_seed(0)
    kinds = [
        ((6, 4), Shard(0)),
        ((7, 3), Shard(0)),
        ((3, 5), Shard(1)),
        ((1,), Shard(0)),
        ((4, 6), Shard(1)),
        ((2, 3), Replicate()),
        ((), Replicate()),
    ]
    made: list[Tensor] = [
        nn.Parameter(
            distribute_tensor(
                torch.randn(shape, dtype=dtype), mesh, [placement], src_data_rank=None
            )
        )
        for shape, placement in kinds
    ]
    return [*made, nn.Parameter(torch.randn(5, 2, dtype=dtype))]


class Block(nn.Module):
    """Widths that divide evenly for tensor parallelism and unevenly for FSDP."""

    def __init__(self, world: World) -> None:
        super().__init__()
        torch.manual_seed(1)
        width = 2 * world.size
        self.norm = nn.LayerNorm(5)
        self.up = nn.Linear(5, width)
        self.down = nn.Linear(width, 5)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.norm(x)))) * self.scale


def model(world: World) -> nn.Module:
    return nn.Sequential(Block(world), Block(world))


def batch(world: World, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + world.rank)
    return torch.randn(2, world.size, 5, generator=generator)


def train(world: World, twin: Twin, net: nn.Module, steps: int = 3, clip: bool = False) -> None:
    """Step with gradients of real backward passes."""
    for _ in range(steps):
        twin.steps += 1
        twin.optimizer.zero_grad()
        net(batch(world, twin.steps)).square().mean().backward()
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        twin.take_gradients()
        twin.optimizer.step()
        twin.reference.step()


def sharded(world: World, mesh: DeviceMesh) -> nn.Module:
    net = model(world)
    for block in net:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def in_parallel(world: World, mesh: DeviceMesh) -> nn.Module:
    net = model(world)
    for block in net:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(block, mesh, plan)
    return net


@case
def steps_equal_one_process(world: World) -> None:
    for cls, dtype, options in (
        (AdamAL, torch.float32, {"lr": 0.1, "projection": Box(-0.5, 0.5), "weight_decay": 0.1}),
        (AdamALW, torch.complex64, {"lr": 0.1}),
        (Adam, torch.bfloat16, {"lr": 0.1, "amsgrad": True, "maximize": True}),
    ):
        for backend in BACKENDS:
            twin = Twin(parameters(world.mesh(), dtype), cls, backend, **options)
            with checked_in_python() as seen:
                twin.step(3)
            twin.assert_equal()
            twin.assert_sharded_alike()
            assert len(seen) == (len(twin.params) if backend == "cpu" else 0), seen


@case
def watched_parts_are_those_of_the_whole(world: World) -> None:
    twin = Twin(parameters(world.mesh()), lr=0.1, projection=Box(-0.5, 0.5))
    with twin.optimizer.watch() as here, twin.reference.watch() as there:
        twin.step(3)
    parts: list[Any] = [None] * world.size
    dist.all_gather_object(parts, list(here.read().values()))
    for *of_ranks, expected in zip(*parts, there.read().values(), strict=True):
        if sum(part.numel for part in of_ranks) != expected.numel:
            assert of_ranks == [expected] * world.size  # Every rank has all of it.
            continue
        held = [part for part in of_ranks if part.numel]
        assert {part.step for part in of_ranks} == {expected.step} == {3}
        for name, combine in (
            ("smallest_step", min),
            ("largest_step", max),
            ("least_budget_change", min),
            ("steps_since_growth", min),
        ):
            found = combine(getattr(part, name) for part in held)
            assert found == getattr(expected, name), name
        for name in ("grown_fraction", "boundary_fraction"):
            count = sum(round(getattr(part, name) * part.numel) for part in held)
            assert count == round(getattr(expected, name) * expected.numel), name


@case
def fully_sharded(world: World) -> None:
    for clip in (False, True):
        net = sharded(world, world.mesh())
        twin = Twin(list(net.parameters()), lr=0.1, projection=Box(-0.9, 0.9))
        local_shapes = {tuple(p.to_local().shape) for p in twin.params}
        gathered: list[Any] = [None] * world.size
        dist.all_gather_object(gathered, local_shapes)
        assert any(0 in shape for shapes in gathered for shape in shapes), "some shard is empty"
        with checked_in_python() as seen:
            train(world, twin, net, clip=clip)
        twin.assert_equal()
        twin.assert_sharded_alike()
        assert len(seen) == len(twin.params), "the first step is checked, the others are not"


@case
def tensor_parallel(world: World) -> None:
    net = in_parallel(world, world.mesh())
    twin = Twin(list(net.parameters()), AdamALW, lr=0.1)
    with checked_in_python() as seen:
        for step in range(3):
            net.zero_grad()
            # Every rank of one tensor-parallel group has the same input.
            net(batch(world._replace(rank=0), step)).square().mean().backward()
            twin.take_gradients()
            twin.optimizer.step()
            twin.reference.step()
    twin.assert_equal()
    twin.assert_sharded_alike()
    assert len(seen) == len(twin.params)


@case
def sequence_parallel(world: World) -> None:
    net = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 5))
    parallelize_module(net, world.mesh(), {"0": SequenceParallel()})
    params = list(net[0].parameters())
    twin = Twin(params, lr=0.1)
    with checked_in_python() as seen:
        for step in range(3):
            net.zero_grad()
            x = DTensor.from_local(batch(world, step), world.mesh(), [Shard(1)], run_check=False)
            net[0](x).square().to_local().mean().backward()
            twin.take_gradients()
            twin.optimizer.step()
            twin.reference.step()
    twin.assert_equal()
    assert len(seen) == len(params)


@case
def fully_sharded_and_tensor_parallel(world: World) -> None:
    for shape in ((world.size, 1), (1, world.size)):
        mesh = world.mesh(*shape)
        net = in_parallel(world, mesh["tp"])
        for block in net:
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(net, mesh=mesh["dp"])
        twin = Twin(list(net.parameters()), lr=0.1, weight_decay=0.1)
        assert len({p.device_mesh.ndim for p in twin.params}) == 2, "meshes of both kinds"
        replica = world._replace(rank=world.rank // shape[1])
        with checked_in_python() as seen:
            train(replica, twin, net)
        twin.assert_equal()
        twin.assert_sharded_alike()
        assert len(seen) == len(twin.params)


@case
def hybrid_sharded(world: World) -> None:
    for shape in ((world.size, 1), (1, world.size)):
        net = sharded(world, world.mesh(*shape, names=("replicate", "shard")))
        twin = Twin(list(net.parameters()), lr=0.1)
        with checked_in_python() as seen:
            train(world, twin, net)
        twin.assert_equal()
        twin.assert_sharded_alike()
        assert len(seen) == len(twin.params)


@case
def gradient_to_be_summed(world: World) -> None:
    mesh = world.mesh()
    for backend in BACKENDS:
        twin = Twin(parameters(mesh)[:-1], backend=backend, lr=0.1)
        with checked_in_python() as seen:
            for step in range(3):
                twin.set_gradients()
                for i, (param, single) in enumerate(zip(twin.params, twin.wholes, strict=True)):
                    if (step + i) % 2:
                        continue
                    # Whole numbers, so that their sum does not depend on its order.
                    summand = single.grad.mul(8).round().add_(world.rank)
                    param.grad = DTensor.from_local(summand, mesh, [Partial()], run_check=False)
                    single.grad = param.grad.full_tensor()
                given = [
                    (p.grad, p.grad.placements, p.grad.to_local().clone()) for p in twin.params
                ]
                twin.optimizer.step()
                twin.reference.step()
                for param, (grad, placements, part) in zip(twin.params, given, strict=True):
                    assert param.grad is grad
                    assert grad.placements == placements
                    assert same_bits(grad.to_local(), part)
        twin.assert_equal()
        assert len(seen) == (len(twin.params) if backend == "cpu" else 0)


@case
def gradient_still_on_its_way(world: World) -> None:
    mesh = world.mesh()
    param = parameters(mesh)[5]
    twin = Twin([param], lr=0.1)
    with checked_in_python() as seen:
        for _ in range(3):
            twin.set_gradients()
            part = twin.wholes[0].grad.clone()
            summand = DTensor.from_local(part / world.size, mesh, [Partial()], run_check=False)
            param.grad = summand.redistribute(mesh, [Replicate()], async_op=True)
            local = param.grad._local_tensor
            assert type(local).__name__ == "AsyncCollectiveTensor", type(local)
            twin.wholes[0].grad = summand.full_tensor()
            twin.optimizer.step()
            twin.reference.step()
    twin.assert_equal()
    assert len(seen) == 1


def replace_moment(optimizer: Any, params: list[Tensor]) -> None:
    state = optimizer.state[params[1]]
    state["exp_avg"] = state["exp_avg"].clone() * 2


def edit_moment(optimizer: Any, params: list[Tensor]) -> None:
    optimizer.state[params[1]]["exp_avg_sq"].mul_(2)


def edit_parameter(optimizer: Any, params: list[Tensor]) -> None:
    with torch.no_grad():
        params[0].mul_(0.5)


def change_lr(optimizer: Any, params: list[Tensor]) -> None:
    optimizer.param_groups[0]["lr"] = 0.3


def edit_count(optimizer: Any, params: list[Tensor]) -> None:
    optimizer.state[params[0]]["step"].fill_(7)


def scale_gradients(optimizer: Any, params: list[Tensor]) -> None:
    for param in params:
        if param.grad is not None:
            param.grad.mul_(0.5)


def drop_gradients(optimizer: Any, params: list[Tensor]) -> None:
    for param in params[::2]:
        param.grad = None


@case
def what_changes_between_steps_counts(world: World) -> None:
    for change, is_checked in (
        (replace_moment, True),
        (edit_moment, False),
        (edit_parameter, False),
        (change_lr, False),
        (edit_count, False),
        (scale_gradients, False),
        (drop_gradients, False),
    ):
        twin = Twin(parameters(world.mesh()), lr=0.1)
        twin.step(2)
        with checked_in_python() as seen:
            twin.set_gradients()
            change(twin.optimizer, twin.params)
            change(twin.reference, twin.wholes)
            for optimizer in (twin.optimizer, twin.reference):
                optimizer.step()
            twin.step(2)
        twin.assert_equal()
        assert len(seen) == (len(twin.params) if is_checked else 0), change.__name__


@case
def autograd_sees_that_a_saved_parameter_changed(world: World) -> None:
    for steps in (0, 2):
        param = nn.Parameter(distribute_tensor(torch.ones(4), world.mesh(), [Shard(0)]))
        other = nn.Parameter(distribute_tensor(torch.ones(4), world.mesh(), [Shard(0)]))
        twin = Twin([param], lr=0.1)
        twin.step(steps)
        loss = (param * other).sum()
        twin.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@case
def a_class_that_keeps_its_parts_elsewhere(world: World) -> None:
    class Elsewhere:
        _local_tensor = _spec = property(lambda self: None)

    extension = load_extension("_C")
    assert distributed._sharded_class_of(extension, Elsewhere) is None
    as_it_is = distributed._sharded_class_of
    distributed._sharded_class_of = lambda *_: None
    try:
        twin = Twin(parameters(world.mesh()), lr=0.1)
        with checked_in_python() as seen:
            twin.step(3)
    finally:
        distributed._sharded_class_of = as_it_is
    twin.assert_equal()
    assert len(seen) == 3 * len(twin.params), "every step is checked"


def _gradient_of_plain(twin: Twin, other: DeviceMesh) -> None:
    param = twin.params[-1]
    param.grad = distribute_tensor(torch.ones(param.shape), other, [Replicate(), Replicate()])


def _plain_gradient(twin: Twin, other: DeviceMesh) -> None:
    twin.params[5].grad = torch.ones(twin.params[5].shape)


def _gradient_on_another_mesh(twin: Twin, other: DeviceMesh) -> None:
    param = twin.params[1]
    param.grad = distribute_tensor(torch.ones(param.shape), other, [Shard(0), Replicate()])


def _moment_on_another_mesh(twin: Twin, other: DeviceMesh) -> None:
    state = twin.optimizer.state[twin.params[1]]
    part = state["exp_avg"].to_local()  # At the same address, so that only the mesh tells.
    state["exp_avg"] = DTensor.from_local(
        part, other, [Replicate(), Shard(0)], shape=state["exp_avg"].shape, stride=(3, 1)
    )


def _plain_moment(twin: Twin, other: DeviceMesh) -> None:
    param = twin.params[1]
    twin.optimizer.state[param]["exp_avg_sq"] = torch.ones(param.shape)


def _moment_of_plain(twin: Twin, other: DeviceMesh) -> None:
    param = twin.params[-1]
    value = distribute_tensor(torch.ones(param.shape), other, [Replicate(), Replicate()])
    twin.optimizer.state[param]["exp_avg"] = value


def _moment_placed_otherwise(twin: Twin, other: DeviceMesh) -> None:
    state = twin.optimizer.state[twin.params[1]]
    state["exp_avg"] = state["exp_avg"].redistribute(placements=[Replicate()])


def _part_of_another_shape(twin: Twin, other: DeviceMesh) -> None:
    param = twin.params[0]
    part = torch.ones(9, 4)
    param.grad = DTensor.from_local(
        part, param.device_mesh, param.placements, shape=param.shape, stride=param.stride()
    )


@case
def refusals_change_nothing(world: World) -> None:
    other = world.mesh(1, world.size)
    for spoil, error, words in (
        (_gradient_of_plain, RuntimeError, ["params[7]", "is a DTensor", "plain", "full_tensor()"]),
        (_plain_gradient, RuntimeError, ["params[5]", "is a plain tensor", "from_local()"]),
        (_gradient_on_another_mesh, RuntimeError, ["params[1]", "one mesh"]),
        (_part_of_another_shape, RuntimeError, ["params[0]", "(9, 4)", "local tensor"]),
        (_moment_on_another_mesh, ValueError, ["state['exp_avg'] of params[1]", "is on"]),
        (_plain_moment, ValueError, ["state['exp_avg_sq'] of params[1]", "a plain tensor"]),
        (_moment_of_plain, ValueError, ["state['exp_avg'] of params[7]", "is a DTensor"]),
        (_moment_placed_otherwise, ValueError, ["state['exp_avg']", "Replicate", "Shard"]),
    ):
        for steps in (1, 2):
            twin = Twin(parameters(world.mesh()), lr=0.1)
            twin.step(steps)
            spoil(twin, other)  # All else, the gradients included, is as in the last step.
            with refused(twin.optimizer, error, *words):
                twin.optimizer.step()
    summand = DTensor.from_local(torch.ones(3), world.mesh(), [Partial()], run_check=False)
    optimizer = AdamAL(parameters(world.mesh()))
    with refused(optimizer, ValueError, "params[0] of group 1", "Partial", "redistribute()"):
        optimizer.add_param_group({"params": [summand.detach().requires_grad_()]})


@case
def data_parallel(world: World) -> None:
    net = DistributedDataParallel(model(world))
    twin = Twin(list(net.parameters()), AdamALW, lr=0.1)
    train(world, twin, net)
    twin.assert_equal()


@case
def zero_redundancy(world: World) -> None:
    options = {"lr": 0.1, "projection": Box(-0.9, 0.9), "betas": (0.8, 0.9)}

    def started() -> tuple[nn.Module, ZeroRedundancyOptimizer]:
        net = model(world)
        return net, ZeroRedundancyOptimizer(
            net.parameters(), optimizer_class=AdamAL, backend="cpu", **options
        )

    def step(step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for param, single in zip(net.parameters(), reference_net.parameters(), strict=True):
            single.grad = torch.randn(param.shape, generator=generator)
            param.grad = single.grad.clone()
        optimizer.step()
        reference.step()

    def assert_equal() -> None:
        found = list(net.parameters())
        for param, single in zip(found, reference_net.parameters(), strict=True):
            assert same_bits(param.detach(), single.detach())
            if param in optimizer.optim.state:
                ours, theirs = optimizer.optim.state[param], reference.state[single]
                assert different_values([ours], [theirs]) == []

    net, optimizer = started()
    reference_net = model(world)
    reference = AdamAL(reference_net.parameters(), backend="reference", **options)
    for i in range(3):
        step(i)
    assert_equal()
    optimizer.consolidate_state_dict(to=0)
    box: list[Any] = [optimizer.state_dict() if world.rank == 0 else None]
    dist.broadcast_object_list(box, src=0)
    saved = box[0]
    assert len(saved["state"]) == len(list(net.parameters()))
    reloaded, optimizer = started()
    reloaded.load_state_dict(net.state_dict())
    net = reloaded
    optimizer.load_state_dict(copy.deepcopy(saved))
    for i in range(3, 6):
        step(i)
    assert_equal()
    # What it saved is an ordinary checkpoint, too.
    single = AdamAL(model(world).parameters(), backend="reference", **options)
    single.load_state_dict(saved)
    assert len(single.state) == len(saved["state"])


def checkpointed(net: nn.Module) -> Twin:
    return Twin(list(net.parameters()), lr=0.1, projection=Box(-0.9, 0.9), weight_decay=0.1)


def save(world: World, net: nn.Module, optimizer: torch.optim.Optimizer, name: str) -> None:
    state = {"model": net.state_dict(), "optimizer": get_optimizer_state_dict(net, optimizer)}
    dcp.save(state, checkpoint_id=world.folder / name)


def load(net: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Load what any number of ranks saved."""
    before = [whole(p) for p in net.parameters()]
    state = {"model": net.state_dict(), "optimizer": get_optimizer_state_dict(net, optimizer)}
    after = [whole(p) for p in net.parameters()]
    assert all(map(same_bits, before, after)), "the step that makes the state moves nothing"
    dcp.load(state, checkpoint_id=path)
    net.load_state_dict(state["model"])
    set_optimizer_state_dict(net, optimizer, state["optimizer"])


@case
def distributed_checkpoint(world: World) -> None:
    # Widths do not depend on the number of ranks, so that all of them can load it.
    net = sharded(world._replace(size=2), world.mesh())
    twin = checkpointed(net)
    twin.step(3)
    save(world, net, twin.optimizer, f"saved-by-{world.size}")
    if world.rank == 0:
        torch.save(values_of(twin.reference, twin.wholes), world.folder / f"whole-{world.size}")
    twin.step(2)
    twin.assert_equal()


@case
def distributed_checkpoint_of_another_world(world: World) -> None:
    path = world.folder / "saved-by-2"
    with torch.no_grad():
        net = sharded(world._replace(size=2), world.mesh())
        for param in net.parameters():
            param.add_(10)  # Outside the box, and not what was saved.
    twin = checkpointed(net)
    load(net, twin.optimizer, path)
    saved = torch.load(world.folder / "whole-2")
    assert different_values(values_of(twin.optimizer, twin.params), saved) == []
    twin.assert_sharded_alike()
    for single, values in zip(twin.wholes, saved, strict=True):
        with torch.no_grad():
            single.copy_(values.pop("param"))
        twin.reference.state[single] = values
    twin.step(3)
    twin.assert_equal()


@case
def full_state_dict(world: World) -> None:
    net = sharded(world, world.mesh())
    twin = checkpointed(net)
    twin.step(3)
    full = get_optimizer_state_dict(
        net, twin.optimizer, options=StateDictOptions(full_state_dict=True)
    )
    names = [name for name, _ in net.named_parameters()]
    reference = [twin.reference.state[single] for single in twin.wholes]
    assert different_values([full["state"][name] for name in names], reference) == []
    net.zero_grad(set_to_none=True)  # Where there are gradients, torch makes no state to load into.
    again = checkpointed(net).optimizer
    set_optimizer_state_dict(
        net,
        again,
        full if world.rank == 0 else {},
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    )
    twin.optimizer = again
    twin.assert_sharded_alike()
    twin.step(2)
    twin.assert_equal()


@case
def state_dict_of_its_own(world: World) -> None:
    twin = Twin(parameters(world.mesh()), lr=0.1)
    twin.step(2)
    for saved in (
        twin.optimizer.state_dict(),
        twin.reference.state_dict(),  # One process's: each rank takes its part.
    ):
        again = AdamAL(twin.params, lr=0.2, backend="cpu")
        again.load_state_dict(copy.deepcopy(saved))
        twin.optimizer = again
        twin.assert_equal()
        twin.assert_sharded_alike()
    # As DCP takes it without its own helpers.
    dcp.save(
        {"optimizer": twin.optimizer.state_dict()}, checkpoint_id=world.folder / f"own-{world.size}"
    )
    again = AdamAL(twin.params, lr=0.1, backend="cpu")
    for param in twin.params:
        param.grad = torch.zeros_like(param)
    lr, again.param_groups[0]["lr"] = 0.1, 0.0
    again.step()
    again.param_groups[0]["lr"] = lr
    state = {"optimizer": again.state_dict()}
    dcp.load(state, checkpoint_id=world.folder / f"own-{world.size}")
    again.load_state_dict(state["optimizer"])
    twin.optimizer = again
    twin.step(2)
    twin.assert_equal()
    twin.assert_sharded_alike()
    moved = [p.detach() for p in parameters(world.mesh(1, world.size)["tp"])]
    plain = AdamAL([nn.Parameter(torch.ones(p.shape)) for p in moved])
    with refused(plain, ValueError, "exp_avg of parameter 0", "is a DTensor", "full_state_dict"):
        plain.load_state_dict(twin.optimizer.state_dict())


@case
def squared_norms(world: World) -> None:
    mesh = world.mesh()
    grid = world.mesh(1, world.size)
    torch.manual_seed(3)
    uneven, wide, tall = torch.randn(7, 3), torch.randn(4, 5), torch.randn(6, 2)
    tensors = [
        distribute_tensor(uneven, mesh, [Shard(0)], src_data_rank=None),
        distribute_tensor(wide, mesh, [Replicate()], src_data_rank=None),
        distribute_tensor(tall, grid, [Shard(0), Shard(1)], src_data_rank=None),
        distribute_tensor(tall, grid, [Replicate(), Shard(0)], src_data_rank=None),
        distribute_tensor(wide[:1, :1], mesh, [Shard(0)], src_data_rank=None),
        tall,
    ]
    sums: dict[Any, Tensor] = {}
    for tensor in tensors:
        part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        key = mesh_and_placements(tensor)
        sums[key] = (
            sums.get(key, torch.zeros((), dtype=torch.float64)) + part.double().square().sum()
        )
    given = {key: value.clone() for key, value in sums.items()}
    found = reduce_squared_norms(sums)
    expected = sum(whole(t).double().square().sum() for t in tensors)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    assert all(same_bits(sums[key], given[key]) for key in sums)
    everyones = [torch.zeros_like(found) for _ in range(world.size)]
    dist.all_gather(everyones, found)
    assert all(same_bits(found, other) for other in everyones)
    one = torch.ones((), dtype=torch.float64)
    for key, value, word in (
        ((mesh, (Partial(),)), one, "Partial"),
        ((mesh, (Shard(0),)), one.float(), "float32"),
        ((mesh, (Shard(0),)), one.reshape(1), "(1,)"),
    ):
        with pytest.raises(ValueError, match=re.escape(word)):
            reduce_squared_norms({key: value})
    assert reduce_squared_norms({}).item() == 0


@case
def clipped_by_the_norm_of_all(world: World) -> None:
    """Whole numbers, whose squares are added without rounding: in any order to the same bits."""
    twin = Twin(parameters(world.mesh()), lr=0.1, max_grad_norm=3.0)
    with checked_in_python() as seen:
        for step in range(5):
            twin.set_gradients()
            for param, single in zip(twin.params, twin.wholes, strict=True):
                single.grad.mul_(2 + step).round_()
                if step == 3 and single is twin.wholes[0]:
                    single.grad.view(-1)[0] = math.inf
                param.grad = None
                is_sharded = isinstance(param, DTensor)
                param.grad = spread(single.grad, param) if is_sharded else single.grad.clone()
            twin.optimizer.step()
            twin.reference.step()
            assert same_bits(twin.optimizer.last_grad_norm, twin.reference.last_grad_norm)
            twin.assert_equal()
    assert twin.optimizer.last_grad_norm > 3
    assert [o.skipped_steps.item() for o in (twin.optimizer, twin.reference)] == [1, 1]
    assert len(seen) == len(twin.params)


@case
def pickled_state_dict(world: World) -> None:
    twin = Twin(parameters(world.mesh()), lr=0.1)
    twin.step(2)
    with tempfile.TemporaryFile() as file:
        torch.save(twin.optimizer.state_dict(), file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    again = AdamAL(twin.params, lr=0.2, backend="cpu")
    again.load_state_dict(saved)
    twin.optimizer = again
    twin.step(2)
    twin.assert_equal()
