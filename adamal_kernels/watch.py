"""Observing a run from inside its steps: what ``optimizer.watch()`` returns."""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from .core.stats import WORDS, Record, WatchRecords, unpacked
from .core.storage import compute_dtype, real_dtype
from .projections import CoupledSet, is_known_set
from .step.entry import is_frozen
from .step.host import Host
from .step.sharded import local_part, splits_rows

__all__ = ["ParameterStatistics", "Watch"]


@dataclass(frozen=True)
class ParameterStatistics:
    """What the last watched step of one parameter came to.

    ``v`` is the second moment that the denominator ``d`` is made of: with ``amsgrad`` the
    maximum. Fractions are of the parameter's elements, a complex one counting as two; of a DTensor
    everything is of this process's part.
    """

    step: int
    """Steps that the parameter has taken, as its state has it."""
    watched_steps: int
    """How many of them were watched; 0: there is nothing yet, and what follows is NaN or None."""
    numel: int
    """Elements that are stepped here."""
    grown_fraction: float
    """Fraction of elements whose ``v`` grew."""
    steps_since_growth: int | None
    """Watched steps since the last in which the ``v`` of any element grew: 0 if it was this one.
    None: none has grown yet."""
    smallest_step: float
    """Smallest effective step size ``step_size / d``: what an element moves by for ``m = 1``. Both
    are NaN if some ``v`` is NaN; infinite where ``d`` is 0; 0 for a learning rate of 0."""
    largest_step: float
    """Largest effective step size."""
    least_budget_change: float
    """Least change of the regularization budget since the parameter's step before: over elements,
    the least ``d_t / step_size_t - d_{t-1} / step_size_{t-1}`` (equation 15), to rounding. NaN in
    the first watched step, and where the learning rate is or was 0. An element whose change is no
    number, as of a ``v`` that has become infinite, is left out."""
    boundary_fraction: float
    """Fraction of elements on the boundary of the set, as the parameter is now: at a bound of a
    box, in a row as large as its ball, 0 in a simplex; NaN without a set."""

    def as_tensor(self) -> Tensor:
        """Return the statistics as a float64 tensor, in the order of the fields; NaN for None."""
        values = (math.nan if value is None else value for value in astuple(self))
        return torch.tensor(list(values), dtype=torch.float64, device="cpu")


class Watch:
    """Watches an optimizer's steps; made by ``optimizer.watch()``. Also a context manager.

    Steps leave their statistics in a few words a work item on the parameters' device. Reading
    alone waits for the device.
    """

    def __init__(self, optimizer: Host) -> None:
        """Switch watching on."""
        self._optimizer = optimizer
        self._records = optimizer._records = WatchRecords()

    @property
    def is_on(self) -> bool:
        """Whether steps are being watched."""
        return self._optimizer._records is self._records

    def stop(self) -> None:
        """Switch watching off; what was seen stays to be read. Nothing happens the second time."""
        if self.is_on:
            self._optimizer._records = None

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def read(self) -> dict[Tensor, ParameterStatistics]:
        """Return the statistics of each of the optimizer's parameters, in the groups' order.

        Waits for the devices. Reads each parameter that has a set once, for its boundary.

        Raises:
            TypeError: a group's projection has been set to what is no set.
        """
        groups = self._optimizer.param_groups
        params = [param for group in groups for param in group["params"]]
        records = self._records_on_host(params)
        steps = self._steps(params)
        fractions = _boundary_fractions(groups, self._optimizer.state)
        return {
            param: _statistics(param, records.get(param), steps.get(param, 0), fractions[param])
            for param in params
        }

    def table(self) -> Table:
        """Return the statistics as a rich table, a row a parameter; ``print(watch)`` prints it."""
        table = Table(title=f"{type(self._optimizer).__name__}, the last watched step")
        headings = ("parameter", "elements", "step", "v grew", "last grew", "smallest step")
        for heading in (*headings, "largest step", "least Γ", "on boundary"):
            table.add_column(heading, justify="left" if heading == "parameter" else "right")
        names = self._names()
        for param, s in self.read().items():
            since = "" if s.steps_since_growth is None else f"{s.steps_since_growth} ago"
            table.add_row(
                Text(names[param], overflow="fold"),
                f"{s.numel}",
                f"{s.step}",
                _cell(s.grown_fraction, ".1%"),
                since,
                _cell(s.smallest_step, ".2e"),
                _cell(s.largest_step, ".2e"),
                _cell(s.least_budget_change, ".2e"),
                _cell(s.boundary_fraction, ".1%"),
            )
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=140)
        console.print(self.table())
        return console.file.getvalue().rstrip("\n")  # type: ignore[attr-defined]

    def _names(self) -> dict[Tensor, str]:
        found: dict[Tensor, str] = {}
        for g, group in enumerate(self._optimizer.param_groups):
            names = group.get("param_names")
            for i, param in enumerate(group["params"]):
                found.setdefault(param, names[i] if names else f"params[{i}] of group {g}")
        return found

    def _records_on_host(self, params: Sequence[Tensor]) -> dict[Tensor, Tensor]:
        found = {p: r for p in params if (r := self._records.find(p)) is not None}
        return _on_host(found)

    def _steps(self, params: Sequence[Tensor]) -> dict[Tensor, int]:
        state = self._optimizer.state
        counts = {
            p: torch.as_tensor(state[p]["step"]).reshape(1)
            for p in params
            if "step" in state.get(p, {})
        }
        return {param: int(count.item()) for param, count in _on_host(counts).items()}


