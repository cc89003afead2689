"""The image experiment's tables, plots and claims, with the paper's figures beside ours.

The paper's accuracies are of CIFAR-10. They stand in a column of their own that says so, whatever
data ours are of, and no figure is computed from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from rich.table import Table

from .experiment import Claim, Verdict, difference, plus_minus
from .methods import ADAMS, METHODS
from .plots import draw_band, new_figure

__all__ = ["PAPER_TABLE_1", "claims", "draw", "tables"]

PAPER_TABLE_1 = {"VSGD": 94.73, "Adam": 94.98, "AMSGrad": 94.60, "AdamAL": 95.13}
"""Accuracy in percent on CIFAR-10, as printed; it gives no spread, and has no SGDM."""

DATA = {"digits": "scikit-learn's digits", "cifar10": "CIFAR-10"}
# What the paper counts as a gain, in points of accuracy.
POINT = 0.01


def tables(record: dict[str, Any]) -> Sequence[Table]:
    """Return Table 1, and Figures 2 and 3 in figures."""
    results, data = record["results"], DATA[record["settings"]["data"]]
    networks = {key: found["name"] for key, found in results["networks"].items()}
    table1 = Table(
        title="Table 1: accuracy, learning rate tuned and halved at 75, 125, 175 of 200",
        title_justify="left",
    )
    ours = f"ours: {data},\n{networks['ResNet']}, %"
    for header in ("method", ours, "lr", "the paper's:\nCIFAR-10, %"):
        table1.add_column(header, justify="left" if header == "method" else "right")
    for name, found in results["table1"].items():
        paper = f"{PAPER_TABLE_1[name]:.2f}" if name in PAPER_TABLE_1 else "-"
        accuracy = plus_minus(found["final_accuracy"], ".2f", 100)
        table1.add_row(name, accuracy, f"{found['lr']:g}", paper)

    figure2 = Table(title=f"Figure 2, {data}: accuracy untuned, %", title_justify="left")
    figure2.add_column("method")
    for network in networks.values():
        figure2.add_column(network, justify="right")
    for name in METHODS:
        found = (results["figure2"][network][name]["final_accuracy"] for network in networks)
        figure2.add_row(name, *(plus_minus(accuracy, ".2f", 100) for accuracy in found))

    figure3 = Table(
        title=f"Figure 3, {data}, {networks['ResNet']}: accuracy by batch size, %",
        title_justify="left",
    )
    figure3.add_column("method")
    for size in record["settings"]["batch_sizes"]:
        figure3.add_column(str(size), justify="right")
    for name, sizes in results["figure3"].items():
        found = (size["final_accuracy"] for size in sizes.values())
        figure3.add_row(name, *(plus_minus(accuracy, ".2f", 100) for accuracy in found))
    return [table1, figure2, figure3]


def draw(record: dict[str, Any]) -> dict[str, Figure]:
    """Return Figure 2 and Figure 3 with Table 1."""
    results, data = record["results"], record["settings"]["data"]
    epochs = np.arange(1, record["settings"]["epochs"] + 1)
    figure2, panels = new_figure(
        record, len(results["figure2"]), 2, width=11, height=7, sharex=True
    )
    for row, (network, methods) in zip(panels, results["figure2"].items(), strict=True):
        for axes, what in zip(row, ("test_accuracy", "train_loss"), strict=True):
            for name, found in methods.items():
                draw_band(axes, epochs, found[what], name)
            axes.set_title(f"{results['networks'][network]['name']}, {DATA[data]}")
            axes.set_ylabel(what.replace("_", " "))
        # The range in which methods differ, not that of their first epochs.
        row[0].set_ylim(0.8, 1.0)
        row[1].set_yscale("log")
    for axes in panels[-1]:
        axes.set_xlabel("epoch")
    panels[0, 0].legend(frameon=False, ncols=2)

    figure3, panels = new_figure(record, 1, 2, width=11, height=4.2)
    by_batch, by_method = panels[0]
    for name, sizes in results["figure3"].items():
        accuracy = [found["final_accuracy"] for found in sizes.values()]
        mean, std = ([found[key] for found in accuracy] for key in ("mean", "std"))
        found = {"mean": mean, "std": std}
        draw_band(by_batch, [int(size) for size in sizes], found, name)
    by_batch.set_xscale("log", base=2)
    by_batch.xaxis.set_major_formatter(ScalarFormatter())
    by_batch.set(xlabel="batch size", ylabel="test accuracy", title=f"Figure 3, {DATA[data]}")
    by_batch.legend(frameon=False)
    for place, (name, found) in enumerate(results["table1"].items()):
        values = found["final_accuracy"]["values"]
        by_method.scatter([place] * len(values), values, color=METHODS[name].colour, alpha=0.5)
        by_method.hlines(
            found["final_accuracy"]["mean"], place - 0.3, place + 0.3, color=METHODS[name].colour
        )
    by_method.set_xticks(range(len(results["table1"])), list(results["table1"]))
    by_method.set(ylabel="test accuracy", title=f"Table 1, {DATA[data]}: every seed, and the mean")
    return {f"images-{data}-figure2": figure2, f"images-{data}-figure3-table1": figure3}


def claims(record: dict[str, Any]) -> Sequence[Claim]:
    """Judge Figures 2 and 3 and Table 1; a difference counts if its 95% interval excludes 0."""
    return [*_figure2(record), *_figure3(record), *_table1(record)]


def _figure2(record: dict[str, Any]) -> Iterator[Claim]:
    results, where = record["results"], _where(record)
    found: dict[str, dict[str, Any]] = {}
    for one, other in (("AdamAL", "Adam"), ("AdamAL", "AMSGrad"), ("AMSGrad", "Adam")):
        found[f"{one} - {other}"] = {
            results["networks"][network]["name"]: _points(methods[one], methods[other])
            for network, methods in results["figure2"].items()
        }

    def words(*pairs: str) -> str:
        parts = (
            f"{pair} on {network} {points:.2f}"
            for pair in pairs
            for network, points in found[pair].items()
        )
        return f"{where}, points of accuracy: " + "; ".join(parts)

    ahead = [
        points for pair in ("AdamAL - Adam", "AdamAL - AMSGrad") for points in found[pair].values()
    ]
    yield Claim(
        "4, figure 2",
        "AdamAL is more accurate than Adam and AMSGrad",
        Verdict.of(all(points.low > 0 for points in ahead)),
        words("AdamAL - Adam", "AdamAL - AMSGrad"),
    )
    gains = found["AdamAL - Adam"].values()
    yield Claim(
        "4, figure 2",
        "AdamAL constantly gains 1% over Adam",
        Verdict.of(all(points.low > 0 and points.mean >= 1 for points in gains)),
        words("AdamAL - Adam"),
    )
    yield Claim(
        "4, figure 2",
        "AMSGrad is less accurate than Adam",
        Verdict.of(all(points.high < 0 for points in found["AMSGrad - Adam"].values())),
        words("AMSGrad - Adam"),
    )


def _figure3(record: dict[str, Any]) -> Iterator[Claim]:
    ranges = {
        name: np.ptp([found["final_accuracy"]["mean"] for found in sizes.values()])
        for name, sizes in record["results"]["figure3"].items()
    }
    sizes = record["settings"]["batch_sizes"]
    yield Claim(
        "4, figure 3",
        "AdamAL is not sensitive to the batch size",
        Verdict.of(ranges["AdamAL"] < POINT),
        f"{_where(record)}: batches of {sizes[0]} to {sizes[-1]} differ in mean accuracy by "
        + ", ".join(f"{100 * ranges[name]:.2f} points with {name}" for name in reversed(ADAMS))
        + " (under 1 counts as not sensitive)",
    )


def _table1(record: dict[str, Any]) -> Iterator[Claim]:
    table = record["results"]["table1"]
    means = {name: 100 * found["final_accuracy"]["mean"] for name, found in table.items()}
    others = [name for name in PAPER_TABLE_1 if name != "AdamAL"]
    ahead = {name: _points(table["AdamAL"], table[name]) for name in others}
    yield Claim(
        "4, table 1",
        "tuned, AdamAL is the most accurate of VSGD, Adam, AMSGrad and AdamAL",
        Verdict.of(all(points.low > 0 for points in ahead.values())),
        f"{_where(record)}, points of accuracy: "
        + "; ".join(f"AdamAL - {name} {points:.2f}" for name, points in ahead.items()),
    )
    printed = ", ".join(f"{name} {accuracy:.2f}" for name, accuracy in PAPER_TABLE_1.items())
    if record["settings"]["data"] != "cifar10":
        yield Claim(
            "4, table 1",
            f"CIFAR-10, in percent: {printed}",
            Verdict.NOT_TESTABLE,
            "CIFAR-10 does not come with the package; `--data FOLDER` runs this experiment on it",
        )
        return
    orders = combinations(PAPER_TABLE_1, 2)
    same_order = all(
        (means[one] > means[other]) == (PAPER_TABLE_1[one] > PAPER_TABLE_1[other])
        for one, other in orders
    )
    yield Claim(
        "4, table 1",
        f"CIFAR-10, in percent: {printed}",
        Verdict.of(same_order),
        "ours, in the same order of methods: "
        + ", ".join(f"{name} {means[name]:.2f}" for name in PAPER_TABLE_1),
    )


def _points(one: dict[str, Any], other: dict[str, Any]) -> Any:
    """Return the difference of two final accuracies in points, with its interval."""
    found = difference(one["final_accuracy"], other["final_accuracy"])
    return type(found)(*(100 * value for value in found))


def _where(record: dict[str, Any]) -> str:
    return f"on {DATA[record['settings']['data']]}"
