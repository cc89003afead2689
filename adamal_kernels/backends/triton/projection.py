"""The launches that project a bucket's tensors after their step: tables and memory.

Importing this imports Triton, which is slow: :mod:`.backend` does so on first use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.bucket import BucketKey
from ...core.norm import chunk_elements
from . import long_rows as triton_long_rows
from . import rows as triton_rows
from .tables import SetEntry

__all__ = ["EVALUATIONS", "ProjectionTables", "prepare_projection", "projection_tables"]

EVALUATIONS = 8
"""How often the sums of long rows are taken by launches that share them. A search from the last
step's multiplier takes two to four; what is left of a longer one is one program's work."""

Prepare = Callable[[Any, int, Sequence[Tensor], dict[str, object]], Callable[[int], None]]


class ProjectionTables(NamedTuple):
    """What the kernels that project read, besides what the step does."""

    sets: Tensor
    """Int64 ``[tensor, SET_WORDS]``."""
    long_rows: Tensor
    """Int64 ``[row, 3]``: as in :mod:`.long_rows`."""
    long_items: Tensor
    """Int32 ``[item, 2]``: likewise."""
    short: tuple[Tensor, ...]
    """For each of ``triton_rows.TILES``, int32 ``[item, 2]``: a tensor and its block of rows."""

    def map(self, call: Callable[[Tensor], Tensor]) -> ProjectionTables:
        """Return the results of ``call`` for each table."""
        return ProjectionTables(*map(call, self[:3]), tuple(map(call, self.short)))


def projection_tables(sets: Tensor, compute: torch.dtype) -> ProjectionTables:
    """Return the tables for a bucket's sets, on the host.

    Args:
        sets: int64 ``[tensor, SET_WORDS]``, on the host.
        compute: what the step computes in.
    """
    rows, length = (sets[:, SetEntry._fields.index(name)] for name in ("rows", "length"))
    rows = torch.where(length > 0, rows, 0)
    short, least = [], 0
    for most, tile in triton_rows.TILES.items():
        of_tile = torch.where((length > least) & (length <= most), rows, 0)
        short.append(_numbered((of_tile + tile.rows - 1) // tile.rows).to(torch.int32))
        least = most
    long_rows = _numbered(torch.where(length > least, rows, 0))
    chunk = chunk_elements(compute)
    chunks = (length[long_rows[:, 0]] + chunk - 1) // chunk
    long_items = _numbered(chunks).to(torch.int32)
    first_items = chunks.cumsum(0) - chunks
    long_rows = torch.cat([long_rows, first_items.unsqueeze(1)], dim=1)
    return ProjectionTables(sets, long_rows, long_items, tuple(short))


def prepare_projection(
    key: BucketKey,
    tensors: tuple[Tensor, Tensor, Tensor],
    tables: ProjectionTables,
    prepare: Prepare,
) -> tuple[list[Callable[[int], None]], tuple[Tensor, ...]]:
    """Return the launches, and memory that has to live as long as they do.

    Args:
        key: the bucket's kind.
        tensors: ``tensors``, ``inputs`` and ``scalars`` of :func:`.step_kernel`, on the device.
        tables: on the device.
        prepare: makes a launch of a kernel, its number of programs, its tensors and its constants.
    """
    entries, inputs, scalars = tensors
    stepped = (entries, tables.sets, inputs, scalars)
    launches = []
    for tile, items in zip(triton_rows.TILES.values(), tables.short, strict=True):
        if len(items):
            constants = triton_rows.constants(key, tile)
            kernel = triton_rows.project_kernel
            launches.append(prepare(kernel, len(items), (*stepped, items), constants))
    if not len(tables.long_rows):
        return launches, ()
    rows, items = tables.long_rows, tables.long_items
    firsts, seconds, scales = (
        torch.empty(count, dtype=torch.float64, device=key.device)
        for count in (len(items), len(items), len(rows))
    )
    states = torch.empty((len(rows), 2), dtype=torch.int32, device=key.device)
    constants = triton_long_rows.constants(key)

    def by_row(kernel: Any, *tensors: Tensor) -> Callable[[int], None]:
        return prepare(kernel, len(rows), (*stepped, rows, *tensors), constants)

    def by_item(kernel: Any, *tensors: Tensor) -> Callable[[int], None]:
        return prepare(kernel, len(items), (*stepped, rows, *tensors), constants)

    kernels, search = triton_long_rows, (states, scales)
    evaluate = by_item(kernels.evaluate_kernel, items, states, firsts, seconds)
    go_on = by_row(kernels.continue_kernel, *search, firsts, seconds)
    launches += [
        by_item(kernels.size_kernel, items, firsts),
        by_row(kernels.begin_kernel, *search, firsts),
        *[evaluate, go_on] * EVALUATIONS,
        by_row(kernels.finish_kernel, *search),
        by_item(kernels.apply_kernel, items, *search),
    ]
    return launches, (firsts, seconds, scales, states)


def _numbered(counts: Tensor) -> Tensor:
    """Return int64 ``[sum of counts, 2]``: each index, and a number below its count."""
    indices = torch.arange(len(counts), device="cpu").repeat_interleave(counts)
    firsts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    return torch.stack([indices, torch.arange(len(indices), device="cpu") - firsts], dim=1)
