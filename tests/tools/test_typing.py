"""A typed user's script is right for mypy and for pyright, and runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from adamal_kernels import BackendName
from adamal_kernels.backends import BACKENDS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "helpers" / "typed_user_script.py"


def run(*arguments: str, folder: Path) -> None:
    """Run a Python program in ``folder``, with the package where a user has it: installed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MYPYPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_script_runs(tmp_path: Path) -> None:
    run("-W", "error", str(SCRIPT), folder=tmp_path)


def test_mypy_agrees(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    # torch's own backward() is untyped; errors within the package are not the user's.
    options = ("--strict", "--allow-untyped-calls", "--follow-imports=silent")
    run("-m", "mypy", *options, str(SCRIPT), folder=tmp_path)


def test_pyright_agrees(tmp_path: Path) -> None:
    pytest.importorskip("basedpyright")
    settings = {
        "include": [str(SCRIPT)],
        "extraPaths": [str(ROOT)],
        "typeCheckingMode": "standard",  # pyright's own; basedpyright only brings it with node.
        "reportUnnecessaryTypeIgnoreComment": "error",
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    run("-m", "basedpyright", "--pythonpath", sys.executable, folder=tmp_path)


def test_every_backend_has_its_literal() -> None:
    assert get_args(BackendName) == ("auto", *BACKENDS)
