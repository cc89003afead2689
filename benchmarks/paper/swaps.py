"""Figure 1: how often the maximum keeps the old value instead of the new one, entry by entry.

A swap, as the paper has it, is a step after which the denominator is the old one: in AMSGrad where
``v_t < max(v_1 .. v_{t-1})``, in AdamAL where ``g_t**2 < v_{t-1}``. Counted for every parameter of
a network in training; Adam runs beside them to show how often its ``v`` falls (eq. 15).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from .datasets import digits
from .experiment import Advance, Claim, Experiment, Verdict, difference, plus_minus, spread
from .methods import ADAMS, METHODS, denominator_sq
from .networks import name_of
from .plots import new_figure
from .training import Setup, Training
from .workers import run_jobs

__all__ = ["SwapCounts", "Swaps"]

COUNTED = ("AMSGrad", "AdamAL")
NETWORK, STAGES = "ResNet", 3
# The heat map shows this many entries a side, from the middle of the network's largest layer.
SIDE = 10
# Entries are said to differ where their counts' variance is above this, over that of chance.
BY_CHANCE = 2.0


class _Job(NamedTuple):
    setup: Setup
    steps: int


class SwapCounts:
    """Counts of swaps and of the steps between them, for each entry of a vector."""

    def __init__(self, entries: int) -> None:
        self.count = torch.zeros(entries, dtype=torch.int64)
        self._last = torch.zeros_like(self.count)
        self._sum = torch.zeros_like(self.count)
        self._sum_of_squares = torch.zeros_like(self.count)

    def add(self, swapped: Tensor, step: int) -> None:
        """Take note of the entries that were swapped in ``step``, counted from 1."""
        interval = torch.where(swapped & (self.count > 0), step - self._last, 0)
        self._sum += interval
        self._sum_of_squares += interval.square()
        self.count += swapped
        self._last = torch.where(swapped, step, self._last)

    def mean_interval(self) -> Tensor:
        """Return the mean number of steps from one swap to the next; NaN below two swaps."""
        return self._sum.double() / self._intervals()

    def interval_variation(self) -> Tensor:
        """Return the intervals' standard deviation over their mean: 0 where all are equal."""
        mean = self.mean_interval()
        variance = self._sum_of_squares.double() / self._intervals() - mean.square()
        return variance.clamp(min=0).sqrt() / mean

    def _intervals(self) -> Tensor:
        return torch.where(self.count > 1, self.count - 1, torch.nan)


