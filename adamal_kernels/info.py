"""What can run here, and why the rest cannot."""

from __future__ import annotations

import platform
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .backends import BACKENDS
from .build_info import extension_record
from .verify import places
from .version import __version__

__all__ = ["collect", "report"]


def collect() -> dict[str, Any]:
    """Return versions, devices, the extensions' build records, and each backend's state.

    Example:
        >>> collect()["backends"]["reference"]["cpu"]
        'usable'
    """
    devices = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
    backends: dict[str, dict[str, str]] = {name: {} for name in BACKENDS}
    for name, device in places(BACKENDS):
        backends[name][str(device)] = BACKENDS[name].unavailable(device) or "usable"
    return {
        "versions": {
            "adamal_kernels": __version__,
            "torch": torch.__version__,
            "triton": _triton_version(),
            "python": platform.python_version(),
            "cuda of torch": torch.version.cuda or "none",
        },
        "devices": devices,
        "extensions": {name: str(extension_record(name)) for name in ("_C", "_cuda")},
        "backends": backends,
    }


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    return str(triton.__version__)


def report(found: dict[str, Any], console: Console) -> None:
    """Print what :func:`collect` found."""
    for title in ("versions", "devices", "extensions"):
        table = Table(title=title, title_justify="left", show_header=False)
        for name, value in found[title].items():
            table.add_row(name, value)
        console.print(table)
    table = Table("backend", "tensors on", "", title="backends", title_justify="left")
    for name, states in found["backends"].items():
        for device, state in states.items():
            table.add_row(name, device, "[green]usable[/green]" if state == "usable" else state)
    console.print(table)
