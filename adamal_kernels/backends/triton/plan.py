"""The twin of ``csrc/plan/triton_plan.h`` for where the C++ extension is not built."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core.bucket import BucketKey
from ...core.buffers import BUFFERS
from ...core.rows import CoupledRows
from ...core.scalars import StepOptions, StepScalars
from .tables import OptionEntry, ScalarSource, TensorEntry, set_table, tensor_table

if TYPE_CHECKING:
    from .launcher import Launcher

__all__ = ["PythonPlan"]

_ALIGNMENT = 16


class PythonPlan:
    """Packs the steps of a bucket for a launcher, in Python: some microseconds a tensor."""

    def __init__(self, key: BucketKey, block: int, launcher: Launcher) -> None:
        """Make a plan with nothing bound; a work item covers ``block`` elements."""
        self._key = key
        self._block = block
        self._launcher = launcher
        self._entries: list[TensorEntry] = []
        self._sets: list[CoupledRows] = []
        self._records: list[Tensor] = []
        self._bound: tuple[list[TensorEntry], list[CoupledRows], list[bool], list[int]] | None = (
            None
        )

    def bind(
        self,
        params: Sequence[Tensor],
        buffers: Sequence[Sequence[Tensor]],
        sets: Sequence[CoupledRows],
        records: Sequence[Tensor],
    ) -> None:
        """Take over the tensors of the next steps, and their sets where the bucket is coupled."""
        none = [0] * len(params)
        addresses = ([t.data_ptr() for t in held] or none for held in buffers)
        self._entries = [
            TensorEntry(param.data_ptr(), param.numel(), tuple(of_param))
            for param, *of_param in zip(params, *addresses, strict=True)
        ]
        self._sets = list(sets)
        self._records = list(records)

    def step(self, grads: Sequence[Tensor], scalars: array[float], rows: Sequence[int]) -> None:
        """Step the bound tensors; ``scalars`` are rows of StepScalars, one after the other."""
        entries = self._entries
        # Empty tensors have no address, and no work.
        if not any(entry.numel for entry in entries):
            return
        table = torch.frombuffer(scalars, dtype=torch.float64).view(-1, len(StepScalars._fields))
        self._launch(grads, rows, table.to(self._key.format.compute))

    def step_on_device(
        self,
        grads: Sequence[Tensor],
        options: Sequence[StepOptions],
        scalar_tensors: Sequence[Sequence[Tensor | None]],
        rows: Sequence[int],
        counts: Tensor,
        *,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        grad_norm: Tensor | None,
        max_grad_norm: float,
        skipped_steps: Tensor | None,
    ) -> None:
        """Step the bound tensors by scalars that are derived, and counted, on the device.

        Args:
            grads: of each tensor.
            options: tensor ``i`` has ``options[rows[i]]``.
            scalar_tensors: for each of them, what stands instead of lr, beta1 and beta2.
            rows: of each tensor.
            counts: float32, the steps each tensor has taken.
            grad_scale: as all that follow in :class:`adamal_kernels.core.scalars.StepInputs`.
            found_inf: see there.
            grad_norm: see there.
            max_grad_norm: see there.
            skipped_steps: see there.
        """
        source = ScalarSource(
            len(grads),
            counts.data_ptr(),
            _address(grad_scale),
            _address(found_inf),
            _address(grad_norm),
            max_grad_norm,
            _address(skipped_steps),
        )
        packed = bytearray(struct.pack("=5qdq", *source))
        for numbers, tensors in zip(options, scalar_tensors, strict=True):
            packed += struct.pack("=7d9q", *_option_entry(numbers, tensors))
        self._launch(grads, rows, torch.frombuffer(packed, dtype=torch.uint8))

    def _launch(self, grads: Sequence[Tensor], rows: Sequence[int], table: Tensor) -> None:
        entries = self._entries
        # Not 0, which is no gradient: an empty tensor's steps are counted.
        addresses = [grad.data_ptr() or _ALIGNMENT for grad in grads]
        aligned = [
            all(address % _ALIGNMENT == 0 for address in (e.param, grad, *_elementwise(e)))
            for e, grad in zip(entries, addresses, strict=True)
        ]
        addresses_of_records = [records.data_ptr() for records in self._records]
        bound = (entries, self._sets, aligned, addresses_of_records)
        if self._bound != bound:
            self._bound = None  # for as long as that may fail
            self._launcher.bind(
                self._host(tensor_table(entries)),
                *(self._host(self._items(entries, aligned, wanted)) for wanted in (True, False)),
                self._host(set_table(self._sets)),
                self._records,
            )
            self._bound = bound
        inputs = torch.tensor(
            list(zip(addresses, rows, strict=True)), dtype=torch.int64, device="cpu"
        )
        parts = [part.view(-1).view(torch.uint8) for part in (inputs, table)]
        self._launcher.launch(self._host(torch.cat(parts)))

    def _items(self, entries: list[TensorEntry], aligned: list[bool], wanted: bool) -> Tensor:
        """Return int32 ``[item, 2]``: in order, every block of the tensors so aligned."""
        members = [i for i in range(len(entries)) if aligned[i] is wanted]
        counts = [-(-entries[i].numel // self._block) for i in members]
        blocks = torch.tensor(counts, dtype=torch.int64, device="cpu")
        tensors = torch.tensor(members, dtype=torch.int64, device="cpu").repeat_interleave(blocks)
        firsts = (blocks.cumsum(0) - blocks).repeat_interleave(blocks)
        chunks = torch.arange(len(tensors), device="cpu") - firsts
        return torch.stack([tensors, chunks], dim=1).to(torch.int32)

    def _host(self, tensor: Tensor) -> Tensor:
        # See csrc/plan/triton_plan.cpp.
        return tensor if self._key.device.type == "cpu" else tensor.pin_memory()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _elementwise(entry: TensorEntry) -> Iterator[int]:
    """Yield the addresses of the buffers that are read by vectors."""
    for buffer, address in zip(BUFFERS, entry.buffers, strict=True):
        if buffer.shape == "parameter":
            yield address


def _option_entry(options: StepOptions, tensors: Sequence[Tensor | None]) -> OptionEntry:
    numbers = {
        name: 0.0 if isinstance(value, Tensor) else value
        for name, value in options._asdict().items()
    }
    places = {}
    for name, tensor in zip(("lr", "beta1", "beta2"), tensors, strict=True):
        places[f"{name}_address"] = _address(tensor)
        places[f"{name}_is_float64"] = tensor is not None and tensor.dtype == torch.float64
    return OptionEntry(**numbers, **places)
