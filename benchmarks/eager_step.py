"""Measures the eager fallback: ``foreach`` on the CPU against torch's for-loop Adam, and the rest.

    python benchmarks/eager_step.py [--case NAME] [--seconds 5] [--at-least 1.0]

All take turns in one process, step by step, on the same gradients; printed are medians, and how
many times as fast as the for-loop ``foreach`` is. With ``--at-least`` the exit status is 1 if
any case comes out below.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from adamal_kernels import AdamAL
from adamal_kernels.backends import BACKENDS
from adamal_kernels.bench.cases import CASES, BenchCase, Room, Shape

_ROOM = Room("cpu", 10**8)


def contenders(
    case: BenchCase, shapes: list[Shape], dtype: torch.dtype
) -> dict[str, tuple[list[torch.Tensor], Any]]:
    """Return parameters and optimizer of each contender, by name."""
    names = ["for-loop", "foreach"]
    if BACKENDS["cpu"].unavailable(torch.device("cpu")) is None:
        names.append("cpu")
    made = {}
    for name in names:
        params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
        groups: Any = [{"params": [p]} for p in params] if case.group_each else params
        made[name] = (
            params,
            torch.optim.Adam(groups, foreach=False, fused=False)
            if name == "for-loop"
            else AdamAL(groups, backend=name),
        )
    return made


def medians(case: BenchCase, dtype: torch.dtype, seconds: float) -> dict[str, float]:
    """Return the milliseconds of a step of each contender."""
    shapes = case.shapes(_ROOM)
    grads = [(0.01 * torch.randn(shape)).to(dtype) for shape in shapes]
    fresh = case.fresh_gradients(len(shapes))
    entrants = contenders(case, shapes, dtype)
    times: dict[str, list[float]] = {name: [] for name in entrants}
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(times["foreach"]) < 4:
        for name, (params, optimizer) in entrants.items():
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.clone() if fresh else grad
            start = time.perf_counter()
            optimizer.step()
            times[name].append(time.perf_counter() - start)
    # The first step makes the state and checks everything.
    return {name: 1e3 * statistics.median(of_one[1:]) for name, of_one in times.items()}


def main() -> int:
    """Measure, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=CASES, help="default: all")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each case")
    parser.add_argument("--at-least", type=float, default=0.0, help="ratio that every case has")
    arguments = parser.parse_args()
    below = []
    for name in arguments.case or CASES:
        for dtype in CASES[name].dtypes:
            found = medians(CASES[name], dtype, arguments.seconds)
            ratio = found["for-loop"] / found["foreach"]
            shown = ", ".join(f"{who} {ms:.2f} ms" for who, ms in found.items())
            title = f"{name} {str(dtype).removeprefix('torch.')}"
            print(f"{title:26s} {shown}; for-loop/foreach {ratio:.2f}", flush=True)
            if ratio < arguments.at_least:
                below.append(title)
    if below:
        print(f"below {arguments.at_least}: {', '.join(below)}")
    return 1 if below else 0


if __name__ == "__main__":
    raise SystemExit(main())
