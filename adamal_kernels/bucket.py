"""A bucket: the tensors one kernel launch can take together, as a backend sees them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dtypes import DtypePair
from .hyperparameters import StepScalars

__all__ = ["Bucket", "BucketKey", "SecondMoment"]


class SecondMoment(IntEnum):
    """How the second moment moves; the value is the code in ``csrc/adamal_math.h``."""

    MONOTONE = 0
    """AdamAL: ``v + (1 - beta2) * (g2 - v)`` where ``g2 > v``, else ``v``."""
    PLAIN = 1
    """Adam: ``beta2 * v + (1 - beta2) * g2``."""
    AMSGRAD = 2
    """Adam with ``amsgrad=True``: plain, and a third buffer that keeps the largest ``v``."""


class BucketKey(NamedTuple):
    """What selects a kernel. Everything else is data: a row of the scalar table."""

    device: torch.device
    dtypes: DtypePair
    second_moment: SecondMoment


@dataclass(slots=True)
class Bucket:
    """One bucket in one step.

    Element ``i`` of a parameter in memory order belongs to element ``i`` of its gradient and
    moments: every tensor is dense and shares its parameter's strides. Gradients are
    ``key.dtypes.grad``, parameters ``key.dtypes.param``, moments the compute type.
    """

    key: BucketKey
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    max_exp_avg_sqs: list[Tensor] = field(default_factory=list)
    """Empty unless ``key.second_moment`` is AMSGRAD."""
    scalars: list[StepScalars] = field(default_factory=list)
    """The distinct rows of this step."""
    rows: list[int] = field(default_factory=list)
    """Tensor ``i`` uses ``scalars[rows[i]]``."""
    workspace: dict[str, Any] = field(default_factory=dict)
    """Kept from step to step for the backend: pointer tables, compiled launchers."""
