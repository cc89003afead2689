"""Which Python `make newest` takes: the newest that works, wherever it is; none is an error."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BROKEN = "#!/bin/sh\necho 'pyenv: command not found'; exit 127\n"  # A shim of pyenv, not set up.
WORKS = f'#!/bin/sh\nexec {sys.executable} "$@"\n'


def make(folder: Path, *arguments: str, **pythons: str) -> subprocess.CompletedProcess[str]:
    """Run `make newest` where there are these Pythons: a script for each path."""
    for path, script in pythons.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(script)
        file.chmod(0o755)
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    for tool in ("make", "find"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    (folder / "Makefile").write_text((ROOT / "Makefile").read_text())
    (folder / "requirements-newest.txt").touch()
    (folder / "adamal_kernels").mkdir()
    (folder / "adamal_kernels" / "build_config.py").touch()
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "PYTH"))}
    environment = {**kept, "PATH": str(tools), "PYENV_ROOT": str(folder / "pyenv")}
    command = [str(tools / "make"), "newest", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_newest_that_works_is_taken(tmp_path: Path) -> None:
    pythons = {
        "bin/python3.14": BROKEN,
        "bin/python3.12": WORKS,
        "pyenv/versions/3.13.1/bin/python3.13": WORKS,
        "pyenv/versions/3.12.4/bin/python3.12": WORKS,
    }
    done = make(tmp_path, "-n", **pythons)
    assert f"{tmp_path}/pyenv/versions/3.13.1/bin/python3.13 -m venv .venv-newest" in done.stdout
    assert done.returncode == 0, done.stderr


def test_none_is_an_error_before_anything_is_downloaded(tmp_path: Path) -> None:
    done = make(tmp_path, **{"bin/python3.13": BROKEN, "bin/python3.11": WORKS})
    assert done.returncode != 0
    assert "no Python 3.12 or newer" in done.stderr
    assert "PYTHON_NEWEST=" in done.stderr
    assert not (tmp_path / ".venv-newest").exists()
