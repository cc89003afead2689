"""What the backends share that step by address, through a plan."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import build_info
from ..build_info import load_extension
from ..core.bucket import Bucket, BucketKey, DeviceScalars
from ..core.norm import squared_norm
from ..core.rows import CoupledRows
from ..core.scalars import StepOptions

__all__ = ["PlannedBackend", "bound_options", "bound_rows", "why_not_importable"]

# Asked for every parameter that is checked, and the same for as long as the process lives.
why_not_importable = functools.cache(build_info.why_not_importable)


class PlannedBackend:
    """A backend whose plan (``csrc/plan/plan.h``) binds the tensors' addresses and launches."""

    has_native_plans = True
    """Whether :meth:`new_plan` makes plans of the C++ extension, which can repeat their steps."""

    def squared_norm(self, bucket: Bucket) -> Tensor:
        """See :class:`adamal_kernels.backends.Backend`."""
        if not self.has_native_plans:
            return squared_norm(bucket.grads, bucket.key.format.compute)
        return self.new_plan(bucket.key).squared_norm(bucket.grads)

    def watched_elements(self, key: BucketKey) -> int | None:
        """See :class:`adamal_kernels.backends.Backend`."""
        return int(self.new_plan(key).chunk)

    def step(self, bucket: Bucket) -> None:
        """See :class:`adamal_kernels.backends.Backend`."""
        plan = bucket.workspace.get("plan")
        if plan is None:
            plan = bucket.workspace["plan"] = self.new_plan(bucket.key)
        sets = map(bound_rows, bucket.sets) if self.has_native_plans else bucket.sets
        plan.bind(
            bucket.params,
            list(bucket.buffers.values()),
            list(sets),
            bucket.records,
        )
        if bucket.device_scalars is not None:
            bound = bound_options if self.has_native_plans else _same
            _step_on_device(plan, bucket, bucket.device_scalars, bound)
            return
        scalars = array("d")
        for row in bucket.scalars:
            scalars.extend(row)
        plan.step(bucket.grads, scalars, bucket.rows)

    def new_plan(self, key: BucketKey) -> Any:
        """Return an empty plan for buckets of kind ``key``."""
        raise NotImplementedError


def bound_options(
    options: StepOptions, *, group: int = 0, device: torch.device | None = None
) -> Any:
    """Return options as C++ holds them; tensors among them are left to be read there."""
    extension = load_extension("_C")
    numbers = {
        name: 0.0 if isinstance(value, Tensor) else value
        for name, value in options._asdict().items()
    }
    return extension.BoundOptions(group=group, device=device, **numbers)


def bound_rows(rows: CoupledRows) -> Any:
    """Return a tensor's set as C++ holds it."""
    return load_extension("_C").CoupledRows(**rows._asdict())


def _step_on_device(
    plan: Any, bucket: Bucket, source: DeviceScalars, bound: Callable[[StepOptions], Any]
) -> None:
    # One pack, which the kernel can index; the counts are views of one from the next step on.
    counts = torch.stack(source.steps)
    inputs = source.inputs
    plan.step_on_device(
        bucket.grads,
        [bound(options) for options in source.options],
        [
            tuple(value if isinstance(value, Tensor) else None for value in options[:3])
            for options in source.options
        ],
        bucket.rows,
        counts,
        grad_scale=_one(inputs.grad_scale, torch.float32),
        found_inf=_one(inputs.found_inf, torch.float32),
        grad_norm=_one(inputs.grad_norm, torch.float64),
        max_grad_norm=inputs.max_grad_norm,
        skipped_steps=inputs.skipped_steps,
    )
    torch._foreach_copy_(source.steps, list(counts.unbind()))


def _same(options: StepOptions) -> StepOptions:
    return options


def _one(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(dtype)
