"""What pytest's workers share, so that only one of them makes it."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def is_worker(config: pytest.Config) -> bool:
    """Tell whether this is one of several processes that run the tests."""
    return hasattr(config, "workerinput")


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Keep the others from making ``file`` too; who comes later finds it made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_name(f"{file.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
