"""The programs of the native harness, and their compilation.

Each runs some of the kernels, so that a fault in these asks for no more than that to be compiled.
The kernels are those of ``csrc``, or of the folder that ``ADAMAL_TEST_CSRC`` names.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from helpers.between_workers import locked

ROOT = Path(__file__).resolve().parents[2]
CSRC = Path(os.environ.get("ADAMAL_TEST_CSRC", ROOT / "csrc")).resolve()
NATIVE = ROOT / "tests" / "native"
BUILD_DIR = ROOT / "build" / "native_harness"

# Not optimised: most of the time goes into building.
COMMON_FLAGS = ("-std=c++17", "-O0", "-Wall", "-Wextra", "-ffp-contract=off")
SANITIZER_FLAGS = (
    "-g1",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
)


class BuildError(RuntimeError):
    """The harness does not compile, which says nothing of what the kernels do."""


class Command(IntEnum):
    """What the harness can be asked; the codes of ``Command`` in ``harness.h``."""

    INFO = 0
    DECODE = 1
    ENCODE = 2
    SCALARS = 3
    STEP_CPU = 4
    STEP_CUDA = 5
    STEP_ON_DEVICE = 6
    NORM_CPU = 7
    NORM_CUDA = 8
    WATCHED_CPU = 9
    WATCHED_CUDA = 10
    WATCHED_ON_DEVICE = 11
    PROJECT_SERIALLY = 12
    PROJECT_CPU = 13
    PROJECT_CUDA = 14


@dataclass(frozen=True)
class Program:
    """A program of the harness."""

    source: str
    """In ``tests/native``."""
    commands: tuple[Command, ...]
    kernels: tuple[str, ...] = ()
    """Sources that it is linked with, by their paths from ``csrc``."""


PROGRAMS = {
    command: program
    for program in (
        Program("values", (Command.INFO, Command.DECODE, Command.ENCODE, Command.SCALARS)),
        Program("steps_cpu", (Command.STEP_CPU,), ("cpu/step",)),
        Program("steps_cuda", (Command.STEP_CUDA,)),
        Program("steps_on_device", (Command.STEP_ON_DEVICE,)),
        Program("norms", (Command.NORM_CPU, Command.NORM_CUDA), ("cpu/norm",)),
        Program(
            "watched_steps",
            (Command.WATCHED_CPU, Command.WATCHED_CUDA, Command.WATCHED_ON_DEVICE),
            ("cpu/step",),
        ),
        Program(
            "projections_cpu",
            (Command.PROJECT_SERIALLY, Command.PROJECT_CPU),
            ("cpu/projection", "cpu/step"),
        ),
        Program("projections_cuda", (Command.PROJECT_CUDA,)),
    )
    for command in program.commands
}


def built(program: Program, csrc: Path, *, sanitize: bool, build_dir: Path) -> Path:
    """Return the executable, having built it unless the same one has been built before."""
    compiler = os.environ.get("CXX", "g++")
    flags = (*COMMON_FLAGS, *(SANITIZER_FLAGS if sanitize else ()))
    sources = [NATIVE / f"{program.source}.cpp"]
    sources += [csrc / f"{name}.cpp" for name in program.kernels]
    digest = hashlib.sha256(repr((compiler, flags)).encode())
    for folder in (NATIVE, csrc):
        for path in sorted(folder.rglob("*.h")):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    for path in sources:
        digest.update(path.read_bytes())
    executable = build_dir / f"{program.source}-{digest.hexdigest()[:16]}"
    with locked(executable):
        if not executable.exists():
            _compile([compiler, *flags, f"-I{csrc}"], sources, executable)
    return executable


def _compile(command: list[str], sources: Sequence[Path], executable: Path) -> None:
    with tempfile.TemporaryDirectory(dir=executable.parent) as folder:
        objects = [f"{folder}/{number}.o" for number in range(len(sources))]
        compilers = [
            subprocess.Popen(
                [*command, "-c", str(source), "-o", target],
                stderr=subprocess.PIPE,
                text=True,
            )
            for source, target in zip(sources, objects, strict=True)
        ]
        errors = [compiler.communicate()[1] for compiler in compilers]
        if any(compiler.returncode for compiler in compilers):
            raise BuildError("".join(errors))
        linked = f"{folder}/harness"
        subprocess.run([*command, *objects, "-o", linked], check=True)
        shutil.move(linked, executable)
