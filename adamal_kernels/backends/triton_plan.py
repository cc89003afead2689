"""The twin of ``csrc/plan_triton.h`` for where the C++ extension is not built."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..bucket import BucketKey
from ..dtypes import compute_dtype
from ..hyperparameters import StepScalars

if TYPE_CHECKING:
    from .triton_launcher import Launcher

__all__ = ["PythonPlan", "TensorEntry"]

_ALIGNMENT = 16


class TensorEntry(NamedTuple):
    """A row of the kernel's ``tensors`` table: what rarely moves, as int64 words."""

    param: int
    exp_avg: int
    exp_avg_sq: int
    max_exp_avg_sq: int
    numel: int


class PythonPlan:
    """Packs the steps of a bucket for a launcher, in Python: some microseconds a tensor."""

    def __init__(self, key: BucketKey, block: int, launcher: Launcher) -> None:
        """Make a plan with nothing bound; a work item covers ``block`` elements."""
        self._key = key
        self._block = block
        self._launcher = launcher
        self._entries: list[TensorEntry] = []
        self._bound: tuple[list[TensorEntry], list[bool]] | None = None

    def bind(
        self,
        params: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        max_exp_avg_sqs: Sequence[Tensor],
    ) -> None:
        """Take over the tensors of the next steps."""
        maxima = [t.data_ptr() for t in max_exp_avg_sqs] or [0] * len(params)
        self._entries = [
            TensorEntry(p.data_ptr(), m.data_ptr(), v.data_ptr(), v_max, p.numel())
            for p, m, v, v_max in zip(params, exp_avgs, exp_avg_sqs, maxima, strict=True)
        ]

    def step(self, grads: Sequence[Tensor], scalars: array[float], rows: Sequence[int]) -> None:
        """Step the bound tensors; ``scalars`` are rows of StepScalars, one after the other."""
        entries = self._entries
        # Empty tensors have no address, and no work.
        if not any(entry.numel for entry in entries):
            return
        addresses = [grad.data_ptr() for grad in grads]
        aligned = [
            (e.param | e.exp_avg | e.exp_avg_sq | e.max_exp_avg_sq | grad) % _ALIGNMENT == 0
            for e, grad in zip(entries, addresses, strict=True)
        ]
        if self._bound != (entries, aligned):
            self._bound = None  # for as long as that may fail
            self._launcher.bind(
                self._host(torch.tensor(entries, dtype=torch.int64, device="cpu")),
                *(self._host(self._items(entries, aligned, wanted)) for wanted in (True, False)),
            )
            self._bound = (entries, aligned)
        self._launcher.launch(self._host(self._pack(addresses, rows, scalars)))

    def _items(self, entries: list[TensorEntry], aligned: list[bool], wanted: bool) -> Tensor:
        """Return int32 ``[item, 2]``: in order, every block of the tensors so aligned."""
        members = [i for i in range(len(entries)) if aligned[i] is wanted]
        counts = [-(-entries[i].numel // self._block) for i in members]
        blocks = torch.tensor(counts, dtype=torch.int64, device="cpu")
        tensors = torch.tensor(members, dtype=torch.int64, device="cpu").repeat_interleave(blocks)
        firsts = (blocks.cumsum(0) - blocks).repeat_interleave(blocks)
        chunks = torch.arange(len(tensors), device="cpu") - firsts
        return torch.stack([tensors, chunks], dim=1).to(torch.int32)

    def _pack(self, grads: list[int], rows: Sequence[int], scalars: array[float]) -> Tensor:
        """Return gradients and rows as int64, then the scalars in the compute type, as bytes."""
        inputs = torch.tensor(list(zip(grads, rows, strict=True)), dtype=torch.int64, device="cpu")
        table = torch.frombuffer(scalars, dtype=torch.float64).view(-1, len(StepScalars._fields))
        table = table.to(compute_dtype(self._key.dtypes.param))
        return torch.cat([part.view(-1).view(torch.uint8) for part in (inputs, table)])

    def _host(self, tensor: Tensor) -> Tensor:
        # See csrc/plan_triton.cpp.
        return tensor if self._key.device.type == "cpu" else tensor.pin_memory()
