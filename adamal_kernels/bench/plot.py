"""The picture of a run: how many times faster than torch's fused Adam, and how the cost grows."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from .contenders import BASELINE
from .report import SERIES, Run
from .run import Record, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw", "why_no_plot"]

_OURS = "#c2410c"
_INK = "#1f2937"
_FAINT = "#9ca3af"
# Colour and marker of whoever is no fused backend of ours.
_STYLES = {
    BASELINE: ("#2563eb", "o"),
    "torch-fused-amsgrad": ("#7c3aed", "D"),
    "torch-foreach": ("#0891b2", "s"),
    "torch-for-loop": ("#64748b", "v"),
    "optimi": ("#15803d", "P"),
    "torchao": ("#a16207", "X"),
    "bitsandbytes": ("#be185d", "<"),
    "flashoptim": ("#4d7c0f", ">"),
}
_OTHERS_OF_OURS = ("#f0b18f", "h")


def why_no_plot() -> str | None:
    """Why nothing can be drawn here, with the remedy; None if it can."""
    if find_spec("matplotlib") is None:
        return "matplotlib is not installed; pip install 'adamal-kernels[plot]'"
    return None


def draw(run: Run, path: Path) -> None:
    """Draw the run into ``path`` as a PNG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    cases = [r for r in run.records if r.series is None and _ratios(r)]
    curves = [
        (series, [r for r in run.records if r.series == series and r.results]) for series in SERIES
    ]
    curves = [(series, records) for series, records in curves if records]
    style = {
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.edgecolor": _FAINT,
        "axes.labelcolor": _INK,
        "text.color": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with rc_context(style):
        height = max(6.0, 0.42 * len(cases) + 2.6)
        figure = Figure(figsize=(14, height), dpi=150, layout="constrained")
        parts = figure.subfigures(1, 2, width_ratios=(1.25, 1), squeeze=False, wspace=0.03)[0]
        if cases:
            on_gpu = run.environment["device"]["type"] == "cuda"
            _draw_ratios(parts[0].subplots(), cases, on_gpu=on_gpu)
        if curves:
            panels = parts[1].subplots(len(curves), 1, squeeze=False)[:, 0]
            for axes, (series, records) in zip(panels, curves, strict=True):
                _draw_curve(axes, series, records)
        figure.suptitle(_headline(run) + "\n", fontsize=13, fontweight="bold")
        figure.savefig(path, format="png")


def _headline(run: Run) -> str:
    where = run.environment
    threads = "" if where["device"]["type"] == "cuda" else f", {where['threads']} threads"
    versions = f"torch {where['versions']['torch']}, {where['date'][:10]}"
    return f"One optimizer step on {where['device']['name']}{threads}   ({versions})"


def _ratios(record: Record) -> dict[str, float]:
    """Return how many times faster than the baseline everyone else is."""
    return {
        result.contender: result.times_faster_than[BASELINE]
        for result in record.results
        if BASELINE in result.times_faster_than
    }


def _draw_ratios(axes: Axes, records: Sequence[Record], *, on_gpu: bool) -> None:
    """One row a case: a bar for ours, marks for everyone else, on a logarithmic axis from 1."""
    from matplotlib.container import BarContainer
    from matplotlib.ticker import FuncFormatter, NullFormatter

    seen: set[str] = set()
    rows = list(reversed(records))
    for y, record in enumerate(rows):
        ours = next((result for result in record.results if _leads(result)), None)
        if ours is not None and BASELINE in ours.times_faster_than:
            ratio = ours.times_faster_than[BASELINE]
            label = f"{ours.contender}{', wall time' if on_gpu else ''}"
            _draw_bar(axes, y, ratio, 0.62 if not on_gpu else 0.4, 1.0, label, seen)
            on_device = ours.times_faster_on_device.get(BASELINE)
            if on_device is not None:
                label = f"{ours.contender}, device time"
                _draw_bar(axes, y - 0.32, on_device, 0.22, 0.45, label, seen)
        for name, ratio in _ratios(record).items():
            if ours is None or name != ours.contender:
                colour, marker = _STYLES.get(name, _OTHERS_OF_OURS)
                if name not in _STYLES:
                    marker = "h" if name.endswith("foreach") else "*"
                axes.scatter(
                    ratio, y, s=30, color=colour, marker=marker, linewidths=0, alpha=0.9, zorder=4,
                    label=None if name in seen else name,
                )  # fmt: skip
                seen.add(name)
    axes.axvline(1, color=_STYLES[BASELINE][0], linewidth=1.4, zorder=3, label=f"{BASELINE} = 1")
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.5), max(high, 2) * 1.9)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_yticks(range(len(rows)), [_label(record) for record in rows])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlabel(f"times faster than {BASELINE} (right is better)")
    handles, labels = axes.get_legend_handles_labels()
    # Ours first, the line it is measured by second, everyone else in the order they were timed.
    order = sorted(
        range(len(labels)),
        key=lambda i: (not isinstance(handles[i], BarContainer), not labels[i].endswith("= 1")),
    )
    axes.legend(
        [handles[i] for i in order], [labels[i] for i in order], loc="lower center",
        bbox_to_anchor=(0.4, 1.0), ncols=3, frameon=False, fontsize=9, handletextpad=0.5,
        columnspacing=1.4,
    )  # fmt: skip


