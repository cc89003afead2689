"""Scalers and norms over processes, FSDP1 and ZeRO among them; cases beside those of the others."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from adamal_kernels import AdamAL
from adamal_kernels.step.sharded import local_part
from adamal_kernels.verify import different_values, same_bits
from helpers import coupled_distributed_cases
from helpers.distributed_cases import (
    Twin,
    World,
    batch,
    case,
    checked_in_python,
    model,
    parameters,
    sharded,
    train,
    values_of,
)
from helpers.support import refused

# A step shows how far its gradient was clipped only where the denominator is not the gradient's.
OPTIONS: dict[str, Any] = {"lr": 0.5, "eps": 1.0}


def run(rank: int, size: int, folder: Path) -> None:
    """See ``distributed_cases.run``; found here, so that these cases are among them."""
    coupled_distributed_cases.run(rank, size, folder)


def flat(net: nn.Sequential, *outside: nn.Module, use_orig_params: bool) -> nn.Module:
    """Shard a model, and each of its blocks, as FSDP1 does, all but the modules ``outside``."""
    options: dict[str, Any] = {
        "use_orig_params": use_orig_params,
        "ignored_modules": outside,
        "device_id": torch.device("cpu"),
    }
    for i, block in enumerate(net):
        net[i] = FullyShardedDataParallel(block, **options)
    return FullyShardedDataParallel(net, **options)


def gathered(value: Any, world: World) -> list[Any]:
    found: list[Any] = [None] * world.size
    dist.all_gather_object(found, value)
    return found


def infinite_on_one(world: World, params: Sequence[Tensor]) -> None:
    """Set an infinity in the gradient that one process has of its part; the others know nothing."""
    if world.rank == world.size - 1:
        grads = [local_part(p.grad) for p in params if p.grad is not None]
        next(grad for grad in grads if grad.numel()).view(-1)[0] = math.inf


def backward(net: nn.Module, step: int, scaler: Any = None) -> None:
    """Set gradients that are the same whichever process's input they are of."""
    net.zero_grad()
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(step))
    loss = 10 * net(x).square().sum()
    (loss if scaler is None else scaler.scale(loss)).backward()


@case
def scaler_of_flat_shards(world: World) -> None:
    """It decides for all processes, whoever asks for a step that unscales."""
    for options in ({}, {"fused": True}):
        for use_orig_params in (False, True):
            net = flat(model(world), use_orig_params=use_orig_params)
            params = list(net.parameters())
            optimizer = AdamAL(params, **options)
            assert not optimizer._step_supports_amp_scaling
            scaler = ShardedGradScaler("cpu", init_scale=4.0, process_group=dist.group.WORLD)
            taken = 0
            for step, is_finite in enumerate((False, True, True, False, True)):
                backward(net, step, scaler)
                if not is_finite:
                    infinite_on_one(world, params)
                scaler.step(optimizer)
                scaler.update()
                taken += is_finite
                counts = [held["step"].item() for held in optimizer.state.values()]
                assert set(counts) <= {taken}
                assert gathered(scaler.get_scale(), world) == [scaler.get_scale()] * world.size
            assert scaler.get_scale() == 1.0
            assert gathered(taken, world) == [3] * world.size


@case
def norm_of_flat_shards(world: World) -> None:
    """Refused where nobody says whose parts they are; else that of one process."""
    words = ["FSDP1", "grad_norm_group", "torch.distributed.group.WORLD", "clip_grad_norm_"]
    for use_orig_params, ignored in ((False, False), (True, False), (True, True)):
        single, net = model(world), model(world)
        wholes = list(single.parameters())
        outside = [net[1].norm] if ignored else []
        net = flat(net, *outside, use_orig_params=use_orig_params)
        params = list(net.parameters())
        optimizer = AdamAL(params, max_grad_norm=3.0, **OPTIONS)
        reference = AdamAL(wholes, backend="reference", **OPTIONS)
        backward(net, 0)
        with refused(optimizer, RuntimeError, *words):
            optimizer.step()
        assert optimizer.skipped_steps == 0
        optimizer.grad_norm_group = dist.group.WORLD
        for step in range(4):
            backward(net, step)
            backward(single, step)
            if step == 2:
                infinite_on_one(world, params)
            optimizer.step()
            norm = clip_grad_norm_(wholes, 3.0)
            assert optimizer.last_grad_norm is not None
            if step == 2:
                assert gathered(optimizer.skipped_steps.item(), world) == [1] * world.size
                continue
            reference.step()
            assert norm > 3
            torch.testing.assert_close(optimizer.last_grad_norm.float(), norm)
            norms = gathered(optimizer.last_grad_norm, world)
            assert all(same_bits(norm, optimizer.last_grad_norm) for norm in norms)
            with FullyShardedDataParallel.summon_full_params(net):
                for param, whole in zip(net.parameters(), wholes, strict=True):
                    torch.testing.assert_close(param.detach(), whole.detach())
        # In the steady state, too.
        optimizer.grad_norm_group = None
        with refused(optimizer, RuntimeError, *words):
            optimizer.step()
        optimizer.max_grad_norm = None
        optimizer.step()


