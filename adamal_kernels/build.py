"""``adamal build``: compiles the extensions for the torch at hand, from the installed sources.

They go into the package's folder, or where that cannot be written, into the user's cache
(:func:`adamal_kernels.build_info.cache_folder`). Nothing is downloaded. It takes a C++ compiler
and Python's headers; nvcc for CUDA.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import build_config, build_info

__all__ = ["add_arguments", "main"]

_LAST_LINES = 20
"""How much of the log is shown after a failure."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``adamal build`` to its parser."""
    parser.description = (
        "Compile the C++ extension and, given nvcc and a CUDA build of torch, the CUDA extension "
        "for the torch at hand, into the package's folder or, where that cannot be written, into "
        "the user's cache. ADAMAL_BUILD=cpu or cuda makes a missing one an error; CXX, CUDA_HOME, "
        "ADAMAL_CUDA_ARCHS and MAX_JOBS are read. Exit status: 0; 1 if something that should have "
        "been built was not."
    )
    parser.add_argument(
        "--all-archs",
        action="store_true",
        help="compile CUDA for every architecture that is served, not for the GPUs here alone",
    )
    parser.add_argument("--force", action="store_true", help="build again what is there")


def main(chosen: argparse.Namespace, console: Console) -> int:
    """Build, and return the exit status."""
    try:
        return _build(chosen, console)
    except build_config.CannotBuildError as error:
        _say(console, f"Cannot build: {error}")
    except OSError as error:
        _say(
            console,
            f"Cannot build: {error}; extensions go into {build_info.PACKAGE}, else below "
            "XDG_CACHE_HOME, and temporary files below TMPDIR: make one of each writable",
        )
    except KeyboardInterrupt:
        _say(console, "Interrupted; nothing has changed")
        return 130
    return 1


def _build(chosen: argparse.Namespace, console: Console) -> int:
    sources = build_config.source_folder(build_info.PACKAGE)
    if not sources.is_dir():
        raise build_config.CannotBuildError(f"{sources} is missing; install the package again")
    with _archs(all_of_them=chosen.all_archs):
        extensions, records = build_config.configure(sources)
    for name, record in records.items():
        if not record["built"]:
            if name == "_C":  # Every compiled backend needs it.
                raise build_config.CannotBuildError(record["reason"])
            _say(console, f"{name} is left out: {record['reason']}")
    if not chosen.force:
        extensions = [made for made in extensions if not _is_there(made.name, records[made.name])]
    if not extensions:
        _say(console, "Everything else is there already; --force builds it again")
        return 0

    begin = time.monotonic()
    folder = _writable_folder()
    archs = [f"sm_{arch}" for made in extensions for arch in made.record.get("archs", ())]
    _say(
        console,
        f"Compiling {' and '.join(made.name for made in extensions)} for torch "
        f"{torch.__version__} and Python {platform.python_version()}"
        + (f", {', '.join(archs)}" if archs else "")
        + f": about {sum(map(_cpu_minutes, extensions))} CPU minutes, {build_config.jobs()} files "
        "at a time",
    )
    handle, log_file = tempfile.mkstemp(prefix="adamal-build-", suffix=".log", text=True)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(handle, "w", encoding="utf-8"))
        if folder == build_info.PACKAGE != sources.parent:  # A source tree keeps its objects.
            objects = build_config.objects_folder(sources.parent)
        else:
            objects = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="adamal-build-")))
        new = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder, prefix=".build-")))
        failures = build_config.compile_extensions(
            extensions,
            sources,
            objects,
            lambda name: new / build_info.extension_file(name),
            report=lambda line: _say(console, line),
            log=log,
        )
        for made in extensions:
            if made.name not in failures and not _loads(new, made.name, log):
                failures[made.name] = "it does not load"
        for name, failure in failures.items():
            records[name] = {"built": False, "reason": f"{failure} (see {log_file})"}
        built = {made.name for made in extensions} - failures.keys()
        _put_in_place(new, folder, records, built, build_config.sources_digest(sources))
    if failures:
        for line in Path(log_file).read_text("utf-8").splitlines()[-_LAST_LINES:]:
            _say(console, line)
        for name, failure in failures.items():
            _say(console, f"{name} was not built: {failure}; all output is in {log_file}")
        return 1
    os.unlink(log_file)
    _say(console, f"Built in {time.monotonic() - begin:.0f} s, into {folder}")
    return 0


