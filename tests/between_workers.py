"""What pytest's workers share, so that only one of them makes it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

IN_WORKER = "PYTEST_XDIST_WORKER" in os.environ


def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of temporary files that all workers of a run have."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if IN_WORKER else folder


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Keep the others from making ``file`` too; who comes later finds it made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_name(f"{file.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
