"""A bucket: the tensors one kernel launch can take together, as a backend sees them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .buffers import BUFFERS, SecondMoment, buffers_of
from .rows import CoupledRows
from .scalars import StepInputs, StepOptions, StepScalars
from .storage import Format

__all__ = ["Bucket", "BucketKey", "DeviceScalars"]


class BucketKey(NamedTuple):
    """What selects a kernel. Everything else is data: a row of the scalar table."""

    device: torch.device
    format: Format
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
    ``key.format.grad``, parameters ``key.format.param``, moments
    ``key.format.exp_avg`` and ``key.format.exp_avg_sq``.
    """

    key: BucketKey
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    buffers: dict[str, list[Tensor]] = field(
        default_factory=lambda: {buffer.key: [] for buffer in BUFFERS}
    )
    """The state tensors of each kind, none of those that there are not, by key, in the order of
    :data:`.buffers.BUFFERS`. A ``multiplier`` is float64, an element a row, in their order."""
    sets: list[CoupledRows] = field(default_factory=list)
    """The tensors' sets; empty unless ``key.coupled``."""
    scalars: list[StepScalars] = field(default_factory=list)
    """The distinct rows of this step; empty where ``key.device_scalars``."""
    rows: list[int] = field(default_factory=list)
    """Tensor ``i`` uses ``scalars[rows[i]]``."""
    device_scalars: DeviceScalars | None = None
    """Instead of ``scalars`` where ``key.device_scalars``."""
    records: list[Tensor] = field(default_factory=list)
    """Of each tensor's work items (:mod:`.stats`); empty where steps are not watched."""
    workspace: dict[str, Any] = field(default_factory=dict)
    """Kept from step to step for the backend: pointer tables, compiled launchers."""

    @property
    def elementwise_buffers(self) -> list[list[Tensor]]:
        """The state tensors laid out as the parameters, a list for each kind that there is."""
        kinds = buffers_of(self.key.second_moment, self.key.coupled)
        return [self.buffers[kind.key] for kind in kinds if kind.shape == "parameter"]

    @property
    def divisors(self) -> list[Tensor]:
        """The second moments whose roots divide: with AMSGrad their maxima."""
        return self.buffers["max_exp_avg_sq"] or self.buffers["exp_avg_sq"]
