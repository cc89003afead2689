"""Measures what a set costs: step() with one against step() without, on the CPU kernel.

    python benchmarks/projected_step.py

Both take turns in one process, over parameters of equal shapes and gradients; printed are the
medians of their ratios. An inactive ball is one that no row leaves; an active one is left by every
row in every step, because the rows are pushed out of it before each.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from adamal_kernels import AdamAL, Box, L1Ball, L2Ball, Simplex
from adamal_kernels.projections import Projection


class Shape(NamedTuple):
    name: str
    count: int
    size: tuple[int, ...]


SHAPES = (
    Shape("1 x 4096 x 4096", 1, (4096, 4096)),
    Shape("2000 x 2048", 2000, (2048,)),
    Shape("2000 x 16", 2000, (16,)),
)
_FAR = 1e6


def sets_for(shape: Shape) -> dict[str, Projection]:
    """Return the sets to measure, by name: of whole tensors and, of matrices, of their slices."""
    sets: dict[str, Projection] = {
        "Box": Box(-1, 1),
        "L2Ball, inactive": L2Ball(_FAR),
        "L2Ball, active": L2Ball(0.5),
        "L1Ball, active": L1Ball(0.5),
        "Simplex": Simplex(),
    }
    if len(shape.size) > 1:
        sets["L2Ball of each row, inactive"] = L2Ball(_FAR, dim=1)
        sets["L2Ball of each row, active"] = L2Ball(0.5, dim=1)
        sets["L2Ball of each column, active"] = L2Ball(0.5, dim=0)
    return sets


class Contender:
    """Parameters, of values about 1, and an optimizer that steps them."""

    def __init__(self, shape: Shape, projection: Projection | None, backend: str) -> None:
        torch.manual_seed(0)
        self.start = [torch.randn(shape.size) for _ in range(shape.count)]
        self.params = [value.clone().requires_grad_() for value in self.start]
        self.optimizer = AdamAL(self.params, projection=projection, backend=backend)

    def time(self, grads: list[Tensor]) -> float:
        """Return the seconds of a step from the start values."""
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.start)
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad
        start = time.perf_counter()
        self.optimizer.step()
        return time.perf_counter() - start


def ratio(
    shape: Shape, projection: Projection, backend: str, rounds: int
) -> tuple[float, float, float]:
    """Return the median milliseconds with the set and without, and that of their ratios."""
    contenders = [Contender(shape, chosen, backend) for chosen in (projection, None)]
    grads = [torch.randn(shape.size) for _ in range(shape.count)]
    seconds = [[contender.time(grads) for contender in contenders] for _ in range(3 + rounds)][3:]
    with_set, without = (statistics.median(column) * 1e3 for column in zip(*seconds, strict=True))
    return with_set, without, statistics.median(a / b for a, b in seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--backend", default="cpu")
    chosen = parser.parse_args()
    table = Table("tensors", "set", "ms with", "ms without", "ratio")
    for shape in SHAPES:
        for name, projection in sets_for(shape).items():
            with_set, without, relative = ratio(shape, projection, chosen.backend, chosen.rounds)
            table.add_row(shape.name, name, f"{with_set:.2f}", f"{without:.2f}", f"{relative:.2f}")
    Console().print(table)
    print(
        f"float32, backend {chosen.backend}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, medians of {chosen.rounds} steps each"
    )


if __name__ == "__main__":
    main()
