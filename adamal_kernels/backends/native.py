"""The compiled backends: C++ for CPUs and hand-written CUDA, one pass over all tensors."""

from __future__ import annotations

from typing import Any

import torch

from ..bucket import BucketKey
from ..build_info import load_extension
from ..dtypes import DTYPE_PAIRS
from .planned import PlannedBackend, why_not_importable

__all__ = ["CpuBackend", "CudaBackend", "NativeBackend"]


class NativeBackend(PlannedBackend):
    """A backend whose kernels are in the extensions."""

    name: str
    device_types: tuple[str, ...]

    def unavailable(self, device: torch.device) -> str | None:
        """See :class:`adamal_kernels.backends.Backend`."""
        if device.type not in self.device_types:
            return f"it serves {self.device_types[0]} tensors, these are on {device}"
        return why_not_importable("_C")

    def unsupported(self, key: BucketKey) -> str | None:
        """See :class:`adamal_kernels.backends.Backend`."""
        return None if key.dtypes in DTYPE_PAIRS else f"{key.dtypes} is not in DTYPE_PAIRS"


class CpuBackend(NativeBackend):
    """C++ over torch's CPU threads, vectorised for AVX-512, AVX2 and the baseline."""

    name = "cpu"
    device_types = ("cpu",)

    def new_plan(self, key: BucketKey) -> Any:
        """See :meth:`PlannedBackend.new_plan`."""
        extension = load_extension("_C")
        return extension.cpu_plan(DTYPE_PAIRS.index(key.dtypes), int(key.second_moment))


class CudaBackend(NativeBackend):
    """The hand-written multi-tensor CUDA kernel: one launch for up to some thousand tensors."""

    name = "cuda"
    device_types = ("cuda",)

    def unavailable(self, device: torch.device) -> str | None:
        """See :class:`adamal_kernels.backends.Backend`."""
        if reason := super().unavailable(device) or why_not_importable("_cuda"):
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
        """See :meth:`PlannedBackend.new_plan`."""
        extension = load_extension("_C")
        kernels = load_extension("_cuda")
        return extension.cuda_plan(
            DTYPE_PAIRS.index(key.dtypes), int(key.second_moment), key.device.index, kernels.api
        )
