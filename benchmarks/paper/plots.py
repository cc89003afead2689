"""How plots look, and the line under each that says where its figures come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from .methods import METHODS

__all__ = ["draw_band", "new_figure"]

_FAINT = "#e5e7eb"
_INK = "#1f2937"


def new_figure(
    record: dict[str, Any],
    rows: int,
    columns: int,
    *,
    width: float,
    height: float,
    shown: str = "mean ± standard deviation",
    **options: Any,
) -> tuple[Figure, NDArray[np.object_]]:
    """Return a figure that names the record it shows, and its axes, rows by columns."""
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, **options)
    for axes in panels.flat:
        axes.grid(color=_FAINT, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    where = record["environment"]
    figure.supxlabel(
        f"{record['settings']['seeds']} seeds, {shown}; "
        f"{where['device']['name']}, torch {where['versions']['torch']}, {where['date'][:10]}",
        fontsize="small",
        color=_INK,
    )
    return figure, panels


def draw_band(axes: Axes, x: Sequence[float], found: dict[str, Any], method: str) -> None:
    """Draw a method's mean over seeds along ``x``, and one standard deviation about it."""
    # What was not finite is null in a record.
    mean, std = (np.array(found[key], dtype=np.float64) for key in ("mean", "std"))
    colour, line = METHODS[method].colour, METHODS[method].line
    axes.plot(x, mean, line, color=colour, label=method, linewidth=1.8)
    axes.fill_between(x, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)
