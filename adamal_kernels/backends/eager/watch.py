"""What steps by eager operators came to: the formulas of ``csrc/formula/watch.h``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.rounding import rounded_sqrt
from ...core.scalars import StepScalars, as_float64
from ...core.stats import COUNTS, Record, unpacked
from ...core.storage import load

__all__ = ["record_steps"]


@torch.no_grad()
def record_steps(
    records: Sequence[Tensor],
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    rows: Sequence[StepScalars],
    compute: torch.dtype,
    skip: Tensor | None,
) -> None:
    """Record what steps by eager operators came to.

    Args:
        records: of each tensor one or, where it has no elements, none.
        before: what each tensor's denominator was made of in the last step, as it was stored.
        after: what it is made of now, as it is stored.
        rows: each tensor's scalars, numbers or tensors.
        compute: the type that steps compute in.
        skip: a boolean of the device: whether the step was skipped, and nothing is recorded.
    """
    for record, old, new, row in zip(records, before, after, rows, strict=True):
        if old.numel() == 0:
            continue
        last = Record(*(word[0] for word in unpacked(record)))
        words = _recorded(last, load(old.detach(), compute), load(new.detach(), compute), row)
        fresh = torch.cat(
            [
                torch.stack(words[:COUNTS]),
                torch.stack([w.double() for w in words[COUNTS:]]).view(torch.int64),
            ]
        )
        record[0].copy_(fresh if skip is None else torch.where(skip, record[0], fresh))


def _recorded(last: Record, before: Tensor, after: Tensor, row: StepScalars) -> Record:
    def scalar(value: float | Tensor) -> Tensor:
        return as_float64(value, after.device).to(after.dtype).detach()

    step_size, bias2_sqrt, eps = map(scalar, (row.step_size, row.bias2_sqrt, row.eps))
    stands = ~(step_size > 0)
    scale = torch.where(stands, math.nan, scalar(1) / (bias2_sqrt * step_size))
    offset = torch.where(stands, math.nan, eps / step_size)
    last_scale, last_offset = last.budget_scale.to(after.dtype), last.budget_offset.to(after.dtype)
    scale_change, offset_change = scale - last_scale, offset - last_offset

    root, last_root = rounded_sqrt(after), rounded_sqrt(before)
    change = (root * scale_change + offset_change) + last_scale * (root - last_root)
    least = torch.where(change.isnan(), math.inf, change).amin()
    d = root / bias2_sqrt + eps
    grown = (after > before).sum()
    since = last.steps_since_growth
    return Record(
        steps=last.steps + 1,
        steps_since_growth=torch.where(grown > 0, 0, torch.where(since < 0, since, since + 1)),
        grown=grown,
        smallest_denominator=d.amin(),
        largest_denominator=d.amax(),
        least_budget_change=torch.where(scale_change.isnan(), math.nan, least),
        step_size=step_size,
        budget_scale=scale,
        budget_offset=offset,
    )
