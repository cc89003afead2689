"""The tables that kernels read, row by row: of tensors, of sets and of what scalars are made of.

Their twins are in ``csrc/plan/triton_plan.cpp``.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.buffers import BUFFERS
from ...core.rows import MOST_RUNS, CoupledRows

__all__ = [
    "SET_WORDS",
    "TENSOR_WORDS",
    "OptionEntry",
    "ScalarSource",
    "SetEntry",
    "TensorEntry",
    "set_table",
    "tensor_table",
]


class TensorEntry(NamedTuple):
    """A row of the kernels' ``tensors`` table: what rarely moves, as :data:`TENSOR_WORDS`."""

    param: int
    numel: int
    buffers: tuple[int, ...]
    """Addresses, in the order of :data:`.buffers.BUFFERS`; 0: there is none."""


TENSOR_WORDS = {name: i for i, name in enumerate(("param", "numel", *(b.key for b in BUFFERS)))}
"""Where each of them stands in a row, in int64 words."""


class SetEntry(NamedTuple):
    """A row of the kernels' ``sets`` table, 8 bytes each: a tensor's set, and how its rows lie.

    What follows it there is ``MOST_RUNS`` sizes and as many strides of ``kept``, and the same of
    ``reduced``, of :class:`adamal_kernels.core.rows.CoupledRows`.
    """

    kind: int
    size: float
    tolerance: float
    rows: int
    length: int
    kept_count: int
    reduced_count: int


SET_WORDS = len(SetEntry._fields) + 4 * MOST_RUNS
"""Of a tensor in the ``sets`` table."""


class ScalarSource(NamedTuple):
    """What the scalars of a step on the device are derived from, besides options; 8 bytes each.

    Addresses are 0 where there is nothing: see :class:`adamal_kernels.core.scalars.StepInputs`.
    """

    tensor_count: int
    counts: int
    grad_scale: int
    found_inf: int
    grad_norm: int
    max_grad_norm: float
    skipped_steps: int


class OptionEntry(NamedTuple):
    """A row of the options that scalars are derived from, 8 bytes each.

    A number whose address is not 0 lies there, in float64 or else in float32.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    lower: float
    upper: float
    decoupled_weight_decay: int
    maximize: int
    bias_correction: int
    lr_address: int
    lr_is_float64: int
    beta1_address: int
    beta1_is_float64: int
    beta2_address: int
    beta2_is_float64: int


def tensor_table(entries: Sequence[TensorEntry]) -> Tensor:
    """Return int64 ``[tensor, word]``: a row of :data:`TENSOR_WORDS` for each entry."""
    rows = [(param, numel, *buffers) for param, numel, buffers in entries]
    return torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, len(TENSOR_WORDS))


def set_table(sets: Sequence[CoupledRows]) -> Tensor:
    """Return int64 ``[tensor, SET_WORDS]``: rows of :class:`SetEntry`, and the runs after each."""
    packed = bytearray()
    for rows in sets:
        kept, reduced = rows.kept, rows.reduced
        entry = SetEntry(*rows[:3], rows.rows, rows.length, len(kept), len(reduced))
        packed += struct.pack("=qdd4q", *entry)
        for runs in (kept, reduced):
            padded = [*runs, *[(1, 0)] * (MOST_RUNS - len(runs))]
            for words in zip(*padded, strict=True):
                packed += struct.pack(f"={MOST_RUNS}q", *words)
    if not packed:
        return torch.empty((0, SET_WORDS), dtype=torch.int64, device="cpu")
    return torch.frombuffer(packed, dtype=torch.int64).view(-1, SET_WORDS)
