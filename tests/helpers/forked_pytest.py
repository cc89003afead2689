"""Runs pytest in processes forked from one that has imported torch, which takes seconds.

This imports nothing of the package: every run takes the copy that lies in its own folder.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "pytest",
        "hypothesis",
        "torch",
        "torch._dynamo",  # which the first step of an optimizer imports
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "torch.distributed.optim",
        "torch.distributed.tensor.parallel",
    ]
)


def run_pytest(folder: Path, selection: Sequence[str]) -> tuple[int | None, str]:
    """Run this repository's tests ``selection`` in ``folder``, on the package that lies there.

    Returns:
        Pytest's exit status and what it printed.
    """
    process = CONTEXT.Process(target=_run, args=(folder, selection))
    process.start()
    process.join()
    return process.exitcode, (folder / "pytest.log").read_text()


def _run(folder: Path, selection: Sequence[str]) -> None:
    import pytest  # already there

    os.chdir(folder)
    with open("pytest.log", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    assert "adamal_kernels" not in sys.modules, "another copy is already there"
    sys.path.insert(0, str(folder))
    options = ["-x", "-q", "-p", "no:cacheprovider", "--basetemp", str(folder / "tmp")]
    config = ["-c", str(ROOT / "pyproject.toml")]
    sys.exit(pytest.main([*config, *options, *(str(ROOT / test) for test in selection)]))