def zero_optimizer(
    params: Sequence[Tensor], **options: Any
) -> tuple[ZeroRedundancyOptimizer, AdamAL]:
    optimizer = ZeroRedundancyOptimizer(params, optimizer_class=AdamAL, **OPTIONS, **options)
    return optimizer, optimizer.optim


@case
def norm_of_a_partition(world: World) -> None:
    """Whole numbers, so that sums are exact. With one parameter, some processes have none."""
    for count in (1, 7):
        for infinite in (False, True):
            params = [nn.Parameter(torch.ones(3, 2 + i)) for i in range(count)]
            wholes = [nn.Parameter(p.detach().clone()) for p in params]
            optimizer, own = zero_optimizer(params)
            own.max_grad_norm = 2.0
            reference = AdamAL(wholes, max_grad_norm=2.0, backend="reference", **OPTIONS)
            for step in range(4):
                for i, (param, whole) in enumerate(zip(params, wholes, strict=True)):
                    whole.grad = torch.full_like(whole, float(1 + i + step))
                    if infinite and step == 2 and i == 0:
                        whole.grad[0, 0] = math.inf
                    param.grad = whole.grad.clone()
                optimizer.step()
                reference.step()
                assert own.last_grad_norm is not None
                assert reference.last_grad_norm is not None
                assert reference.last_grad_norm > 2
                assert same_bits(own.last_grad_norm, reference.last_grad_norm)
                assert all(
                    same_bits(p.detach(), q.detach()) for p, q in zip(params, wholes, strict=True)
                )
            assert own.skipped_steps == reference.skipped_steps == infinite


@case
def norm_set_where_it_is_not_handed_on(world: World) -> None:
    params = [nn.Parameter(torch.ones(3, 2)) for _ in range(2 * world.size)]
    for name, value in (("max_grad_norm", 1.0), ("grad_norm_group", dist.group.WORLD)):
        with pytest.raises(ValueError, match=rf"zero\.optim\.{name}"):
            zero_optimizer(params, **{name: value})
        for param in params:
            param.grad = torch.ones_like(param)
        for steps in (0, 2):
            optimizer, own = zero_optimizer(params)
            for _ in range(steps):
                optimizer.step()
            setattr(optimizer, name, value)
            with refused(own, RuntimeError, name, f"zero.optim.{name}"):
                optimizer.step()
            delattr(optimizer, name)
            optimizer.step()
            for each in (optimizer, own):  # As the one's step would set in the other.
                each.param_groups[0][name] = value
            with refused(own, ValueError, name, "param group"):
                optimizer.step()


@case
def a_copy_has_no_process_group(world: World) -> None:
    params = [nn.Parameter(torch.ones(3, 2)) for _ in range(2)]
    optimizer = AdamAL(params, max_grad_norm=0.1, grad_norm_group=dist.group.WORLD)
    copied = copy.deepcopy(copy.deepcopy(optimizer))
    assert optimizer.grad_norm_group is dist.group.WORLD
    assert copied.grad_norm_group is None
    for each in (optimizer, copied):
        for param in each.param_groups[0]["params"]:
            param.grad = torch.full((3, 2), float(1 + world.rank))
    optimizer.step()
    with refused(copied, RuntimeError, "copy", "grad_norm_group"):
        copied.step()
    copied.grad_norm_group = dist.group.WORLD
    copied.step()
    assert same_bits(copied.last_grad_norm, optimizer.last_grad_norm)
    expected = sum(12.0 * (1 + rank) ** 2 for rank in range(world.size))
    assert abs(copied.last_grad_norm.item() ** 2 - expected) < 1e-9 * expected
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert optimizer.grad_norm_group is dist.group.WORLD
    assert "grad_norm_group" not in repr(saved)


