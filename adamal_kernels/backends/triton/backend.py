"""The Triton backend: one launch steps all tensors of a bucket, through a table of pointers."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from ...build_info import load_extension
from ...core.bucket import BucketKey
from ...core.storage import FORMATS
from ..planned import PlannedBackend, why_not_importable
from .plan import PythonPlan

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["TritonBackend"]

_OLDEST = (3, 6)


class TritonBackend(PlannedBackend):
    """Triton kernels for NVIDIA and AMD GPUs; CPU tensors through Triton's interpreter."""

    name = "triton"
    device_types = ("cuda",)

    def unavailable(self, device: torch.device) -> str | None:
        """See :class:`adamal_kernels.backends.Backend`."""
        return _why_unavailable(device)

    def unsupported(self, key: BucketKey) -> str | None:
        """See :class:`adamal_kernels.backends.Backend`."""
        if key.format not in FORMATS:
            return f"{key.format} is not in FORMATS"
        interpreted_bfloat16 = key.device.type == "cpu" and torch.bfloat16 in key.format
        if interpreted_bfloat16 and not _kernels().casts_bfloat16_correctly():
            return (
                "the interpreter of this Triton truncates bfloat16 where hardware rounds; "
                "use backend='cpu', or a GPU"
            )
        return None

    @property
    def has_native_plans(self) -> bool:
        """See :class:`PlannedBackend`."""
        return why_not_importable("_C") is None

    def watched_elements(self, key: BucketKey) -> int | None:
        """See :class:`adamal_kernels.backends.Backend`."""
        return int(_kernels().BLOCK)

    def new_plan(self, key: BucketKey) -> Any:
        """See :meth:`PlannedBackend.new_plan`."""
        from .launcher import Launcher  # imports Triton

        launcher, block = Launcher(key), _kernels().BLOCK
        if not self.has_native_plans:
            return PythonPlan(key, block, launcher)
        extension = load_extension("_C")
        return extension.triton_plan(
            FORMATS.index(key.format), int(key.second_moment), key.device, block, launcher
        )


def _kernels() -> ModuleType:
    from . import element  # on first use: importing Triton takes a second

    return element


@functools.cache
def _why_unavailable(device: torch.device) -> str | None:
    if device.type not in ("cpu", "cuda"):
        return f"it serves CUDA and ROCm tensors, these are on {device}"
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error}); pip install 'triton>=3.6'"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < _OLDEST:
        return f"Triton {triton.__version__} is too old; pip install 'triton>=3.6'"

    interpreted = _kernels().interpreted()
    if interpreted is None:
        return "TRITON_INTERPRET changed after Triton was imported; set it before Python starts"
    if device.type == "cpu":
        if interpreted:
            return None
        return (
            "CPU tensors go only through Triton's interpreter, which is slow and meant for tests; "
            "set TRITON_INTERPRET=1 before Python starts"
        )
    if interpreted:
        return "Triton's interpreter cannot read GPU memory; unset TRITON_INTERPRET"
    return _why_no_gpu(device)


def _why_no_gpu(device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return (
            "torch finds no usable GPU (torch.cuda.is_available() is False); "
            "run where one is present, with a CUDA or ROCm build of torch"
        )
    try:
        target = _kernels().target(device)
    # Triton builds its driver here: whatever goes wrong, the compiler's exit included, is why.
    except Exception as error:
        return (
            f"Triton's driver does not start ({error}); "
            "it needs a C compiler (gcc, clang or $CC) and Python's headers"
        )
    if target.backend == "cuda" and target.arch < 80:
        return f"{device} has compute capability {target.arch / 10}; Triton needs 8.0 or newer"
    return None
