"""Launching the Triton kernels: tables kept on the device, compiled kernels, one copy a step.

Importing this imports Triton, which is slow: :mod:`.backend` does so on first use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ...core.bucket import BucketKey
from ...core.scalars import StepScalars
from . import element
from . import norm as triton_norm
from . import scalars as triton_scalars
from . import watch as triton_watch
from .projection import ProjectionTables, prepare_projection, projection_tables
from .tables import TENSOR_WORDS

__all__ = ["Launcher", "prepare_launch", "triton_version"]

_OLDEST_DIRECT, _NEWEST_DIRECT = (3, 6), (3, 9)
"""The Triton versions in which a compiled kernel is known to be called as here."""

_INPUT_BYTES = 16  # of a tensor: its gradient's address and its row

# What CUDA graphs read whenever they are replayed, kept until the process ends: nothing tells when
# a graph is gone.
_captured: list[tuple[Any, ...]] = []


@dataclass(slots=True)
class _Staged:
    """Launches, and the device memory they read what changes in every step from."""

    buffer: Tensor
    launches: list[Callable[[int], None]]
    memory: tuple[Tensor, ...] = ()
    """Other device memory of theirs; of a norm, its sum of squares first."""


@dataclass(slots=True)
class _Tables:
    """A binding's tables on the device, and the launches over them."""

    stream: int
    """On which the memory was allocated."""
    entries: Tensor
    items: list[tuple[bool, Tensor]]
    """Whether they are all aligned, and they."""
    projection: ProjectionTables | None = None
    records: Tensor | None = None
    """Addresses of each tensor's records; None where steps are not watched."""
    step: _Staged | None = None
    norm: _Staged | None = None


