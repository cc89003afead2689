"""The Triton backend: one launch steps all tensors of a bucket, through a table of pointers."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..bucket import Bucket, BucketKey
from ..dtypes import DTYPE_PAIRS, compute_dtype
from ..gradient_norm import squared_norm
from ..hyperparameters import StepScalars

if TYPE_CHECKING:
    from types import ModuleType

    from triton.backends.compiler import GPUTarget

__all__ = ["TensorEntry", "TritonBackend"]

_OLDEST = (3, 6)
_ALIGNMENT = 16


class TritonBackend:
    """Triton kernels for NVIDIA and AMD GPUs; CPU tensors through Triton's interpreter."""

    name = "triton"
    device_types = ("cuda",)

    def unavailable(self, device: torch.device) -> str | None:
        """See :class:`adamal_kernels.backends.Backend`."""
        return _why_unavailable(device)

    def unsupported(self, key: BucketKey) -> str | None:
        """See :class:`adamal_kernels.backends.Backend`."""
        if key.dtypes not in DTYPE_PAIRS:
            return f"{key.dtypes} is not in DTYPE_PAIRS"
        if key.device_scalars:
            return "scalars derived on the device are not implemented yet; use backend='cuda'"
        interpreted_bfloat16 = key.device.type == "cpu" and torch.bfloat16 in key.dtypes
        if interpreted_bfloat16 and not _kernels().casts_bfloat16_correctly():
            return (
                "the interpreter of this Triton truncates bfloat16 where hardware rounds; "
                "use backend='cpu', or a GPU"
            )
        return None

    def squared_norm(self, bucket: Bucket) -> Tensor:
        """See :class:`adamal_kernels.backends.Backend`."""
        return squared_norm(bucket.grads, compute_dtype(bucket.key.dtypes.param))

    def step(self, bucket: Bucket) -> None:
        """See :class:`adamal_kernels.backends.Backend`."""
        launcher = bucket.workspace.get("launcher")
        if launcher is None:
            launcher = bucket.workspace["launcher"] = _Launcher(bucket.key)
        launcher.step(bucket)


class TensorEntry(NamedTuple):
    """A row of the kernel's ``tensors`` table: what rarely moves, as int64 words."""

    param: int
    exp_avg: int
    exp_avg_sq: int
    max_exp_avg_sq: int
    numel: int


@dataclass(frozen=True, slots=True)
class _Binding:
    """The device tables that outlive a step, and all that they were made from."""

    entries: list[TensorEntry]
    aligned: list[bool]
    stream: int
    tensors: Tensor
    launches: list[tuple[bool, Tensor]]
    """``(aligned, items)`` of each launch: first the tensors aligned in every stream."""

    def holds(self, entries: list[TensorEntry], aligned: list[bool], stream: int) -> bool:
        # The stream counts because the allocator recycles memory in the order of the stream it
        # was allocated on: tables are read on that one only, and may be dropped at any time.
        return (self.stream, self.entries, self.aligned) == (stream, entries, aligned)


