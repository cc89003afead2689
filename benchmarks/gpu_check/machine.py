"""What the GPU machine is: ``python -m benchmarks.gpu_check.machine`` prints it as JSON."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["PLANNED", "Machine", "NoGpuError", "probe"]

_WANTED = ("numpy", "rich", "triton", "pybind11", "ninja", "pytest")
_USEFUL = ("hypothesis", "expecttest", "matplotlib")
_MOST_WORKERS = 12
_GIB_A_WORKER = 3
"""A process's context, what torch keeps, and the tests' tensors."""


class NoGpuError(Exception):
    """Why there is nothing to check here."""


@dataclass(frozen=True)
class Machine:
    """What the sections depend on, and what a reader of their results asks."""

    device: str
    """The GPU's name as part of a file's."""
    arch: str
    """Its compute capability, such as ``"9.0"``."""
    workers: int
    """Processes that share it."""
    gpu: str = ""
    driver: str = ""
    versions: tuple[tuple[str, str], ...] = ()
    missing: tuple[str, ...] = ()
    """Packages and programs that are not there, with what needs them."""


PLANNED = Machine("DEVICE", "ARCH", _MOST_WORKERS)
"""Where none is there yet."""


def probe(python: Sequence[str]) -> Machine:
    """Return what ``python`` finds; in a process of its own, whose memory on the GPU is released.

    Raises:
        NoGpuError: it has no GPU that torch can use.
    """
    command = [*python, "-m", "benchmarks.gpu_check.machine"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise NoGpuError(lines[-1])
    found = json.loads(done.stdout.splitlines()[-1])
    return Machine(
        **{name: tuple(v) if isinstance(v, list) else v for name, v in found.items()},
    )


def _look() -> Machine:
    import torch

    if not torch.cuda.is_available() or torch.version.hip is not None:
        raise NoGpuError(f"torch {torch.__version__} finds no NVIDIA GPU")
    properties = torch.cuda.get_device_properties(0)
    free, total = (amount / 2**30 for amount in torch.cuda.mem_get_info(0))
    missing = [
        f"{name} ({what})"
        for names, what in ((_WANTED, "needed"), (_USEFUL, "what needs it is left out"))
        for name in names
        if importlib.util.find_spec(name) is None
    ]
    driver = "nvidia-smi was not found"
    if smi := shutil.which("nvidia-smi"):
        query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True)
        driver = done.stdout.splitlines()[0] if done.stdout else done.stderr.strip()
    else:
        missing.append("nvidia-smi (the driver's version)")
    return Machine(
        device=re.sub(r"[^a-z0-9]+", "-", properties.name.lower()).strip("-"),
        arch=f"{properties.major}.{properties.minor}",
        workers=max(1, min(_MOST_WORKERS, (os.cpu_count() or 1) - 1, int(free / _GIB_A_WORKER))),
        gpu=f"{properties.name}, {free:.0f} of {total:.0f} GiB free",
        driver=driver,
        versions=(
            ("python", platform.python_version()),
            ("torch", torch.__version__),
            ("cuda of torch", str(torch.version.cuda)),
        ),
        missing=tuple(missing),
    )


if __name__ == "__main__":
    try:
        print(json.dumps(asdict(_look())))
    except Exception as error:
        print(f"{error}", file=sys.stderr)
        sys.exit(2)
