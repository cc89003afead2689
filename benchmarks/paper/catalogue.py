"""The experiments by name, in the order in which they run."""

from __future__ import annotations

from .diffusion import Diffusion
from .experiment import Experiment
from .images import ImageClassification
from .mirror import Mirror
from .nonconvergence import Nonconvergence
from .swaps import Swaps

__all__ = ["EXPERIMENTS"]

_ORDER: tuple[type[Experiment], ...] = (
    Nonconvergence,
    Mirror,
    Swaps,
    Diffusion,
    ImageClassification,
)
EXPERIMENTS = {experiment.name: experiment for experiment in _ORDER}