@case
def data_parallel_clipped(world: World) -> None:
    """Every process has all gradients, so its norm is that of all."""
    net = DistributedDataParallel(model(world))
    twin = Twin(list(net.parameters()), max_grad_norm=0.1, **OPTIONS)
    for _ in range(3):
        train(world, twin, net, 1)
        assert twin.optimizer.last_grad_norm > 0.1
        assert same_bits(twin.optimizer.last_grad_norm, twin.reference.last_grad_norm)
    with torch.no_grad():
        twin.params[0].grad.view(-1)[0] = math.inf  # As the average is, on all.
    twin.take_gradients()
    twin.optimizer.step()
    twin.reference.step()
    twin.assert_equal()
    assert twin.optimizer.skipped_steps == 1


@case
def found_inf_of_one_process_is_all_processes(world: World) -> None:
    """Whatever its number and device, and where only some processes repeat a bound step."""
    for found in (1.0, math.nan):
        twin = Twin(parameters(world.mesh()), lr=0.1)
        twin.step()
        twin.optimizer.found_inf = torch.zeros(())
        twin.step()
        before = values_of(twin.optimizer, twin.params)
        for number in range(3):
            twin.set_gradients()
            if (
                number == 1 and world.rank == 0
            ):  # Its step is checked in Python, that of others not.
                state = twin.optimizer.state[twin.params[0]]
                state["exp_avg"] = state["exp_avg"].clone()
            given = torch.tensor([found if world.rank == number % world.size else 0.0])
            twin.optimizer.found_inf = given.clone()
            with checked_in_python() as seen:
                twin.optimizer.step()
            assert same_bits(twin.optimizer.found_inf, given)
            assert bool(seen) is (number >= 1 and world.rank == 0)
        assert twin.optimizer.skipped_steps == 3
        assert different_values(values_of(twin.optimizer, twin.params), before) == []
        twin.optimizer.found_inf = torch.zeros(())
        twin.step()
        twin.assert_equal()


@case
def scaler_of_a_mesh(world: World) -> None:
    """Also where a replicated parameter is the first, and torch's own look is each process's."""
    mesh = world.mesh()
    for first, fused in ((Shard(0), None), (Shard(0), True), (Replicate(), True)):
        params = [
            nn.Parameter(distribute_tensor(torch.ones(shape), mesh, [placement]))
            for shape, placement in (((world.size,), first), ((7, 3), Shard(0)))
        ]
        optimizer = AdamAL(params, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.zeros(()))
        for is_finite in (True, False, True):
            for param in params:
                param.grad = torch.full_like(param, 4.0, requires_grad=False)
            if not is_finite:
                infinite_on_one(world, params[1:])
            scaler.step(optimizer)
            scaler.update()
        counts = [float(held["step"]) for held in optimizer.state.values()]
        assert gathered(counts, world) == [[2.0, 2.0]] * world.size
        if first == Shard(0):
            assert gathered(scaler.get_scale(), world) == [2.0] * world.size


@case
def models_with_a_scaler(world: World) -> None:
    """Gradients of FSDP2 scaled by powers of two, whoever unscales: the plain step, to the bit."""
    for fused in (None, True):
        net = sharded(world, world.mesh())
        twin = Twin(list(net.parameters()), lr=0.1)
        twin.optimizer = AdamAL(twin.params, lr=0.1, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(5):
            net.zero_grad()
            scaler.scale(net(batch(world, step)).square().mean()).backward()
            if step == 2:
                infinite_on_one(world, twin.params)
            twin.take_gradients()
            for single in twin.wholes:
                single.grad /= scaler.get_scale()
            scaler.step(twin.optimizer)
            scaler.update()
            if step != 2:
                twin.reference.step()
            twin.assert_equal()
        assert scaler.get_scale() == 2.0
        assert twin.optimizer.skipped_steps == (1 if fused else 0)
