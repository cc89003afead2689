"""An experiment's record: what was found, with what settings, where, when and by which command."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from adamal_kernels.bench.report import environment

from .experiment import Experiment

__all__ = ["RESULTS", "file_stem", "new_record", "read_records", "write_record"]

RESULTS = Path(__file__).with_name("results")
"""Where `make paper` writes, and what is committed."""


def new_record(
    experiment: Experiment, results: dict[str, Any], seconds: float, command: str
) -> dict[str, Any]:
    """Return results with everything that has to be known to read them."""
    settings = asdict(experiment)
    where = environment(torch.device(settings.get("device", "cpu")), command)
    for package in ("scikit-learn", "scipy"):
        where["versions"][package] = metadata.version(package)
    where["cores"] = os.cpu_count()
    return {
        "experiment": experiment.name,
        "title": experiment.title,
        "settings": settings,
        "environment": where,
        "seconds": round(seconds, 1),
        "results": results,
    }


def write_record(record: dict[str, Any], folder: Path) -> Path:
    """Write a record into its file in ``folder``; numbers that are not finite become null."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{file_stem(record)}.json"
    text = json.dumps(_finite(record), indent=1, allow_nan=False)
    # A list of numbers takes one line.
    text = re.sub(r"\[[^][{}]*\]", lambda found: "[" + " ".join(found[0][1:-1].split()) + "]", text)
    path.write_text(text + "\n", "utf-8")
    return path


def file_stem(record: dict[str, Any]) -> str:
    """Return the name of a record's file: the experiment's, and that of the data if it has any.

    Example:
        >>> file_stem({"experiment": "images", "settings": {"data": "digits"}})
        'images-digits'
    """
    data = record["settings"].get("data")
    return record["experiment"] + (f"-{data}" if data else "")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        # Six digits tell everything, and keep the file readable.
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the records in ``folder`` by the stem of their file."""
    return {
        path.stem: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))
    }
