"""The experiments by name, in the order in which they run."""

from __future__ import annotations

from .experiment import Experiment
from .mirror import Mirror
from .nonconvergence import Nonconvergence

__all__ = ["EXPERIMENTS"]

EXPERIMENTS: dict[str, type[Experiment]] = {cls.name: cls for cls in (Nonconvergence, Mirror)}
