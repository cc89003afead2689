"""The experiments by name, in the order in which they run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .diffusion import Diffusion
from .experiment import Experiment
from .images import ImageClassification
from .mirror import Mirror
from .nonconvergence import Nonconvergence
from .swaps import Swaps

__all__ = ["EXPERIMENTS", "in_order"]

_ORDER: tuple[type[Experiment], ...] = (
    Nonconvergence,
    Mirror,
    Swaps,
    Diffusion,
    ImageClassification,
)
EXPERIMENTS = {experiment.name: experiment for experiment in _ORDER}


def in_order(
    records: Mapping[str, dict[str, Any]],
) -> Iterator[tuple[type[Experiment], dict[str, Any]]]:
    """Yield records, each with its experiment, in the order of the experiments."""
    for name, experiment in EXPERIMENTS.items():
        yield from ((experiment, r) for r in records.values() if r["experiment"] == name)
