"""A copy of what a build reads, stand-ins for torch and nvcc, and the means to build it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from typing import Any

from adamal_kernels.build_config import source_files

ROOT = Path(__file__).parents[2]

MODULE = """
#include <Python.h>
static PyModuleDef module{{PyModuleDef_HEAD_INIT, "{name}"}};
PyMODINIT_FUNC PyInit_{name}() {{ return PyModule_Create(&module); }}
"""


# Compiles as C++; knows two architectures; keeps the last arguments for a .cu file.
NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release 12.8, V12.8.93" ;;
  --list-gpu-arch) printf 'compute_80\\ncompute_90\\n' ;;
  *)
    arguments="$*"
    while [ $# -gt 0 ]; do
      case "$1" in
        -I* | -MMD | -c | *.cpp | *.o | -shared) take="$take $1" ;;
        -MF | -o) take="$take $1 $2"; shift ;;
        *.cu) take="$take -x c++ $1"; echo "$arguments" > "$(dirname "$0")/arguments" ;;
      esac
      shift
    done
    exec c++ -fPIC $take ;;
esac
"""


@dataclass
class Wheel:
    """What a build made: a wheel, the extensions in it, its record, and what was said."""

    name: str
    files: list[str]
    modules: list[str]
    extensions: dict[str, dict[str, Any]]
    metadata: Message
    said: str


class Checkout:
    """A copy of what a build reads, and the means to build it."""

    def __init__(self, folder: Path) -> None:
        self.tree = folder / "tree"
        self.stand_ins = folder / "stand_ins"
        self.nvcc = folder / "cuda" / "bin" / "nvcc"
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build.json", ".build-*")
        shutil.copytree(ROOT / "adamal_kernels", self.tree / "adamal_kernels", ignore=ignored)
        for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, self.tree)
        for path in source_files(ROOT / "csrc"):
            copy = self.tree / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text("")
        self.write_sources()

    def write_sources(self, c_source: str = MODULE.format(name="_C")) -> None:
        (self.tree / "csrc" / "bindings.cpp").write_text(c_source)
        (self.tree / "csrc" / "cuda" / "bindings.cpp").write_text(MODULE.format(name="_cuda"))

    def install_nvcc(self) -> None:
        self.nvcc.parent.mkdir(parents=True)
        self.nvcc.write_text(NVCC)
        self.nvcc.chmod(0o755)

    def run(
        self, *arguments: str, torch: dict[str, str], **environment: str
    ) -> subprocess.CompletedProcess[str]:
        shutil.rmtree(self.stand_ins, ignore_errors=True)
        for name, text in torch.items():
            path = self.stand_ins / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("ADAMAL_", "TORCH_"))}
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.tree,
            env=inherited
            | {"PYTHONPATH": str(self.stand_ins), "CUDA_HOME": str(self.nvcc.parents[1])}
            | environment,
            capture_output=True,
            text=True,
        )

    def build(self, torch: dict[str, str], **environment: str) -> Wheel:
        """Build a wheel with setup.py alone."""
        done = self.run("setup.py", "-q", "bdist_wheel", torch=torch, **environment)
        return self.wheel(done)

    def wheel(self, done: subprocess.CompletedProcess[str]) -> Wheel:
        """Take the wheel that a command has left in dist."""
        assert done.returncode == 0, done.stdout + done.stderr
        (path,) = (self.tree / "dist").glob("*.whl")
        with zipfile.ZipFile(path) as archive:
            files = archive.namelist()
            record = json.loads(archive.read("adamal_kernels/_build.json"))
            (metadata,) = (file for file in files if file.endswith(".dist-info/METADATA"))
            parsed = message_from_bytes(archive.read(metadata))
        path.unlink()
        modules = [Path(file).name.split(".")[0] for file in files if file.endswith(".so")]
        said = done.stdout + done.stderr
        return Wheel(path.name, files, sorted(modules), **record, metadata=parsed, said=said)

    def error(self, torch: dict[str, str], **environment: str) -> str:
        """Build, which must fail; return what was said."""
        done = self.run("setup.py", "-q", "bdist_wheel", torch=torch, **environment)
        assert done.returncode != 0, done.stdout + done.stderr
        return done.stderr
