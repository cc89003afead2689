"""Section 3.2: Reddi's example, where Adam converges to the worst point of the set.

The loss at step ``t`` is ``C * x`` once in three steps and ``-x`` else, on ``[-1, 1]``: its
average is ``(C - 2) / 3 * x``, least at -1. All seeds are elements of one parameter, which every
method steps with its own kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.table import Table

from adamal_kernels import Box

from .experiment import Advance, Claim, Experiment, Verdict, band, plus_minus, spread
from .methods import ADAMS, METHODS, denominator_sq
from .plots import draw_band, new_figure

__all__ = ["Nonconvergence"]

BEST, WORST = -1.0, 1.0
NAMES = ("Adam", "AMSGrad", "AdamAL", "VSGD")
# Steps between two applications of the large gradient; its probability where it is random.
PERIOD = 3


class Problem(NamedTuple):
    """A variant of the example."""

    title: str
    random: bool
    betas: tuple[float, float] | None
    """None: those of Reddi's theorem, 0 and ``1 / (1 + C**2)``."""


PROBLEMS = {
    "cyclic": Problem("large gradient in every third step", False, None),
    "random": Problem("large gradient at random, 1 in 3", True, None),
    "default betas": Problem("every third step, betas (0.9, 0.999)", False, (0.9, 0.999)),
}


