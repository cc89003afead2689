"""What became of the native extensions when the package was built, and whether they import."""

from __future__ import annotations

import json
import platform
import sys
from importlib import import_module
from pathlib import Path
from typing import Literal, NamedTuple

import torch

__all__ = ["ExtensionRecord", "extension_record", "why_not_importable"]

_RECORD = Path(__file__).with_name("_build.json")  # Written by setup.py.


class ExtensionRecord(NamedTuple):
    """The outcome of building one extension; versions are None where it was not built."""

    name: str
    built: bool
    reason: str
    """Why it was left out, with what would help; empty where it was built."""
    command: str
    """What builds it, run in the source tree, in an environment that has torch and setuptools."""
    python: str | None = None
    torch: str | None = None
    """The torch it works with; None for an extension that works with any."""
    compiler: str | None = None
    cuda: str | None = None
    archs: tuple[str, ...] = ()
    """The CUDA architectures it holds code for, such as ``"90"``."""


def extension_record(name: Literal["_C", "_cuda"]) -> ExtensionRecord:
    """Return what was recorded of an extension at build time.

    Example:
        >>> extension_record("_C").name
        '_C'
    """
    try:
        content = json.loads(_RECORD.read_text())
        record = {"reason": "", **content["extensions"][name], "command": content["command"]}
        record["archs"] = tuple(record.get("archs", ()))
        return ExtensionRecord(name, **record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return ExtensionRecord(
            name,
            built=False,
            reason="the package is used from a source tree in which nothing was built"
            if isinstance(error, FileNotFoundError)
            else f"its build record {_RECORD} is unreadable ({error})",
            command="python setup.py build_ext --inplace",
        )


def why_not_importable(name: Literal["_C", "_cuda"]) -> str | None:
    """Return why an extension cannot be imported, with the remedy; None if it can be.

    Example:
        >>> reason = why_not_importable("_C")  # None where the cpu backend can run
    """
    module = f"{__package__}.{name}"
    if module in sys.modules:
        return None
    record = extension_record(name)
    remedy = f"in the source tree, with torch and setuptools installed, run: {record.command}"
    if not record.built:
        return f"{module} was not built: {record.reason}; then, {remedy}"
    for what, built_for, here in (
        ("Python", record.python, platform.python_version()),
        ("torch", record.torch, torch.__version__),
    ):
        if built_for is not None and _series(built_for) != _series(here):
            return f"{module} was built for {what} {built_for}, and this is {what} {here}; {remedy}"
    try:
        import_module(module)
    except Exception as error:
        return f"{module} was built but cannot be imported ({error}); {remedy}"
    return None


def _series(version: str) -> list[str]:
    """Return the part of a version within which extensions stay compatible: major and minor."""
    return version.split(".")[:2]
