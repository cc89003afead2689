"""Sets that couple elements spread over processes; cases beside those of ``distributed_cases``."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from adamal_kernels import Adam, AdamAL, L1Ball, L2Ball, Simplex
from adamal_kernels.step.sharded import splits_rows
from adamal_kernels.verify import different_values, same_bits
from helpers import distributed_cases
from helpers.distributed_cases import (
    BACKENDS,
    Twin,
    World,
    case,
    in_parallel,
    parameters,
    sharded,
    train,
    values_of,
    whole,
)

SETS = (L2Ball(0.7), L1Ball(0.9), Simplex(1.5))


def run(rank: int, size: int, folder: Path) -> None:
    """See ``distributed_cases.run``; found here, so that these cases are among them."""
    distributed_cases.run(rank, size, folder)


def assert_same_points(twin: Twin) -> None:
    """Check all but the multipliers to the bit, and those that no process has whole closely.

    Sums over several processes round otherwise than one process's, in the last bits of float64:
    of these parameters, in float32, that changes none.
    """
    found = values_of(twin.optimizer, twin.params)
    expected = values_of(twin.reference, twin.wholes)
    for values, others in zip(found, expected, strict=True):
        torch.testing.assert_close(
            values.pop("multiplier"), others.pop("multiplier"), rtol=1e-12, atol=1e-15
        )
    assert different_values(found, expected) == []


@case
def rows_spread_over_processes(world: World) -> None:
    for projection in SETS:
        for dim in (None, 0, -1):
            for backend in BACKENDS:
                params = parameters(world.mesh())
                row_set = type(projection)(projection.size, dim=dim)
                split = [splits_rows(p, row_set.reduced_dims(p.dim())) for p in params]
                assert any(split)
                assert not all(split)
                twin = Twin(params, backend=backend, lr=0.3, projection=row_set)
                twin.step(3)
                assert_same_points(twin)
                for param in params:
                    held = twin.optimizer.state[param]["multiplier"]
                    assert isinstance(held, DTensor) is isinstance(param, DTensor)


@case
def rows_of_amsgrad_spread_over_processes(world: World) -> None:
    """Their metric is that of the maximum, which the second moment falls away from."""
    twin = Twin(
        parameters(world.mesh()),
        Adam,
        lr=0.3,
        betas=(0.9, 0.1),
        amsgrad=True,
        projection=L2Ball(0.7),
    )
    twin.step(4)
    assert_same_points(twin)


@case
def rows_on_a_mesh_of_two_dimensions(world: World) -> None:
    mesh = world.mesh(1, world.size)
    torch.manual_seed(0)
    placements = [Shard(0), Shard(1)]
    values = torch.randn(5, 7, dtype=torch.float64)
    param = nn.Parameter(distribute_tensor(values, mesh, placements, src_data_rank=None))
    twin = Twin([param], lr=0.3, projection=L2Ball(0.4, dim=1))
    twin.step(3)
    multiplier = twin.optimizer.state[param]["multiplier"]
    assert multiplier.placements == (Shard(0), Replicate())
    assert multiplier.shape == (5, 1)
    torch.testing.assert_close(whole(param), twin.wholes[0].detach(), rtol=1e-12, atol=1e-14)


@case
def models_in_coupled_sets(world: World) -> None:
    for net in (sharded(world, world.mesh()), in_parallel(world, world.mesh())):
        for amp in (False, True):
            options = {"max_grad_norm": 0.1} if amp else {}
            twin = Twin(list(net.parameters()), lr=0.1, projection=L2Ball(0.8), **options)
            train(world, twin, net)
            if amp:  # Of which the norm's last bit may differ.
                for param, single in zip(twin.params, twin.wholes, strict=True):
                    assert whole(param).norm() <= 0.8 * (1 + 1e-6)
                    assert single.norm() <= 0.8 * (1 + 1e-6)
            else:
                assert_same_points(twin)


@case
def coupled_capturable_and_skipped(world: World) -> None:
    """Counts on the device, and steps that are skipped, the first and a later: none projects."""
    twin = Twin(
        parameters(world.mesh()),
        lr=0.3,
        projection=Simplex(),
        capturable=True,
        max_grad_norm=1e3,
    )
    for skipped in (1, 2):
        with torch.no_grad():
            for param in (*twin.params, *twin.wholes):
                param.add_(1)  # Out of the set.
        before = values_of(twin.optimizer, twin.params)
        twin.set_gradients()
        for optimizer in (twin.optimizer, twin.reference):
            first: Tensor = optimizer.param_groups[0]["params"][0]
            with torch.no_grad():
                first.grad.mul_(float("inf"))
            optimizer.step()
        assert twin.optimizer.skipped_steps == skipped
        after = values_of(twin.optimizer, twin.params)
        assert all(same_bits(a["param"], b["param"]) for a, b in zip(after, before, strict=True))
        twin.step(2)
        for param in twin.params:
            assert abs(whole(param).sum().item() - 1) < 1e-5


@case
def coupled_checkpoints(world: World) -> None:
    """Of the same ranks, and of one process, whose multipliers each rank takes its part of."""
    options = {"lr": 0.3, "projection": L2Ball(0.7, dim=0)}
    twin = Twin(parameters(world.mesh()), **options)
    twin.step(3)
    for saved in (twin.optimizer.state_dict(), twin.reference.state_dict()):
        again = AdamAL(twin.params, backend=BACKENDS[0])
        again.load_state_dict(saved)
        twin.optimizer = again
        twin.step()
        assert_same_points(twin)


@case
def coupled_distributed_checkpoint(world: World) -> None:
    net = sharded(world, world.mesh())
    twin = Twin(list(net.parameters()), lr=0.1, projection=L2Ball(0.3))
    train(world, twin, net, 2)
    optimizer = twin.optimizer
    path = world.folder / f"coupled-{world.size}"
    dcp.save({"optimizer": get_optimizer_state_dict(net, optimizer)}, checkpoint_id=path)
    wanted = [whole(optimizer.state[p]["multiplier"]) for p in twin.params]
    assert any((value > 0).any() for value in wanted)
    for param in twin.params:
        optimizer.state[param]["multiplier"].to_local().zero_()
    state = {"optimizer": get_optimizer_state_dict(net, optimizer)}
    dcp.load(state, checkpoint_id=path)
    found = [whole(optimizer.state[p]["multiplier"]) for p in twin.params]
    assert all(map(same_bits, found, wanted))
    train(world, twin, net, 1)
    assert_same_points(twin)
