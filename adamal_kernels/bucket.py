"""A bucket: the tensors one kernel launch can take together, as a backend sees them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .coupled import CoupledRows
from .dtypes import DtypePair
from .hyperparameters import StepInputs, StepOptions, StepScalars

__all__ = ["Bucket", "BucketKey", "DeviceScalars", "SecondMoment"]


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
    device_scalars: bool = False
    """Whether the scalars are derived on the device, from counts that are there."""
    spread: Hashable = None
    """How the tensors, of which these are parts, are spread over processes; None: they are whole.
    It selects no kernel, and says over which processes a norm is added."""
    coupled: bool = False
    """Whether each tensor's set couples its elements: the step is followed by a projection."""


@dataclass(slots=True)
class DeviceScalars:
    """What the scalars of a step are derived from on the device, and what it then counts."""

    options: list[StepOptions] = field(default_factory=list)
    """Tensor ``i`` has ``options[rows[i]]``; tensors among them are on the bucket's device."""
    steps: list[Tensor] = field(default_factory=list)
    """Float32 scalars: how many steps each tensor has taken; one more after a step not skipped."""
    inputs: StepInputs = field(default_factory=StepInputs)
    """Tensors on the bucket's device."""


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
    multipliers: list[Tensor] = field(default_factory=list)
    """Float64, an element a row, in the order of the rows; empty unless ``key.coupled``."""
    sets: list[CoupledRows] = field(default_factory=list)
    """The tensors' sets; empty unless ``key.coupled``."""
    scalars: list[StepScalars] = field(default_factory=list)
    """The distinct rows of this step; empty where ``key.device_scalars``."""
    rows: list[int] = field(default_factory=list)
    """Tensor ``i`` uses ``scalars[rows[i]]``."""
    device_scalars: DeviceScalars | None = None
    """Instead of ``scalars`` where ``key.device_scalars``."""
    records: list[Tensor] = field(default_factory=list)
    """Of each tensor's work items (:mod:`.watch_records`); empty where steps are not watched."""
    workspace: dict[str, Any] = field(default_factory=dict)
    """Kept from step to step for the backend: pointer tables, compiled launchers."""
