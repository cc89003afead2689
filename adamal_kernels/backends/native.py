"""The compiled backends: C++ for CPUs and hand-written CUDA, one pass over all tensors."""

from __future__ import annotations

import functools
from array import array
from importlib import import_module
from typing import Any

import torch

from ..bucket import Bucket, BucketKey
from ..build_info import why_not_importable
from ..dtypes import DTYPE_PAIRS

__all__ = ["CpuBackend", "CudaBackend", "NativeBackend"]


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

    def step(self, bucket: Bucket) -> None:
        """See :class:`adamal_kernels.backends.Backend`."""
        plan = bucket.workspace.get("plan")
        if plan is None:
            plan = bucket.workspace["plan"] = self.new_plan(bucket.key)
        scalars = array("d")
        for row in bucket.scalars:
            scalars.extend(row)
        plan.step(
            bucket.params,
            bucket.grads,
            bucket.exp_avgs,
            bucket.exp_avg_sqs,
            bucket.max_exp_avg_sqs,
            scalars,
            bucket.rows,
        )

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
