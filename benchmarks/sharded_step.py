"""Measures what sharding adds to the host's work: step() over FSDP2's tensors and over plain ones.

    python benchmarks/sharded_step.py                 # one process
    python benchmarks/sharded_step.py --ranks 2

Two models of equal parameters, one of them under fully_shard in a gloo world, take turns in every
rank: a backward pass, which makes new gradients, and a timed step. Prints rank 0's medians and
their ratio, for AdamAL (cpu) and for torch.optim.Adam (foreach, the only kind that torch's takes
DTensors with on a CPU beside the for-loop).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from adamal_kernels import AdamAL

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamAL, cpu": lambda params: AdamAL(params, backend="cpu"),
    "torch.optim.Adam, foreach": lambda params: torch.optim.Adam(params, foreach=True),
}


class Rows(nn.Module):
    """Many small parameters."""

    def __init__(self, count: int, elements: int) -> None:
        super().__init__()
        self.rows = nn.ParameterList(torch.ones(elements) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.stack(list(self.rows)) * x).sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--tensors", type=int, default=2000)
    parser.add_argument("--elements", type=int, default=16, help="of each whole tensor")
    parser.add_argument("--rounds", type=int, default=50)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (chosen, Path(folder, "rendezvous"))
        torch.multiprocessing.spawn(measure, arguments, nprocs=chosen.ranks)


def measure(rank: int, chosen: argparse.Namespace, rendezvous: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=chosen.ranks
    )
    mesh = init_device_mesh("cpu", (chosen.ranks,))
    if rank == 0:
        print(
            f"{chosen.tensors} tensors of {chosen.elements} elements over {chosen.ranks} rank(s), "
            f"1 thread each, torch {torch.__version__}, medians of {chosen.rounds} steps"
        )
    for name, build in OPTIMIZERS.items():
        plain = Rows(chosen.tensors, chosen.elements)
        sharded = fully_shard(Rows(chosen.tensors, chosen.elements), mesh=mesh)
        models = {"plain": plain, "sharded": sharded}
        optimizers = {key: build(model.parameters()) for key, model in models.items()}
        seconds: dict[str, list[float]] = {key: [] for key in models}
        for round_ in range(3 + chosen.rounds):
            for key, model in models.items():
                optimizers[key].zero_grad()
                model(torch.ones(chosen.elements)).backward()
                start = time.perf_counter()
                optimizers[key].step()
                if round_ >= 3:  # State made, bound, and repeated once.
                    seconds[key].append(time.perf_counter() - start)
        if rank == 0:
            a_tensor = {
                key: statistics.median(values) / chosen.tensors * 1e6
                for key, values in seconds.items()
            }
            print(
                f"{name}: plain {a_tensor['plain']:.3f} us a tensor, sharded "
                f"{a_tensor['sharded']:.3f}, ratio {a_tensor['sharded'] / a_tensor['plain']:.2f}"
            )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