def _on_host(tensors: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """Return each tensor on the CPU, by one copy a device."""
    places: dict[torch.device, list[Tensor]] = defaultdict(list)
    for param, tensor in tensors.items():
        places[tensor.device].append(param)
    copied = {}
    for device, members in places.items():
        if device.type == "cuda":
            # Steps may run on other streams than this one.
            torch.cuda.synchronize(device)
        sizes = [len(tensors[param]) for param in members]
        host = torch.cat([tensors[param].detach() for param in members]).cpu()
        copied.update(zip(members, host.split(sizes), strict=True))
    return copied


def _boundary_fractions(
    groups: Sequence[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]]
) -> dict[Tensor, float]:
    fractions: dict[Tensor, float] = {}
    counts: dict[Tensor, Tensor] = {}
    for group in groups:
        for param in group["params"]:
            fractions[param] = math.nan
            part = local_part(param).detach()
            is_left_alone = part.is_meta or (is_frozen(param) and not state.get(param))
            if group["projection"] is None or part.numel() == 0 or is_left_alone:
                continue
            projection, multiplier = group["projection"], None
            if not is_known_set(projection):
                raise TypeError(
                    f"projection must be a set such as Box(-1, 1), or None, got {projection!r}"
                )
            if isinstance(projection, CoupledSet) and splits_rows(
                param, projection.reduced_dims(param.dim())
            ):
                # Each process has a part of every row, whose size it cannot tell.
                multiplier = state.get(param, {}).get("multiplier")
                if multiplier is None:
                    continue
                multiplier = local_part(multiplier)
            on_boundary = projection.on_boundary(part, multiplier)
            counts[param] = on_boundary.expand_as(part).sum().reshape(1)
    for param, count in _on_host(counts).items():
        fractions[param] = count.item() / local_part(param).numel()
    return fractions


def _statistics(
    param: Tensor, records: Tensor | None, step: int, boundary_fraction: float
) -> ParameterStatistics:
    part = local_part(param)
    numel = part.numel() * (2 if part.is_complex() else 1)
    if records is None or len(records) == 0:
        records = torch.empty(0, WORDS, dtype=torch.int64, device="cpu")
    r = Record(*(column.numpy() for column in unpacked(records)))
    watched = int(r.steps[0]) if len(records) else 0
    since = r.steps_since_growth[r.steps_since_growth >= 0]
    # The least and the largest are NaN where any is.
    denominators = r.largest_denominator.max(initial=0), r.smallest_denominator.min(initial=np.inf)
    least = r.least_budget_change.min(initial=np.inf)
    smallest, largest = (math.nan,) * 2
    if watched:
        smallest, largest = (_effective_step(param, r.step_size[0], d) for d in denominators)
    return ParameterStatistics(
        step=step,
        watched_steps=watched,
        numel=numel,
        grown_fraction=int(r.grown.sum()) / numel if watched else math.nan,
        steps_since_growth=int(since.min()) if since.size else None,
        smallest_step=smallest,
        largest_step=largest,
        least_budget_change=float(least) if least < math.inf else math.nan,
        boundary_fraction=boundary_fraction,
    )


def _effective_step(param: Tensor, step_size: float, denominator: float) -> float:
    """Return ``step_size / denominator``, rounded to the compute type as in the step."""
    if step_size == 0:
        return math.nan if math.isnan(denominator) else 0.0
    is_double = compute_dtype(real_dtype(param.dtype)) is torch.float64
    dtype = np.float64 if is_double else np.float32
    with np.errstate(all="ignore"):
        return float(dtype(step_size) / dtype(denominator))


def _cell(value: float, spec: str) -> str:
    return "" if math.isnan(value) else format(value, spec)
