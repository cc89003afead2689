"""The compiled backends: C++ for CPUs and hand-written CUDA, one pass over all tensors."""

from __future__ import annotations

import functools
from array import array
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..bucket import Bucket, BucketKey, DeviceScalars
from ..build_info import why_not_importable
from ..dtypes import DTYPE_PAIRS
from ..hyperparameters import StepOptions

__all__ = ["CpuBackend", "CudaBackend", "NativeBackend", "bound_options"]


# Asked for every parameter that is checked, and the same for as long as the process lives.
_why_not_importable = functools.cache(why_not_importable)


class NativeBackend:
    """A backend whose plan (``csrc/plan.h``) binds the tensors' addresses and launches."""

    name: str
    device_types: tuple[str, ...]

    def unavailable(self, device: torch.device) -> str | None:
        """See :class:`adamal_kernels.backends.Backend`."""
        if device.type not in self.device_types:
            return f"it serves {self.device_types[0]} tensors, these are on {device}"
        return _why_not_importable("_C")

    def unsupported(self, key: BucketKey) -> str | None:
        """See :class:`adamal_kernels.backends.Backend`."""
        return None if key.dtypes in DTYPE_PAIRS else f"{key.dtypes} is not in DTYPE_PAIRS"

    def squared_norm(self, bucket: Bucket) -> Tensor:
        """See :class:`adamal_kernels.backends.Backend`."""
        return self.new_plan(bucket.key).squared_norm(bucket.grads)

    def step(self, bucket: Bucket) -> None:
        """See :class:`adamal_kernels.backends.Backend`."""
        plan = bucket.workspace.get("plan")
        if plan is None:
            plan = bucket.workspace["plan"] = self.new_plan(bucket.key)
        plan.bind(bucket.params, bucket.exp_avgs, bucket.exp_avg_sqs, bucket.max_exp_avg_sqs)
        if bucket.device_scalars is not None:
            _step_on_device(plan, bucket, bucket.device_scalars)
            return
        scalars = array("d")
        for row in bucket.scalars:
            scalars.extend(row)
        plan.step(bucket.grads, scalars, bucket.rows)

    def new_plan(self, key: BucketKey) -> Any:
        """Return an empty plan for buckets of kind ``key``."""
        raise NotImplementedError


class CpuBackend(NativeBackend):
    """C++ over torch's CPU threads, vectorised for AVX-512, AVX2 and the baseline."""

    name = "cpu"
    device_types = ("cpu",)

    def new_plan(self, key: BucketKey) -> Any:
        """See :meth:`NativeBackend.new_plan`."""
        extension = import_module("adamal_kernels._C")
        return extension.cpu_plan(DTYPE_PAIRS.index(key.dtypes), int(key.second_moment))


class CudaBackend(NativeBackend):
    """The hand-written multi-tensor CUDA kernel: one launch for up to some thousand tensors."""

    name = "cuda"
    device_types = ("cuda",)

    def unavailable(self, device: torch.device) -> str | None:
        """See :class:`adamal_kernels.backends.Backend`."""
        if reason := super().unavailable(device) or _why_not_importable("_cuda"):
            return reason
        if torch.version.hip is not None:
            return "it is written for NVIDIA GPUs; on AMD GPUs use backend='triton'"
        if not torch.cuda.is_available():
            return (
                "torch finds no usable CUDA device (torch.cuda.is_available() is False); "
                "run where an NVIDIA GPU and a CUDA build of torch are present"
            )
        return None

    def new_plan(self, key: BucketKey) -> Any:
        """See :meth:`NativeBackend.new_plan`."""
        extension = import_module("adamal_kernels._C")
        kernels = import_module("adamal_kernels._cuda")
        return extension.cuda_plan(
            DTYPE_PAIRS.index(key.dtypes), int(key.second_moment), key.device.index, kernels.api
        )


def bound_options(
    options: StepOptions, *, group: int = 0, device: torch.device | None = None
) -> Any:
    """Return options as C++ holds them; tensors among them are left to be read there."""
    extension = import_module("adamal_kernels._C")
    numbers = {
        name: 0.0 if isinstance(value, Tensor) else value
        for name, value in options._asdict().items()
    }
    return extension.BoundOptions(group=group, device=device, **numbers)


def _step_on_device(plan: Any, bucket: Bucket, source: DeviceScalars) -> None:
    # One pack, which the kernel can index; the counts are views of one from the next step on.
    counts = torch.stack(source.steps)
    inputs = source.inputs
    plan.step_on_device(
        bucket.grads,
        [bound_options(options) for options in source.options],
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


def _one(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(dtype)
