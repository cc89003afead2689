"""Section 3.1: does the distance from the start grow with log t?

The paper takes ``|x_t - x_0|**2 ~ log t`` from Hoffer et al. (2017), who found it of the distance
itself, and concludes that a step's length falls as ``1 / t``. Both are measured on a network in
training at a constant learning rate, against a power of t with as many parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.table import Table
from scipy.optimize import curve_fit
from torch.nn.utils import parameters_to_vector

from .datasets import digits
from .experiment import Advance, Claim, Experiment, Verdict, band, plus_minus, spread
from .methods import ADAMS, METHODS
from .networks import name_of
from .plots import draw_band, new_figure
from .training import Setup, Training
from .workers import run_jobs

__all__ = ["Diffusion", "fit"]

Array = NDArray[np.float64]

NAMES = ("VSGD", *ADAMS)
NETWORK, STAGES = "VGG", 3
# How far from -1 the step length's exponent may be and still be called 1 / t.
SLACK = 0.25


class _Job(NamedTuple):
    setup: Setup
    steps: int
    points: int


@dataclass(frozen=True)
class Diffusion(Experiment):
    """Distance from the initial weights and length of a step, over time."""

    name = "diffusion"
    title = "Diffusion: distance from the start against log t (section 3.1)"

    steps: int = 1500
    points: int = 60
    """How many steps are recorded, evenly spaced in log t."""
    width: int = 8
    batch_size: int = 32

    def units(self) -> int:
        return len(NAMES) * self.seeds

    def run(self, advance: Advance) -> dict[str, Any]:
        jobs = [
            _Job(
                Setup(
                    NETWORK, self.width, STAGES, name, METHODS[name].lr, self.batch_size, 0, seed
                ),
                self.steps,
                self.points,
            )
            for seed in range(self.seeds)
            for name in NAMES
        ]
        found: dict[_Job, tuple[list[float], list[float]]] = {}
        for job, followed in run_jobs(_follow, jobs, self.workers):
            found[job] = followed
            advance(1)
        steps = _recorded(self.steps, self.points)
        methods = {}
        for name in NAMES:
            runs = [found[job] for job in jobs if job.setup.method == name]
            squares = [np.square(distances) for distances, _ in runs]
            fits = [fit(np.array(steps, dtype=np.float64), square) for square in squares]
            methods[name] = {
                "squared_distance": band(squares),
                "step_length": band([lengths for _, lengths in runs]),
                **{key: spread([found[key] for found in fits]) for key in fits[0]},
                "length_exponent": spread([_slope(steps, lengths) for _, lengths in runs]),
            }
        return {
            "network": name_of(NETWORK, STAGES, self.width),
            "step": steps,
            "methods": methods,
        }

    @staticmethod
    def tables(record: dict[str, Any]) -> Sequence[Table]:
        title = f"|x_t - x_0|^2 over {record['settings']['steps']} steps"
        table = Table(title=title, title_justify="left")
        columns = {
            "R² of a + b log t": ("r2_log", ".3f"),
            "R² of c t^k": ("r2_power", ".3f"),
            "k": ("exponent", ".2f"),
            "exponent of the step's length": ("length_exponent", ".2f"),
        }
        table.add_column("method")
        for header in columns:
            table.add_column(header, justify="right")
        for name, found in record["results"]["methods"].items():
            table.add_row(name, *(plus_minus(found[key], form) for key, form in columns.values()))
        return [table]

    @staticmethod
    def draw(record: dict[str, Any]) -> dict[str, Figure]:
        figure, panels = new_figure(record, 1, 3, width=14, height=4.6)
        steps = record["results"]["step"]
        by_log, by_power, lengths = panels[0]
        for name, found in record["results"]["methods"].items():
            for axes in (by_log, by_power):
                draw_band(axes, steps, found["squared_distance"], name)
            draw_band(lengths, steps, found["step_length"], name)
        for axes, title in (
            (by_log, "straight if it grows with log t"),
            (by_power, "straight if it is a power of t"),
            (lengths, "slope -1 if it falls as 1 / t"),
        ):
            axes.set(xscale="log", xlabel="step", title=title)
        for axes in (by_power, lengths):
            axes.set_yscale("log")
        by_log.set_ylabel("squared distance from the start")
        by_power.set_ylabel("squared distance from the start")
        lengths.set_ylabel("length of the step")
        by_log.legend(frameon=False)
        return {"diffusion": figure}

    @staticmethod
    def claims(record: dict[str, Any]) -> Sequence[Claim]:
        methods = record["results"]["methods"]
        where = f"{record['results']['network']} on digits"

        def words(*keys: str) -> str:
            return ", ".join(
                f"{name} " + " and ".join(f"{methods[name][key]['mean']:.2f}" for key in keys)
                for name in NAMES
            )

        return [
            Claim(
                "3.1",
                "the squared distance from the start grows with log t",
                Verdict.of(
                    all(
                        methods[name]["r2_log"]["mean"] > methods[name]["r2_power"]["mean"]
                        for name in NAMES
                    )
                ),
                f"{where}, R² of a + b log t and of c t^k: {words('r2_log', 'r2_power')}; k is "
                f"{words('exponent')}",
            ),
            Claim(
                "3.1",
                "so the length of a step falls as 1 / t",
                Verdict.of(
                    all(abs(methods[name]["length_exponent"]["mean"] + 1) < SLACK for name in ADAMS)
                ),
                f"{where}, constant learning rate: it falls as t to the power of "
                f"{words('length_exponent')}",
            ),
        ]


def fit(steps: Array, values: Array) -> dict[str, float]:
    """Return how well ``a + b log t`` and ``c t**k`` fit, both by least squares: R², and k.

    Example:
        >>> t = np.arange(1.0, 50.0)
        >>> found = fit(t, 2 + 3 * np.log(t))
        >>> round(found["r2_log"], 3), found["r2_power"] < 0.99
        (1.0, True)
    """

    def r2(predicted: Array) -> float:
        return float(
            1 - np.square(values - predicted).sum() / np.square(values - values.mean()).sum()
        )

    logs = np.polynomial.Polynomial.fit(np.log(steps), values, 1)
    # In logarithms first: a start from which the least squares are found.
    slope = _slope(steps, values)
    start = (np.exp(np.mean(np.log(values) - slope * np.log(steps))), slope)
    (factor, exponent), _ = curve_fit(lambda t, c, k: c * t**k, steps, values, p0=start)
    return {
        "r2_log": r2(logs(np.log(steps))),
        "r2_power": r2(factor * steps**exponent),
        "exponent": float(exponent),
    }


def _slope(steps: Sequence[float] | Array, values: Sequence[float] | Array) -> float:
    """Return the exponent of the power of t that fits best in logarithms."""
    return float(np.polynomial.Polynomial.fit(np.log(steps), np.log(values), 1).convert().coef[1])


def _recorded(steps: int, points: int) -> list[int]:
    return sorted(set(np.geomspace(1, steps, points).round().astype(int).tolist()))


def _follow(job: _Job) -> tuple[list[float], list[float]]:
    """Return distances from the start and lengths of the step, at the recorded steps."""
    training = Training(job.setup, digits())
    with torch.no_grad():
        start = last = parameters_to_vector(training.params).clone()
    recorded = set(_recorded(job.steps, job.points))
    distances, lengths = [], []
    steps = training.steps()
    for step in range(1, job.steps + 1):
        next(steps)
        if step + 1 in recorded or step in recorded:
            with torch.no_grad():
                now = parameters_to_vector(training.params).clone()
            if step in recorded:
                distances.append((now - start).norm().item())
                lengths.append((now - last).norm().item())
            last = now
    return distances, lengths
