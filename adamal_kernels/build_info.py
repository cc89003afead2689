"""What became of the native extensions when they were built, and the import of what was.

They lie in the package's own folder, where pip or ``adamal build`` put them, or where that folder
cannot be written, in :func:`cache_folder`.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import sys
import sysconfig
import threading
from collections.abc import Mapping
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch

from . import build_config
from .version import __version__

__all__ = [
    "PACKAGE",
    "RECORD",
    "ExtensionRecord",
    "build_command",
    "cache_folder",
    "extension_file",
    "extension_record",
    "load_extension",
    "record_in",
    "why_not_importable",
    "why_unfit",
]

RECORD = "_build.json"
"""The file beside the extensions in which every extension has its record."""

PACKAGE = Path(__file__).parent
"""The folder of this copy of the package."""

_loading = threading.Lock()

Name = Literal["_C", "_cuda"]


class ExtensionRecord(NamedTuple):
    """The outcome of building one extension; versions are None where it was not built."""

    name: str
    built: bool
    reason: str = ""
    """Why it was left out, with what would help; empty where it was built."""
    folder: Path | None = None
    """Where it lies; None where it was not built."""
    python: str | None = None
    torch: str | None = None
    """The torch it works with; None for an extension that works with any."""
    compiler: str | None = None
    cuda: str | None = None
    archs: tuple[str, ...] = ()
    """The CUDA architectures it holds code for, such as ``"90"``."""
    sources: str | None = None
    """The digest of what it was made of."""

    @property
    def command(self) -> str:
        """What builds it."""
        return build_command()

    def content(self) -> dict[str, Any]:
        """Return what the file of records holds of it."""
        return {k: v for k, v in self._asdict().items() if k not in ("name", "folder")}

    def __str__(self) -> str:
        if not self.built:
            return f"{self.reason}; to build it, run: {self.command}"
        made_for = [f"Python {self.python}"]
        if self.torch is not None:
            made_for.insert(0, f"torch {self.torch}")
        if self.archs:
            made_for.append(", ".join(f"sm_{arch}" for arch in self.archs))
        return f"built for {', '.join(made_for)} by {self.compiler}, in {self.folder}"


def build_command() -> str:
    """Return what builds the extensions of this copy of the package."""
    return "python -m adamal_kernels build" if _is_source_tree() else "adamal build"


def cache_folder() -> Path:
    """Return where extensions of these sources for this torch and Python go, if not here.

    ``$XDG_CACHE_HOME/adamal_kernels``, by default ``~/.cache/adamal_kernels``, has a folder for
    every version, digest of the sources, torch, Python and platform.

    Raises:
        OSError: the sources cannot be read.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    digest = build_config.sources_digest(build_config.source_folder(PACKAGE))
    key = f"{__version__}-{digest[:16]}-{build_config.build_key()}"
    return Path(base, "adamal_kernels", key)


def extension_file(name: str) -> str:
    """Return the name of an extension's file.

    Example:
        >>> extension_file("_C").startswith("_C.")
        True
    """
    return name + sysconfig.get_config_var("EXT_SUFFIX")


def extension_record(name: Name) -> ExtensionRecord:
    """Return what was recorded of the extension that would be imported, or why there is none.

    Example:
        >>> extension_record("_C").name
        '_C'
    """
    own = record_in(PACKAGE, name)
    if own.built and why_unfit(own) is None:
        return own
    try:
        cached = record_in(cache_folder(), name)
    except OSError:  # Without sources nothing can have been built of them.
        return own
    return cached if cached.built else own


def load_extension(name: Name) -> ModuleType:
    """Return the extension ``name``, imported from where it was built.

    Raises:
        ImportError: it was not built, was built for another torch or Python, or does not load.
    """
    full_name = f"{__package__}.{name}"
    with _loading:
        if module := sys.modules.get(full_name):
            return module
        record = extension_record(name)
        if not record.built:
            raise ImportError(f"{full_name} was not built: {record}")
        if reason := why_unfit(record):
            raise ImportError(f"{full_name} {reason}")
        spec = spec_from_file_location(full_name, record.folder / extension_file(name))
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[full_name] = module
        return module


def why_not_importable(name: Name) -> str | None:
    """Return why an extension cannot be imported, with the remedy; None if it can be.

    Example:
        >>> reason = why_not_importable("_C")  # None where the cpu backend can run
    """
    if f"{__package__}.{name}" in sys.modules:
        return None
    record = extension_record(name)
    module = f"{__package__}.{name}"
    if not record.built:
        return f"{module} was not built: {record}"
    remedy = f"to build it, run: {build_command()}"
    if reason := why_unfit(record):
        return f"{module} {reason}; {remedy}"
    try:
        load_extension(name)
    except Exception as error:
        return f"{module} was built but cannot be imported ({error}); {remedy}"
    return None


def record_in(folder: Path, name: str) -> ExtensionRecord:
    """Return the record of an extension that was built into ``folder``."""
    path = folder / RECORD
    try:
        found: Mapping[str, Any] = json.loads(path.read_text())["extensions"][name]
        values = {**found, "archs": tuple(found.get("archs", ()))}
        return ExtensionRecord(name, folder=folder if found["built"] else None, **values)
    except FileNotFoundError:
        reason = "nothing was built here"
        if folder == PACKAGE and _is_source_tree():
            reason = "the package is used from a source tree in which nothing was built"
            if copy := _installed_copy(name):
                reason += (
                    f"; a built copy is installed at {copy}: to use it, run outside of this tree, "
                    "or `adamal` in place of `python -m adamal_kernels`; to have both in one, "
                    "pip install --no-build-isolation -e ."
                )
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"its build record {path} is unreadable ({error})"
    return ExtensionRecord(name, built=False, reason=reason)


def _is_source_tree() -> bool:
    sources = build_config.source_folder(PACKAGE)
    return sources.parent != PACKAGE and sources.is_dir()


def _installed_copy(name: str) -> Path | None:
    """Return another copy of the package that Python would find, and whose extension fits."""
    for entry in sys.path:
        folder = Path(entry, PACKAGE.name)
        if folder.resolve() != PACKAGE.resolve():
            record = record_in(folder, name)
            if record.built and why_unfit(record) is None:
                return folder
    return None


def why_unfit(record: ExtensionRecord) -> str | None:
    """Return why what was built is not for this process, or None."""
    sources = build_config.source_folder(PACKAGE)
    # Those of an installed copy do not change.
    if _is_source_tree() and record.sources not in (None, _sources_digest(sources)):
        return f"was built of other sources than those in {sources}"
    for what, built_for, here in (
        ("Python", record.python, platform.python_version()),
        ("torch", record.torch, torch.__version__),
    ):
        if built_for is not None and _series(built_for) != _series(here):
            return f"was built for {what} {built_for}, and this is {what} {here}"
    return None


@functools.cache
def _sources_digest(sources: Path) -> str:
    return build_config.sources_digest(sources)


def _series(version: str) -> list[str]:
    """Return the part of a version within which extensions stay compatible.

    Major and minor of a release; a development version is compatible with itself alone.
    """
    release = version.split("+")[0]
    return [release] if "dev" in release else release.split(".")[:2]
