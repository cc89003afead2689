"""Sharded, tensor-parallel and data-parallel steps: the same bits as one process's."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import amp_distributed_cases
from helpers.between_workers import locked
from helpers.distributed_cases import CASES, World, checkpointed, load, model, values_of
from helpers.forked_pytest import CONTEXT
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

from adamal_kernels import AdamAL
from adamal_kernels.step.sharded import local_part
from adamal_kernels.verify import different_values

LONGEST_SECONDS = 300

Outcomes = dict[str, list[str]]


@pytest.fixture(scope="session")
def folder(session_folder: Path) -> Path:
    return session_folder / "worlds"


def outcomes_of(size: int, folder: Path) -> Outcomes:
    """Return the outcomes of a world, which is run once."""
    made = folder / f"outcomes-{size}.json"
    with locked(made):
        if not made.exists():
            made.write_text(json.dumps(run_world(size, folder)))
    return json.loads(made.read_text())


def run_world(size: int, folder: Path) -> Outcomes:
    """Run all cases in a world of its own; return what each raised on each rank."""
    ranks = [
        CONTEXT.Process(target=amp_distributed_cases.run, args=(rank, size, folder), daemon=True)
        for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + LONGEST_SECONDS
    for rank in ranks:
        rank.join(max(0, deadline - time.monotonic()))
    for rank in ranks:
        if rank.is_alive():
            rank.kill()
            rank.join()
    outcomes: Outcomes = {}
    for name in CASES:
        files = [folder / f"outcomes-{size}-{rank}" / name for rank in range(size)]
        outcomes[name] = [
            file.read_text() if file.exists() else "not run: an earlier case failed or hung"
            for file in files
        ]
    outcomes["exit"] = [str(rank.exitcode) for rank in ranks]
    return outcomes


@pytest.fixture(scope="session")
def world_of_2(folder: Path) -> Outcomes:
    return outcomes_of(2, folder)


@pytest.fixture(scope="session")
def world_of_3(folder: Path, world_of_2: Outcomes) -> Outcomes:
    """After the other, whose checkpoint it loads."""
    return outcomes_of(3, folder)


@pytest.mark.parametrize("name", [*CASES, "exit"])
@pytest.mark.parametrize("world", ["world_of_2", "world_of_3"])
def test_case(name: str, world: str, request: pytest.FixtureRequest) -> None:
    outcomes: Outcomes = request.getfixturevalue(world)
    expected = "0" if name == "exit" else ""
    failed = {i: text for i, text in enumerate(outcomes[name]) if text != expected}
    assert failed == {}, "\n".join(f"rank {i}:\n{text}" for i, text in failed.items())


def test_a_checkpoint_is_loaded_by_one_process(
    world_of_3: Outcomes, folder: Path, tmp_path: Path
) -> None:
    assert world_of_3["distributed_checkpoint"] == 3 * [""]
    twin = checkpointed(net := model(World(0, 2, tmp_path)))
    load(net, twin.optimizer, folder / "saved-by-3")
    expected = torch.load(folder / "whole-3")
    assert different_values(values_of(twin.optimizer, twin.params), expected) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CPUOffloadPolicy needs a GPU")
def test_offloaded_parameters_are_stepped_by_the_cpu_kernel(tmp_path: Path) -> None:
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cuda", (1,))
        net = model(World(0, 1, tmp_path)).cuda()
        start = [p.detach().cpu().clone() for p in net.parameters()]
        fully_shard(net, mesh=mesh, offload_policy=CPUOffloadPolicy())
        params = list(net.parameters())
        optimizer = AdamAL(params, lr=0.1)
        wholes = [p.requires_grad_() for p in start]
        reference = AdamAL(wholes, lr=0.1, backend="reference")
        for step in range(3):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(step)
            net(torch.randn(2, 5, generator=generator).cuda()).square().mean().backward()
            for param, single in zip(params, wholes, strict=True):
                assert param.to_local().device.type == "cpu"
                single.grad = param.grad.to_local().clone()
            optimizer.step()
            reference.step()
        assert optimizer.backends_used == ("cpu",)
        found = [
            {"param": p.to_local(), **{k: local_part(v) for k, v in optimizer.state[p].items()}}
            for p in params
        ]
        expected = [{"param": p, **reference.state[p]} for p in wholes]
        assert different_values(found, expected) == []
        dist.barrier()
    finally:
        dist.destroy_process_group()