def _cpu_minutes(made: build_config.Extension) -> int:
    return build_config.CPU_MINUTES[made.name] * len(made.record.get("archs", [""]))


def _say(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, markup=False, highlight=False)


@contextlib.contextmanager
def _archs(*, all_of_them: bool) -> Iterator[None]:
    """Choose the architectures: the user's, else those of the GPUs here, else all we serve."""
    variables = ("ADAMAL_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST")
    before = {name: os.environ[name] for name in variables if name in os.environ}
    if all_of_them:
        for name in before:
            del os.environ[name]
    elif not any(value.strip() for value in before.values()) and torch.cuda.is_available():
        os.environ[variables[0]] = "native"
    try:
        yield
    finally:
        os.environ.pop(variables[0], None)
        os.environ.update(before)


def _is_there(name: str, wanted: dict[str, Any]) -> bool:
    """Return whether just this has been built, and imports."""
    found = build_info.extension_record(name)._asdict()
    found["archs"] = list(found["archs"])
    same = all(found[key] == value for key, value in wanted.items())
    return same and build_info.why_not_importable(name) is None


def _writable_folder() -> Path:
    """Return where extensions go."""
    try:
        with tempfile.TemporaryFile(dir=build_info.PACKAGE):
            return build_info.PACKAGE
    except OSError:
        folder = build_info.cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def _loads(folder: Path, name: str, log: Any) -> bool:
    """Return whether an extension loads: in another process, which a bad one may end."""
    program = (
        "import sys, torch\n"
        "from importlib.util import module_from_spec, spec_from_file_location\n"
        "spec = spec_from_file_location(*sys.argv[1:])\n"
        "spec.loader.exec_module(module_from_spec(spec))\n"
    )
    file = folder / build_info.extension_file(name)
    command = [sys.executable, "-c", program, f"{__package__}.{name}", str(file)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log.write(done.stdout)
    log.flush()
    return done.returncode == 0


def _put_in_place(
    new: Path, folder: Path, records: dict[str, dict[str, Any]], built: set[str], digest: str
) -> None:
    """Move what was built into its folder, a whole file at a time, and the record last."""
    if not built:
        return
    content = {}
    for name, record in records.items():
        file = build_info.extension_file(name)
        there = build_info.record_in(folder, name)
        if name in built:
            os.replace(new / file, folder / file)
            content[name] = record
        elif there.built and there.sources == digest and build_info.why_unfit(there) is None:
            content[name] = there.content()
        elif record["built"]:
            content[name] = {"built": False, "reason": f"it is in {build_info.PACKAGE}"}
        else:
            content[name] = record
    (new / build_info.RECORD).write_text(json.dumps({"extensions": content}, indent=2) + "\n")
    os.replace(new / build_info.RECORD, folder / build_info.RECORD)
    if folder == build_info.PACKAGE:
        _list_for_uninstalling([build_info.extension_file(name) for name in built])


def _list_for_uninstalling(files: list[str]) -> None:
    """Add files of the package's folder to the list of those that pip installed and removes."""
    package = build_info.PACKAGE
    try:
        distribution = importlib.metadata.distribution("adamal-kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    if Path(distribution.locate_file(package.name)).resolve() != package.resolve():
        return  # Another copy, or an editable installation.
    listed = {str(path): path for path in distribution.files or ()}
    record = next((path for path in listed.values() if path.name == "RECORD"), None)
    missing = [f"{package.name}/{file}" for file in files if f"{package.name}/{file}" not in listed]
    if record is not None and missing:
        with open(record.locate(), "a", encoding="utf-8") as file:
            file.writelines(f"{name},,\n" for name in missing)
