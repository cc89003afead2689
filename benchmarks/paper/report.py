"""Tables, plots and the summary of the records in a folder, made from nothing but their JSON."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from rich.console import Console

from .catalogue import in_order
from .record import read_records
from .summary import summary_table, write_summary

__all__ = ["report"]


def report(names: Collection[str], folder: Path, console: Console) -> None:
    """Print and draw the experiments ``names``; judge all whose records lie in ``folder``."""
    for experiment, record in in_order(read_records(folder)):
        if experiment.name not in names:
            continue
        for table in experiment.tables(record):
            console.print(table)
        for name, figure in experiment.draw(record).items():
            figure.savefig(folder / f"{name}.png")
    console.print(summary_table(write_summary(folder)))
    console.print(f"Records, plots and summary.md: {os.path.relpath(folder)}")
