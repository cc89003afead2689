"""Launching the Triton step: tables kept on the device, compiled kernels, one copy a step.

Importing this imports Triton, which is slow: :mod:`.triton` does so on first use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ..bucket import BucketKey
from ..dtypes import compute_dtype
from . import triton_kernels

__all__ = ["Launcher", "prepare_launch", "triton_version"]

_OLDEST_DIRECT, _NEWEST_DIRECT = (3, 6), (3, 9)
"""The Triton versions in which a compiled kernel is known to be called as here."""

_INPUT_BYTES = 16  # of a tensor: its gradient's address and its row


class Launcher:
    """Launches the steps that a plan packs: ``csrc/plan_triton.h`` or :class:`.PythonPlan`.

    Every step copies one small buffer to the device and launches a kernel, or two where some
    tensors are misaligned; nothing waits for the device.
    """

    def __init__(self, key: BucketKey) -> None:
        """Make a launcher for buckets of kind ``key``, to be bound before it launches."""
        self._key = key
        self._target = None if key.device.type == "cpu" else triton_kernels.target(key.device)
        self._host_tables: tuple[Tensor, Tensor, Tensor]
        self._stream: int | None = None  # on which all below was allocated
        self._entries: Tensor
        self._items: list[tuple[bool, Tensor]]
        self._packed: Tensor | None = None
        self._launches: list[Callable[[int], None]] = []

    def bind(self, entries: Tensor, aligned: Tensor, others: Tensor) -> None:
        """Take over the tables of the next steps.

        Args:
            entries: int64 ``[tensor, 5]``, rows of :class:`.TensorEntry`.
            aligned: int32 ``[item, 2]``, a tensor and its block, of the tensors all of whose
                streams, gradients included, start at multiples of 16 bytes.
            others: the same of the other tensors.

        All are host memory, pinned where the device is another.
        """
        self._host_tables = (entries, aligned, others)
        self._stream = None

    def launch(self, packed: Tensor) -> None:
        """Launch a step of the bound tensors on the device's current stream.

        Args:
            packed: bytes, host memory as for :meth:`bind`: for each tensor two int64, its
                gradient's address (0: none) and its row, then the rows of scalars in the compute
                type.
        """
        with self._current_device():
            stream = self._current_stream()
            if stream != self._stream:
                self._upload_tables(stream)
            if self._packed is None or len(packed) > len(self._packed):
                with torch.inference_mode(False):  # a step outside of it could not write there
                    self._reserve(len(packed))
            # The last step has read this before the copy is made: both are on this stream.
            self._packed[: len(packed)].copy_(packed, non_blocking=True)
            for launch in self._launches:
                launch(stream)

    def _upload_tables(self, stream: int) -> None:
        # Freed memory is handed out again in the order of the stream it was allocated on: what is
        # read on that one only may be dropped at any time. So another stream takes tables anew.
        self._stream = None  # for as long as this may fail
        entries, aligned, others = self._host_tables
        self._entries = self._upload(entries)
        self._items = [
            (promise, self._upload(items))
            for promise, items in ((True, aligned), (False, others))
            if len(items) > 0
        ]
        self._packed = None
        self._stream = stream

    def _reserve(self, size: int) -> None:
        """Make room for ``size`` bytes, and for twice as many scalars where their number grows."""
        split = _INPUT_BYTES * len(self._entries)
        if self._packed is not None:
            size += size - split
        self._packed = None  # for as long as this may fail
        packed = torch.empty(size, dtype=torch.uint8, device=self._key.device)
        inputs = packed[:split].view(torch.int64)
        scalars = packed[split:].view(compute_dtype(self._key.dtypes.param))
        self._launches = [
            prepare_launch(
                triton_kernels.step_kernel,
                (len(items), 1, 1),
                (self._entries, items, inputs, scalars),
                triton_kernels.constants(self._key, self._target, aligned=promise),
                triton_kernels.launch_options(self._target),
            )
            for promise, items in self._items
        ]
        self._packed = packed

    def _upload(self, host: Tensor) -> Tensor:
        return host.to(self._key.device, non_blocking=True)

    def _current_device(self) -> AbstractContextManager[Any]:
        # Triton compiles for, and launches on, the current device.
        return nullcontext() if self._target is None else torch.cuda.device(self._key.device)

    def _current_stream(self) -> int:
        if self._target is None:
            return 0
        # As Triton asks for it: an integer, without the half-microsecond of a torch.cuda.Stream.
        return driver.active.get_current_stream(self._key.device.index)


def prepare_launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: Sequence[Tensor],
    constants: dict[str, object],
    options: dict[str, object],
) -> Callable[[int], None]:
    """Return what launches ``kernel`` on a stream, again and again, over the same ``tensors``.

    ``kernel[grid](...)`` finds out in every launch which compiled kernel it needs, by types,
    constants and what it specializes for: which pointers are multiples of 16 (and, on AMD GPUs,
    lie in less than 2 GiB). Here that is found once, by Triton's own ``warmup`` and of these very
    tensors, and they stay the same: who puts another tensor in one's place, at another address,
    prepares anew. The kernel takes no integer arguments, which would be specialized by value.

    Kernels that the interpreter runs, Triton versions other than 3.6 to 3.9, and a kernel that
    ``warmup`` does not give (a hook of Triton's has taken it over) are launched by
    ``kernel[grid]``.

    Args:
        kernel: a ``triton.jit`` function: pointers first, then constants.
        grid: the number of programs.
        tensors: where the pointers point; to be kept alive by the caller.
        constants: the compile-time arguments by name.
        options: the compiler's options.

    Example:
        >>> launch = prepare_launch(kernel, (8, 1, 1), (x,), {"BLOCK": 1024}, {})  # doctest: +SKIP
        >>> launch(torch.cuda.current_stream().cuda_stream)  # doctest: +SKIP
    """

    def launch(stream: int) -> None:  # Triton asks for the current stream itself.
        kernel[grid](*tensors, **constants, **options)

    if not isinstance(kernel, JITFunction):
        return launch
    if not _OLDEST_DIRECT <= triton_version() <= _NEWEST_DIRECT:
        return launch
    compiled = kernel.warmup(*tensors, grid=grid, **constants, **options)
    if not isinstance(compiled, CompiledKernel):
        return launch
    run = compiled[grid]
    # Addresses: of a tensor, the launch would ask for its address, and the driver what that is.
    arguments = [tensor.data_ptr() for tensor in tensors]
    arguments += [constants[name] for name in kernel.arg_names[len(tensors) :]]

    def launch_compiled(stream: int) -> None:
        run(*arguments, stream=stream)

    return launch_compiled


def triton_version() -> tuple[int, int]:
    """Return the major and minor version of the Triton that is installed."""
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)
