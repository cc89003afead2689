"""Results as JSON lines: each is on the disk before the next thing begins."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

__all__ = ["append", "read"]


def append(path: Path, section: str, **values: Any) -> None:
    """Add a line to ``path``; many processes may, each line is one write.

    Args:
        path: the file, created where it is missing.
        section: the section it belongs to.
        values: what JSON can say. ``failed=True`` makes the section one that failed.
    """
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "section": section, **values}
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, (json.dumps(line) + "\n").encode())
        os.fsync(file)
    finally:
        os.close(file)


def read(path: Path, begin: int = 0) -> list[dict[str, Any]]:
    """Return the lines of ``path`` from byte ``begin`` on."""
    with path.open("rb") as file:
        file.seek(begin)
        return [json.loads(line) for line in file]