class Launcher:
    """Launches the steps that a plan packs: ``csrc/plan/triton_plan.h`` or :class:`.PythonPlan`.

    Every step copies one small buffer to the device and launches a kernel, or two where some
    tensors are misaligned, after another that derives the scalars where only the device knows
    them; a norm takes three kernels more. Of sets that couple elements, rows take a kernel for each
    kind of length, or a fixed number where they are long. Nothing waits for the device.

    In a CUDA graph the copy is a node that reads the same host memory in every replay. Gradients
    then stay where they were, so the same bytes are right, as long as nobody writes others there:
    the buffer, and all that the captured kernels read, is kept.
    """

    def __init__(self, key: BucketKey) -> None:
        """Make a launcher for buckets of kind ``key``, to be bound before it launches."""
        self._key = key
        self._target = None if key.device.type == "cpu" else element.target(key.device)
        self._options = element.launch_options(self._target)
        self._host_tables: tuple[Tensor, Tensor, Tensor, ProjectionTables | None, Tensor | None]
        self._records: Sequence[Tensor] = ()
        self._tables: _Tables | None = None

    def bind(
        self,
        entries: Tensor,
        aligned: Tensor,
        others: Tensor,
        sets: Tensor,
        records: Sequence[Tensor],
    ) -> None:
        """Take over the tables of the next steps.

        Args:
            entries: int64 ``[tensor, word]``, rows of :data:`.TENSOR_WORDS`.
            aligned: int32 ``[item, 2]``, a tensor and its block, of the tensors all of whose
                streams, gradients included, start at multiples of 16 bytes.
            others: the same of the other tensors.
            sets: int64 ``[tensor, SET_WORDS]``, rows of :class:`.SetEntry` and the runs that follow
                one; none unless ``key.coupled``.
            records: of each tensor's work items; empty where steps are not watched.

        The tables are host memory, pinned where the device is another.
        """
        projection = None
        if self._key.coupled:
            made = projection_tables(sets, self._key.format.compute)
            projection = made.map(self._host)
        addresses = None
        if records:
            found = [of_tensor.data_ptr() for of_tensor in records]
            addresses = self._host(torch.tensor(found, dtype=torch.int64, device="cpu"))
        self._host_tables = (entries, aligned, others, projection, addresses)
        self._records = records
        self._tables = None

    def launch(self, packed: Tensor) -> None:
        """Launch a step of the bound tensors on the device's current stream.

        Args:
            packed: bytes, host memory as for :meth:`bind`: for each tensor two int64, its
                gradient's address (0: none) and its row, then the rows of scalars in the compute
                type; with ``key.device_scalars`` a :class:`.ScalarSource` and rows of
                :class:`.OptionEntry`.
        """
        self._enqueue(packed, self._step_of)

    def squared_norm(self, packed: Tensor) -> Tensor:
        """Return the sum of squares of all gradients, a float64 scalar on the device.

        Args:
            packed: as for :meth:`launch`, without what follows the rows, which are not read.
        """
        return self._enqueue(packed, self._norm_of).memory[0].clone()

    def _enqueue(self, packed: Tensor, staged_of: Callable[[_Tables, int], _Staged]) -> _Staged:
        with self._current_device():
            stream, capturing = self._current_stream(), self._is_capturing()
            tables = self._tables_on(stream, capturing)
            staged = staged_of(tables, len(packed))
            # The last step has read this before the copy is made: both are on this stream.
            staged.buffer[: len(packed)].copy_(packed, non_blocking=True)
            for launch in staged.launches:
                launch(stream)
            if capturing:
                _captured.append((packed, self._host_tables, self._records, tables, staged))
        return staged

    def _tables_on(self, stream: int, capturing: bool) -> _Tables:
        # Freed memory is handed out again in the order of the stream it was allocated on: what is
        # read on that one only may be dropped at any time. So another stream takes tables anew,
        # unless it is captured, for then they are kept.
        tables = self._tables
        if tables is None or (stream != tables.stream and not capturing):
            self._tables = None  # for as long as this may fail
            tables = self._upload_tables(stream)
            if not capturing:
                self._tables = tables
        # What is made during a capture is filled by replays, and so of no use to other steps.
        return replace(tables) if capturing else tables

    def _upload_tables(self, stream: int) -> _Tables:
        entries, aligned, others, projection, addresses = self._host_tables
        if self._target is not None:
            for records in self._records:
                records.record_stream(torch.cuda.current_stream(self._key.device))
        return _Tables(
            stream,
            self._upload(entries),
            [
                (promise, self._upload(items))
                for promise, items in ((True, aligned), (False, others))
                if len(items) > 0
            ],
            None if projection is None else projection.map(self._upload),
            None if addresses is None else self._upload(addresses),
        )

    def _step_of(self, tables: _Tables, size: int) -> _Staged:
        step = tables.step
        if step is None or size > len(step.buffer):
            with torch.inference_mode(False):  # a step outside of it could not write there
                step = self._reserve(tables, size)
        return step

    def _reserve(self, tables: _Tables, size: int) -> _Staged:
        """Make room for ``size`` bytes, and for twice as many scalars where their number grows."""
        split = _INPUT_BYTES * len(tables.entries)
        if tables.step is not None:
            size += size - split
        tables.step = None  # for as long as this may fail
        buffer = torch.empty(size, dtype=torch.uint8, device=self._key.device)
        inputs = buffer[:split].view(torch.int64)
        compute = self._key.format.compute
        step = _Staged(buffer, [])
        if self._key.device_scalars:
            source = buffer[split:].view(torch.int64)
            count = element.ROWS_HEADER + len(tables.entries) * len(StepScalars._fields)
            scalars = torch.empty(count, dtype=compute, device=self._key.device)
            step.memory = (scalars,)
            programs = triton.cdiv(len(tables.entries), triton_scalars.TENSORS_PER_PROGRAM)
            kernel = triton_scalars.derive_kernel
            step.launches.append(self._prepare(kernel, programs, (inputs, source, scalars)))
        else:
            scalars = buffer[split:].view(compute)
        for promise, items in tables.items:
            tensors = (tables.entries, items, inputs, scalars)
            constants = element.constants(self._key, self._target, aligned=promise)
            kernel = element.step_kernel
            if tables.records is not None:
                kernel, tensors = triton_watch.watched_step_kernel, (*tensors, tables.records)
            step.launches.append(self._prepare(kernel, len(items), tensors, constants))
        if tables.projection is not None:
            tensors = (tables.entries, inputs, scalars)
            made = prepare_projection(self._key, tensors, tables.projection, self._prepare)
            step.launches += made[0]
            step.memory += made[1]
        tables.step = step
        return step

    def _norm_of(self, tables: _Tables, size: int) -> _Staged:
        if tables.norm is None:
            with torch.inference_mode(False):
                tables.norm = self._prepare_norm(tables, size)
        return tables.norm

    def _prepare_norm(self, tables: _Tables, size: int) -> _Staged:
        def empty(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=self._key.device)

        entries, count = tables.entries, len(tables.entries)
        buffer = empty(size, dtype=torch.uint8)
        inputs = buffer.view(torch.int64)
        blocks = -(-entries[:, TENSOR_WORDS["numel"]] // element.BLOCK)
        first_items = blocks.cumsum(0) - blocks
        item_sums = empty(sum(len(items) for _, items in tables.items))
        tensor_sums, total = empty(count), empty()
        tensor_count = torch.full_like(first_items[:1], count)
        norm = _Staged(buffer, [], (total, first_items, item_sums, tensor_sums, tensor_count))
        for promise, items in tables.items:
            tensors = (entries, items, inputs, first_items, item_sums)
            constants = triton_norm.constants(self._key, aligned=promise)
            kernel = triton_norm.item_sums_kernel
            norm.launches.append(self._prepare(kernel, len(items), tensors, constants))
        levels = {"CHUNK_LEVELS": triton_norm.chunk_levels(self._key.format.compute)}
        tensors = (entries, first_items, item_sums, tensor_sums)
        norm.launches += [
            self._prepare(triton_norm.tensor_sums_kernel, count, tensors, levels),
            self._prepare(triton_norm.total_kernel, 1, (tensor_sums, tensor_count, total)),
        ]
        return norm

    def _prepare(
        self,
        kernel: Any,
        programs: int,
        tensors: Sequence[Tensor],
        constants: dict[str, object] | None = None,
    ) -> Callable[[int], None]:
        return prepare_launch(kernel, (programs, 1, 1), tensors, constants or {}, self._options)

    def _host(self, tensor: Tensor) -> Tensor:
        # See csrc/plan/triton_plan.cpp.
        return tensor if self._target is None else tensor.pin_memory()

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

    def _is_capturing(self) -> bool:
        # The optimizer refuses to be captured where the scalars are not the device's.
        if self._target is None or not self._key.device_scalars:
            return False
        return torch.cuda.is_current_stream_capturing()


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