@dataclass(frozen=True)
class Nonconvergence(Experiment):
    """Iterate, average regret and regularization budget of Adam, AMSGrad, AdamAL and SGD."""

    name = "nonconvergence"
    title = "Non-convergence: Reddi's example (section 3.2)"

    steps: int = 20_000
    points: int = 120
    """How many steps of the run are recorded, evenly spaced in log t."""
    large: float = 4.0
    """C, the large gradient; above 2."""
    lr: float = 0.1
    """alpha; the step size is ``alpha / sqrt(t)``."""

    def units(self) -> int:
        return len(PROBLEMS) * len(NAMES) * self.steps

    def run(self, advance: Advance) -> dict[str, Any]:
        return {
            problem: {name: self._follow(PROBLEMS[problem], name, advance) for name in NAMES}
            for problem in PROBLEMS
        }

    def gradients(self, random: bool) -> NDArray[np.float64]:
        """Return every step's gradient for every seed, the same for all methods."""
        shape = (self.steps, self.seeds)
        if random:
            columns = [np.random.default_rng(seed).random(self.steps) for seed in range(self.seeds)]
            is_large = np.stack(columns, axis=1) < 1 / PERIOD
        else:
            is_large = np.broadcast_to((np.arange(self.steps) % PERIOD == 0)[:, None], shape)
        return np.where(is_large, self.large, -1.0)

    def _follow(self, problem: Problem, name: str, advance: Advance) -> dict[str, Any]:
        grads = torch.from_numpy(self.gradients(problem.random))
        starts = [np.random.default_rng(seed).uniform(BEST, WORST) for seed in range(self.seeds)]
        x = torch.tensor(starts, dtype=torch.float64, requires_grad=True)
        options: dict[str, Any] = {}
        if name in ADAMS:
            betas = problem.betas or (0.0, 1 / (1 + self.large**2))
            # As the paper writes the methods.
            options = {"betas": betas, "eps": 0.0, "bias_correction": False}
            options["projection"] = Box(BEST, WORST)
        optimizer = METHODS[name].make([x], lr=self.lr, **options)

        recorded = set(np.geomspace(1, self.steps, self.points).round().astype(int).tolist())
        loss = torch.zeros(self.seeds, dtype=torch.float64)
        best_loss = torch.zeros_like(loss)
        budget = torch.zeros_like(loss)
        least_gamma = torch.full_like(loss, math.inf)
        iterates, regrets = [], []
        for t, grad in enumerate(grads, start=1):
            loss += grad * x.detach()
            best_loss += grad * BEST
            lr = self.lr / math.sqrt(t)
            optimizer.param_groups[0]["lr"] = lr
            x.grad = grad
            optimizer.step()
            if name in ADAMS:
                last, budget = budget, denominator_sq(optimizer, x).sqrt() / lr
                least_gamma = torch.minimum(least_gamma, budget - last)
            else:
                with torch.no_grad():
                    x.clamp_(BEST, WORST)
            if t in recorded:
                iterates.append(x.tolist())
                regrets.append(((loss - best_loss) / t).tolist())
            if t % 1000 == 0:
                advance(1000)
        advance(self.steps % 1000)
        return {
            "step": sorted(recorded),
            "iterate": band(np.transpose(iterates)),
            "average_regret": band(np.transpose(regrets)),
            "final_iterate": spread(iterates[-1]),
            "final_average_regret": spread(regrets[-1]),
            "least_gamma": spread(least_gamma.tolist()) if name in ADAMS else None,
        }

    @staticmethod
    def tables(record: dict[str, Any]) -> Sequence[Table]:
        tables = []
        steps = record["settings"]["steps"]
        for problem, results in record["results"].items():
            title = f"Reddi's example after {steps} steps: {PROBLEMS[problem].title}"
            table = Table(title=title, title_justify="left")
            for header in ("method", "iterate (best: -1)", "average regret", "least Γ (eq. 15)"):
                table.add_column(header, justify="left" if header == "method" else "right")
            for name, found in results.items():
                gamma = found["least_gamma"]
                table.add_row(
                    name,
                    plus_minus(found["final_iterate"], ".3f"),
                    plus_minus(found["final_average_regret"], ".3f"),
                    plus_minus(gamma, ".3g") if gamma else "-",
                )
            tables.append(table)
        return tables

    @staticmethod
    def draw(record: dict[str, Any]) -> dict[str, Figure]:
        figure, panels = new_figure(record, 2, len(PROBLEMS), width=13, height=6.5, sharex=True)
        rows = ("iterate", "average_regret")
        for column, (problem, results) in enumerate(record["results"].items()):
            for axes, quantity in zip(panels[:, column], rows, strict=True):
                for name, found in results.items():
                    draw_band(axes, found["step"], found[quantity], name)
                axes.set_xscale("log")
                axes.set_ylabel(quantity.replace("_", " "))
            panels[0, column].set_title(PROBLEMS[problem].title)
            panels[1, column].set_xlabel("step")
        panels[0, 0].legend(frameon=False)
        return {"nonconvergence": figure}

    @staticmethod
    def claims(record: dict[str, Any]) -> Sequence[Claim]:
        results = record["results"]
        cyclic, random, default = (results[problem] for problem in PROBLEMS)
        ends = {name: found["final_iterate"] for name, found in cyclic.items()}

        def all_near(found: dict[str, Any], point: float) -> bool:
            return all(abs(value - point) < 0.1 for value in found["values"])

        def ending(problem: dict[str, Any], names: Sequence[str]) -> str:
            found = (f"{name} {problem[name]['final_iterate']['mean']:+.3f}" for name in names)
            return ", ".join(found)

        gammas = {name: cyclic[name]["least_gamma"]["mean"] for name in ADAMS}
        return [
            Claim(
                "3.2",
                "Adam does not converge on Reddi's example",
                Verdict.of(all_near(ends["Adam"], WORST)),
                f"ends at {ending(cyclic, ['Adam'])}, the worst point; the best is -1. With the "
                f"default betas: {ending(default, ['Adam'])}",
            ),
            Claim(
                "3.2",
                "the reason is a budget that decreases: Γ < 0 in Adam, not in AMSGrad and AdamAL",
                Verdict.of(gammas["Adam"] < 0 and min(gammas["AMSGrad"], gammas["AdamAL"]) >= 0),
                "least Γ: " + ", ".join(f"{name} {gamma:.3g}" for name, gamma in gammas.items()),
            ),
            Claim(
                "3.2",
                "the example is unnatural, for it takes a periodic gradient",
                Verdict.of(not all_near(random["Adam"]["final_iterate"], WORST)),
                "with the large gradient at random Adam fails as well: " + ending(random, NAMES),
            ),
            Claim(
                "3.3",
                "AdamAL mends Adam's non-convergence",
                Verdict.of(
                    all(
                        all_near(found["AdamAL"]["final_iterate"], BEST)
                        for found in (cyclic, random)
                    )
                ),
                f"ends at {ending(cyclic, NAMES)}",
            ),
        ]