def _draw_bar(
    axes: Axes, y: float, ratio: float, height: float, alpha: float, label: str, seen: set[str]
) -> None:
    axes.barh(
        y, ratio - 1, left=1, height=height, color=_OURS, alpha=alpha, zorder=2,
        label=None if label in seen else label,
    )  # fmt: skip
    seen.add(label)
    axes.annotate(
        f"{ratio:.3g}x", (max(ratio, 1), y), xytext=(6, 0), textcoords="offset points",
        va="center", fontsize=9, fontweight="bold" if alpha == 1 else "normal", color=_OURS,
        zorder=5, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8},
    )  # fmt: skip


def _draw_curve(axes: Axes, series: str, records: Sequence[Record]) -> None:
    """Time of a step against the number of tensors or of parameters, both logarithmic."""
    from matplotlib.ticker import EngFormatter, LogLocator

    over_tensors = series == "scaling-tensors"
    lines: dict[str, list[tuple[int, Result]]] = {}
    for record in records:
        for result in record.results:
            x = record.tensors if over_tensors else record.parameters
            lines.setdefault(result.contender, []).append((x, result))
    ours_seen = False
    for name, points in lines.items():
        is_ours = points[0][1].ours
        colour, marker = _STYLES.get(name, (_OURS, "o"))
        x = [count for count, _ in points]
        y = [result.wall_s.median for _, result in points]
        low = [result.wall_s.q1 for _, result in points]
        high = [result.wall_s.q3 for _, result in points]
        dashed = "--" if is_ours and ours_seen else "-"
        ours_seen |= is_ours
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(
            x, y, color=colour, marker=marker, markersize=4.5, linestyle=dashed,
            linewidth=2.2 if is_ours else 1.4, label=name, zorder=3 if is_ours else 2,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(SERIES[series])
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_formatter(EngFormatter(unit="s"))
    axes.xaxis.set_major_locator(LogLocator(numticks=12))
    axes.yaxis.set_major_locator(LogLocator(numticks=12))
    axes.minorticks_off()
    axes.set_ylabel("time of step()")
    axes.legend(frameon=False, fontsize=9, loc="upper left")


def _leads(result: Result) -> bool:
    """Whether it is the fused backend of ours that the bar stands for."""
    return result.ours and result.bytes_a_parameter is not None


def _label(record: Record) -> str:
    remarks = [record.dtype] if record.dtype != "float32" else []
    if record.v == "saturated":
        remarks.append("v saturated")
    return ", ".join([record.title, *remarks])
