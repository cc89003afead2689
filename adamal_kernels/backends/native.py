"""The compiled backends: C++ for CPUs and hand-written CUDA, one pass over all tensors."""

from __future__ import annotations

import functools
import re
from typing import Any

import torch

from ..build_info import extension_record, load_extension
from ..core.bucket import BucketKey
from ..core.storage import FORMATS
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
        return None if key.format in FORMATS else f"{key.format} is not in FORMATS"


class CpuBackend(NativeBackend):
    """C++ over torch's CPU threads, vectorised for AVX-512, AVX2 and the baseline."""

    name = "cpu"
    device_types = ("cpu",)

    def new_plan(self, key: BucketKey) -> Any:
        """See :meth:`PlannedBackend.new_plan`."""
        extension = load_extension("_C")
        return extension.cpu_plan(FORMATS.index(key.format), int(key.second_moment))


class CudaBackend(NativeBackend):
    """The hand-written multi-tensor CUDA kernel: one launch for up to some thousand tensors."""

    name = "cuda"
    device_types = ("cuda",)

    def unavailable(self, device: torch.device) -> str | None:
        """See :class:`adamal_kernels.backends.Backend`."""
        # First: whoever has an AMD GPU is not helped by a CUDA build.
        if device.type == "cuda" and torch.version.hip is not None:
            return "it is written for NVIDIA GPUs; on AMD GPUs use backend='triton'"
        if reason := super().unavailable(device) or why_not_importable("_cuda"):
            return reason
        if not torch.cuda.is_available():
            return (
                "torch finds no usable CUDA device (torch.cuda.is_available() is False); "
                "run where an NVIDIA GPU and a CUDA build of torch are present"
            )
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        return _why_not_launchable(device)

    def new_plan(self, key: BucketKey) -> Any:
        """See :meth:`PlannedBackend.new_plan`."""
        extension = load_extension("_C")
        kernels = load_extension("_cuda")
        return extension.cuda_plan(
            FORMATS.index(key.format), int(key.second_moment), key.device.index, kernels.api
        )


@functools.cache
def _why_not_launchable(device: torch.device) -> str | None:
    """Why the CUDA kernels cannot be launched on a GPU, with the remedy; None if they can."""
    kernels = load_extension("_cuda")
    # torch's guard: it makes no context on the device that is current now.
    with torch.cuda.device(device):
        error = kernels.launch_error()
    if error is None:
        return None
    record, driver = extension_record("_cuda"), kernels.driver_version()
    capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
    archs = sorted(record.archs, key=lambda arch: int(arch.rstrip("af")))
    built_for = ", ".join(re.sub(r"(\d\D*)$", r".\1", arch) for arch in archs)
    runs = f"CUDA {driver // 1000}.{driver % 1000 // 10}"
    remedy = f"run: ADAMAL_CUDA_ARCHS={capability} {record.command}"
    if record.cuda is not None and _number_of(record.cuda) > driver:
        remedy = f"update the driver; or, by {runs} or older, {remedy}"
    return (
        f"its kernels cannot be launched on {device} ({error}): they were built by CUDA "
        f"{record.cuda} for compute capability {built_for}, and {device} has {capability} and a "
        f"driver that runs {runs}; {remedy}"
    )


def _number_of(cuda: str) -> int:
    """Return a version such as "12.8" as CUDA numbers it: 12080."""
    major, minor = cuda.split(".")[:2]
    return 1000 * int(major) + 10 * int(minor)
