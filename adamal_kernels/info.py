"""What can run here, and why the rest cannot."""

from __future__ import annotations

import argparse
import platform
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from .backends import BACKENDS, automatic_order
from .build_info import extension_record
from .command_line import JsonOutput, add_json, check_file, print_table
from .verify import places
from .version import __version__

__all__ = ["add_arguments", "collect", "main", "report"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``info``."""
    add_json(parser)


def main(chosen: argparse.Namespace, console: Console) -> int:
    """Print what :func:`collect` returns, and write it; return the exit status, 0."""
    check_file(chosen.parser, "--json", chosen.json)
    found = collect()
    report(found, console)
    JsonOutput(chosen.json, lambda: found).finish()
    return 0


def collect() -> dict[str, Any]:
    """Return versions, devices, the extensions' build records, and each backend's state.

    ``"auto"`` has, by type of device, what ``backend="auto"`` takes, and why that is not the
    first choice.

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
        "auto": {
            device.type: _automatic(device)
            for device in (torch.device("cpu"), torch.device("cuda", 0))
        },
    }


def _automatic(device: torch.device) -> dict[str, str | None]:
    """Return the backend that tensors on ``device`` get, and why it is not the first choice."""
    if device.type == "cuda" and not torch.cuda.is_available():
        reason = "torch finds no usable CUDA device (torch.cuda.is_available() is False)"
        return {"backend": None, "because": reason}
    reasons = []
    for name in automatic_order(device.type):
        reason = BACKENDS[name].unavailable(device)
        if reason is None:
            return {"backend": name, "because": "; ".join(reasons)}
        reasons.append(f"{name}: {reason}")
    return {"backend": None, "because": "; ".join(reasons)}


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    return str(triton.__version__)


def report(found: dict[str, Any], console: Console) -> None:
    """Print what :func:`collect` found."""
    for title in ("versions", "devices", "extensions"):
        rows = [[name, escape(value)] for name, value in found[title].items()]
        print_table(console, title, ["", ""], rows, wrapped=1)
    rows = [
        [name, device, "[green]usable[/green]" if state == "usable" else escape(state)]
        for name, states in found["backends"].items()
        for device, state in states.items()
    ]
    print_table(console, "backends", ["backend", "tensors on", ""], rows, wrapped=2)
    for device_type, choice in found["auto"].items():
        because = f", because {choice['because']}" if choice["because"] else ""
        line = f"{device_type.upper()} tensors: {choice['backend'] or 'none'}{because}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