class _Launcher:
    """Launches the steps of one kind of bucket, and keeps its tables from step to step."""

    def __init__(self, key: BucketKey) -> None:
        self._key = key
        self._kernels = _kernels()
        self._target = None if key.device.type == "cpu" else _target(key.device)
        self._binding: _Binding | None = None

    def step(self, bucket: Bucket) -> None:
        entries = _entries(bucket)
        grads = [grad.data_ptr() for grad in bucket.grads]
        aligned = [
            (e.param | e.exp_avg | e.exp_avg_sq | e.max_exp_avg_sq | grad) % _ALIGNMENT == 0
            for e, grad in zip(entries, grads, strict=True)
        ]
        # Triton launches on the current device's current stream.
        with _current_device(self._key.device):
            stream = _current_stream(self._key.device)
            if self._binding is None or not self._binding.holds(entries, aligned, stream):
                self._binding = self._bind(entries, aligned, stream)
            if self._binding.launches:
                inputs, scalars = self._upload_inputs(grads, bucket.rows, bucket.scalars)
                for is_aligned, items in self._binding.launches:
                    self._launch(is_aligned, items, self._binding.tensors, inputs, scalars)

    def _bind(self, entries: list[TensorEntry], aligned: list[bool], stream: int) -> _Binding:
        launches = []
        for wanted in (True, False):
            # Empty tensors have no address, and no work.
            members = [
                i for i, entry in enumerate(entries) if aligned[i] is wanted and entry.numel > 0
            ]
            if members:
                items = _work_items(members, entries, self._kernels.BLOCK)
                launches.append((wanted, self._upload(items)))
        tensors = self._upload(torch.tensor(entries, dtype=torch.int64, device="cpu"))
        return _Binding(entries, aligned, stream, tensors, launches)

    def _upload_inputs(
        self, grads: list[int], rows: list[int], scalars: list[StepScalars]
    ) -> tuple[Tensor, Tensor]:
        """Upload what moves in every step, in one copy: gradients, rows and scalars."""
        dtype = compute_dtype(self._key.dtypes.param)
        inputs = torch.tensor(list(zip(grads, rows, strict=True)), dtype=torch.int64, device="cpu")
        table = torch.tensor(scalars, dtype=dtype, device="cpu")
        split = inputs.nbytes
        # Rows of `inputs` are 16 bytes, so `scalars` stays as aligned as Triton specialises for.
        packed = torch.cat([inputs.view(-1).view(torch.uint8), table.view(-1).view(torch.uint8)])
        packed = self._upload(packed)
        return packed[:split].view(torch.int64), packed[split:].view(dtype)

    def _upload(self, host: Tensor) -> Tensor:
        if self._key.device.type == "cpu":
            return host
        # Pinned memory is fresh every time: torch recycles it only after its copy has run, which
        # a buffer of our own, written again in the next step, would not wait for.
        return host.pin_memory().to(self._key.device, non_blocking=True)

    def _launch(
        self, aligned: bool, items: Tensor, tensors: Tensor, inputs: Tensor, scalars: Tensor
    ) -> None:
        self._kernels.step_kernel[(items.shape[0],)](
            tensors,
            items,
            inputs,
            scalars,
            **self._kernels.constants(self._key, self._target, aligned=aligned),
            **self._kernels.launch_options(self._target),
        )


def _entries(bucket: Bucket) -> list[TensorEntry]:
    maxima = [t.data_ptr() for t in bucket.max_exp_avg_sqs] or [0] * len(bucket.params)
    return [
        TensorEntry(p.data_ptr(), m.data_ptr(), v.data_ptr(), v_max, p.numel())
        for p, m, v, v_max in zip(
            bucket.params, bucket.exp_avgs, bucket.exp_avg_sqs, maxima, strict=True
        )
    ]


def _work_items(members: list[int], entries: list[TensorEntry], block: int) -> Tensor:
    """Return int32 ``[item, 2]``: every block of the tensors numbered ``members``, in order."""
    blocks = torch.tensor([-(-entries[i].numel // block) for i in members], device="cpu")
    tensors = torch.tensor(members, device="cpu").repeat_interleave(blocks)
    firsts = (blocks.cumsum(0) - blocks).repeat_interleave(blocks)
    chunks = torch.arange(len(tensors), device="cpu") - firsts
    return torch.stack([tensors, chunks], dim=1).to(torch.int32)


def _kernels() -> ModuleType:
    from . import triton_kernels  # on first use: importing Triton takes a second

    return triton_kernels


def _current_device(device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def _current_stream(device: torch.device) -> int:
    return 0 if device.type == "cpu" else torch.cuda.current_stream(device).cuda_stream


def _target(device: torch.device) -> GPUTarget:
    from triton.runtime import driver

    with torch.cuda.device(device):
        return driver.active.get_current_target()


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
        target = _target(device)
    # Triton builds its driver here: whatever goes wrong, the compiler's exit included, is why.
    except Exception as error:
        return (
            f"Triton's driver does not start ({error}); "
            "it needs a C compiler (gcc, clang or $CC) and Python's headers"
        )
    if target.backend == "cuda" and target.arch < 80:
        return f"{device} has compute capability {target.arch / 10}; Triton needs 8.0 or newer"
    return None