@dataclass(frozen=True)
class Swaps(Experiment):
    """Swap counts and mean intervals of AMSGrad beside AdamAL, on a network in training."""

    name = "swaps"
    title = "Figure 1: swap counts and intervals, AMSGrad beside AdamAL"

    steps: int = 1000
    width: int = 8
    batch_size: int = 32

    def units(self) -> int:
        return len(ADAMS) * self.seeds

    def run(self, advance: Advance) -> dict[str, Any]:
        jobs = [
            _Job(
                Setup(
                    NETWORK, self.width, STAGES, name, METHODS[name].lr, self.batch_size, 0, seed
                ),
                self.steps,
            )
            for seed in range(self.seeds)
            for name in ADAMS
        ]
        found: dict[_Job, dict[str, Any]] = {}
        for job, counted in run_jobs(_count, jobs, self.workers):
            found[job] = counted
            advance(1)
        methods = {}
        for name in ADAMS:
            runs = [found[job] for job in jobs if job.setup.method == name]
            methods[name] = {
                key: spread([run[key] for run in runs]) for key in runs[0] if key != "heat_map"
            }
            if name in COUNTED:
                methods[name]["heat_map"] = runs[0]["heat_map"]
        return {"network": name_of(NETWORK, STAGES, self.width), "methods": methods}

    @staticmethod
    def tables(record: dict[str, Any]) -> Sequence[Table]:
        title = f"Swaps in {record['settings']['steps']} steps, {record['results']['network']}"
        table = Table(title=title, title_justify="left")
        table.add_column("")
        for name in COUNTED:
            table.add_column(name, justify="right")
        rows = {
            "steps swapped": ("swapped", ".1%"),
            "swaps of an entry, 5th percentile": ("count_p5", ".0f"),
            "median": ("count_p50", ".0f"),
            "95th percentile": ("count_p95", ".0f"),
            "variance between entries / that of chance": ("dispersion", ".1f"),
            "mean interval, 5th percentile": ("interval_p5", ".2f"),
            "95th percentile ": ("interval_p95", ".2f"),
            "deviation of an entry's intervals / mean": ("interval_variation", ".2f"),
        }
        for label, (key, form) in rows.items():
            found = (record["results"]["methods"][name][key] for name in COUNTED)
            table.add_row(label, *(plus_minus(value, form) for value in found))
        return [table]

    @staticmethod
    def draw(record: dict[str, Any]) -> dict[str, Figure]:
        figure, panels = new_figure(record, 1, 2, width=14, height=6.6, shown="the first shown")
        maps = [record["results"]["methods"][name]["heat_map"] for name in COUNTED]
        intervals = [np.array(found["mean_interval"], dtype=np.float64) for found in maps]
        # The darker, the lower the mean interval, as in the paper; one scale for both.
        scale = Normalize(np.nanmin(intervals), np.nanpercentile(intervals, 98))
        for axes, name, found, interval in zip(panels[0], COUNTED, maps, intervals, strict=True):
            image = axes.imshow(interval, cmap="magma", norm=scale)
            for (row, column), count in np.ndenumerate(np.array(found["count"])):
                light = scale(interval[row, column]) > 0.6
                axes.text(
                    column, row, f"{count}", ha="center", va="center", fontsize=8,
                    color="black" if light else "white",
                )  # fmt: skip
            axes.set(xticks=[], yticks=[], title=f"{name}: swaps in {found['layer']}")
            axes.grid(visible=False)
        figure.colorbar(image, ax=panels[0].tolist(), label="mean interval between swaps (steps)")
        return {"swaps": figure}

    @staticmethod
    def claims(record: dict[str, Any]) -> Sequence[Claim]:
        methods = record["results"]["methods"]
        amsgrad, adamal = (methods[name] for name in COUNTED)
        where = f"{record['results']['network']} on digits, {record['settings']['steps']} steps"

        def counts(found: dict[str, Any]) -> str:
            low, high = (found[key]["mean"] for key in ("count_p5", "count_p95"))
            return f"{low:.0f} to {high:.0f}"

        more = difference(adamal["swapped"], amsgrad["swapped"])
        fell = methods["Adam"]["fell"]
        return [
            Claim(
                "3.2",
                "in training, Γ (eq. 15) does not stay non-negative in Adam",
                Verdict.of(min(fell["values"]) > 0),
                f"{where}, constant learning rate: v falls in {plus_minus(fell, '.1%')} of all "
                "steps of all entries",
            ),
            Claim(
                "3.3, figure 1",
                "AMSGrad swaps entries very differently often",
                Verdict.of(min(amsgrad["dispersion"]["values"]) > BY_CHANCE),
                f"{where}: {counts(amsgrad)} swaps (5th to 95th percentile of entries), "
                f"{amsgrad['dispersion']['mean']:.0f} times the variance that equal chances "
                f"give; AdamAL {counts(adamal)}, {adamal['dispersion']['mean']:.0f} times",
            ),
            Claim(
                "3.3, figure 1",
                "AMSGrad's swapping intervals are not uniform",
                Verdict.of(min(amsgrad["interval_variation"]["values"]) > 0.1),
                "standard deviation of an entry's intervals over their mean: AMSGrad "
                f"{plus_minus(amsgrad['interval_variation'])}, AdamAL "
                f"{plus_minus(adamal['interval_variation'])}; 0 would be uniform",
            ),
            Claim(
                "3.3",
                "unlike AMSGrad, AdamAL does not skip the gradient in its update of v",
                Verdict.of(max(adamal["swapped"]["values"]) == 0),
                f"the gradient leaves the denominator as it was in "
                f"{plus_minus(amsgrad['swapped'], '.1%')} of AMSGrad's steps and "
                f"{plus_minus(adamal['swapped'], '.1%')} of AdamAL's (difference {more:.3f})",
            ),
        ]


def _count(job: _Job) -> dict[str, Any]:
    training = Training(job.setup, digits())
    optimizer, params = training.optimizer, training.params
    name = job.setup.method
    counts = SwapCounts(sum(param.numel() for param in params))
    before = torch.zeros(len(counts.count))
    fell = 0
    steps = training.steps()
    for step in range(1, job.steps + 1):
        next(steps)
        after = _flat([denominator_sq(optimizer, param) for param in params])
        if name == "Adam":
            fell += int((after < before).sum())
        elif name == "AMSGrad":
            counts.add(_flat([optimizer.state[p]["exp_avg_sq"] for p in params]) < after, step)
        else:
            grads = [param.grad for param in params if param.grad is not None]
            counts.add(_flat(grads).square() < before, step)
        before = after
    if name == "Adam":
        return {"fell": fell / (job.steps * len(before))}
    count, interval = counts.count.double(), counts.mean_interval()
    quantiles = [0.05, 0.5, 0.95]
    found = dict(zip(("p5", "p50", "p95"), np.quantile(count, quantiles).tolist(), strict=True))
    share = float(count.mean()) / job.steps
    lengths = np.nanquantile(interval, [0.05, 0.95]).tolist()
    return {
        "swapped": share,
        "dispersion": float(count.var()) / (job.steps * share * (1 - share)),
        **{f"count_{key}": value for key, value in found.items()},
        "interval_p5": lengths[0],
        "interval_p95": lengths[1],
        "interval_variation": float(np.nanmean(counts.interval_variation())),
        "heat_map": _heat_map(training, counts),
    }


def _heat_map(training: Training, counts: SwapCounts) -> dict[str, Any]:
    """Return adjacent entries' counts, from the middle of the largest layer."""
    first, best = 0, (0, 0, "")
    for layer, param in training.network.named_parameters():
        best = max(best, (param.numel(), first, layer))
        first += param.numel()
    size, start, layer = best
    middle = start + max(0, (size - SIDE * SIDE) // 2)
    which = slice(middle, middle + SIDE * SIDE)
    return {
        "layer": layer,
        "first_entry": middle - start,
        "count": counts.count[which].view(SIDE, SIDE).tolist(),
        "mean_interval": counts.mean_interval()[which].view(SIDE, SIDE).tolist(),
    }


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    # A copy, which the next step leaves alone.
    return torch.cat([tensor.detach().flatten() for tensor in tensors])
