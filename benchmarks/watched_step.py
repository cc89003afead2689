"""Measures what watch() adds to a step.

    python benchmarks/watched_step.py

One optimizer is watched and not, in turn, over the same tensors; prints the medians of step() and
their ratio, for a v that is young and for one that hardly grows any more.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from adamal_kernels import AdamAL

SHAPES = {
    "2000 x 16": (2000, 16),
    "2000 x 2048": (2000, 2048),
    "300 x 100 000": (300, 100_000),
    "1 x 20M": (1, 20_000_000),
}
UNTIMED = 3  # After each turn: checked, bound, and repeated once.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--turns", type=int, default=12, help="of each kind")
    parser.add_argument("--steps", type=int, default=6, help="timed in a turn")
    chosen = parser.parse_args()
    table = Table(
        title=f"{chosen.device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for heading in ("tensors x elements", "v", "plain, ms", "watched, ms", "ratio"):
        table.add_column(heading, justify="right")
    for name, (tensors, elements) in SHAPES.items():
        for age in ("young", "old"):
            plain, watched = measure(chosen, tensors, elements, age)
            cells = (f"{1e3 * plain:.3f}", f"{1e3 * watched:.3f}", f"{watched / plain:.3f}")
            table.add_row(name, age, *cells)
    Console().print(table)


def measure(
    chosen: argparse.Namespace, tensors: int, elements: int, age: str
) -> tuple[float, float]:
    """Return the median seconds of a step that is not watched, and of one that is."""
    generator = torch.Generator(chosen.device).manual_seed(0)

    def values() -> torch.Tensor:
        return torch.randn(elements, device=chosen.device, generator=generator)

    params = [values().requires_grad_() for _ in range(tensors)]
    optimizer = AdamAL(params, backend=chosen.backend)
    for param in params:
        param.grad = values()
    optimizer.step()
    if age == "old":
        for state in optimizer.state.values():
            state["step"].fill_(100_000)
            state["exp_avg_sq"].fill_(12.0)  # Less than one square in a thousand is larger.
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(2 * chosen.turns):
        watch = optimizer.watch() if turn % 2 else None
        for step in range(UNTIMED + chosen.steps):
            for param in params:
                assert param.grad is not None
                # Other ones, of the same values: v would stop growing at the same gradients.
                param.grad = param.grad.roll(1)
            synchronize(chosen.device)
            start = time.perf_counter()
            optimizer.step()
            synchronize(chosen.device)
            if step >= UNTIMED:
                seconds[watch is not None].append(time.perf_counter() - start)
        if watch is not None:
            watch.stop()
    return statistics.median(seconds[False]), statistics.median(seconds[True])


def synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
