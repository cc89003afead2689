"""What every experiment has: settings, a run over seeds, a table, a plot, and claims to judge."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table
from scipy import stats

__all__ = [
    "Advance",
    "Claim",
    "Experiment",
    "Verdict",
    "band",
    "difference",
    "plus_minus",
    "spread",
]

Advance = Callable[[int], None]
"""Called with the units of work that have been done."""

Json = dict[str, Any]


class Verdict(enum.Enum):
    """What became of a claim."""

    REPRODUCED = "reproduced"
    NOT_REPRODUCED = "not reproduced"
    NOT_TESTABLE = "not testable here"

    @classmethod
    def of(cls, holds: bool) -> Verdict:
        return cls.REPRODUCED if holds else cls.NOT_REPRODUCED


class Claim(NamedTuple):
    """A claim of the paper beside what was measured."""

    section: str
    """Where the paper makes it."""
    text: str
    verdict: Verdict
    figure: str
    """What the verdict rests on, in words and numbers."""


@dataclass(frozen=True)
class Experiment(ABC):
    """One experiment; a subclass's fields are its sizes, by default those of ``make paper``."""

    name: ClassVar[str]
    title: ClassVar[str]

    seeds: int = 5
    """How often everything random is drawn anew."""
    workers: int = 2
    """Processes at once where networks are trained; 0: this one. It changes no figure."""

    @abstractmethod
    def units(self) -> int:
        """Return how much there is to do, in the units of ``advance``."""

    @abstractmethod
    def run(self, advance: Advance) -> Json:
        """Measure, and return the results: dicts, lists, strings and numbers."""

    @staticmethod
    @abstractmethod
    def tables(record: Json) -> Sequence[Table]:
        """Return a record's principal figures as tables."""

    @staticmethod
    @abstractmethod
    def draw(record: Json) -> dict[str, Figure]:
        """Return a record's plots by the name of their file, without suffix."""

    @staticmethod
    @abstractmethod
    def claims(record: Json) -> Sequence[Claim]:
        """Judge the paper's claims by a record."""


def spread(values: Sequence[float]) -> Json:
    """Return mean, sample standard deviation and all values, one of each seed.

    Example:
        >>> spread([1.0, 2.0, 3.0])
        {'mean': 2.0, 'std': 1.0, 'values': [1.0, 2.0, 3.0]}
    """
    found = np.asarray(values, dtype=np.float64)
    std = float(found.std(ddof=1)) if found.size > 1 else 0.0
    return {"mean": float(found.mean()), "std": std, "values": found.tolist()}


def band(curves: Sequence[Sequence[float]]) -> Json:
    """Return mean and sample standard deviation along curves, one of each seed.

    Example:
        >>> band([[1.0, 4.0], [3.0, 4.0]])["mean"]
        [2.0, 4.0]
    """
    found = np.asarray(curves, dtype=np.float64)
    std = found.std(axis=0, ddof=1) if len(found) > 1 else np.zeros(found.shape[1:])
    return {"mean": found.mean(axis=0).tolist(), "std": std.tolist()}


def plus_minus(found: Json, form: str = ".2f", scale: float = 1.0) -> str:
    """Return a spread in words.

    Example:
        >>> plus_minus(spread([0.5, 0.7]), ".1f", 100)
        '60.0 ± 14.1'
    """
    return f"{found['mean'] * scale:{form}} ± {found['std'] * scale:{form}}"


class Difference(NamedTuple):
    """The mean of differences between pairs, and its 95% confidence interval."""

    mean: float
    low: float
    high: float

    def __format__(self, form: str) -> str:
        return f"{self.mean:+{form}} ({self.low:+{form}} to {self.high:+{form}})"


def difference(found: Json, other: Json) -> Difference:
    """Return ``found - other``, seed by seed, with Student's interval of its mean."""
    pairs = np.subtract(found["values"], other["values"])
    mean = float(pairs.mean())
    if not pairs.any() or pairs.size < 2:
        return Difference(mean, mean, mean)
    half = stats.sem(pairs) * stats.t.ppf(0.975, pairs.size - 1)
    return Difference(mean, float(mean - half), float(mean + half))
