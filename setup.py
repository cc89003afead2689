"""Builds the extensions that can be built here, and records what became of each.

``ADAMAL_BUILD`` names the native backends to build: ``cpu``, ``cuda`` or both with a comma
between them, or ``none``. A backend it names that cannot be built is an error. Unset, everything
that can be built is, and the rest is left out with a message: the package works without it.

``ADAMAL_CUDA_ARCHS``, else ``TORCH_CUDA_ARCH_LIST``, sets the CUDA architectures ("8.0;9.0").
``ADAMAL_CUDA_ARCHS=native`` means those of the GPUs that torch finds here.
``CXX`` and ``CUDA_HOME`` choose the compilers, ``MAX_JOBS`` how many C++ files compile at a time.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any, ClassVar

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except Exception as error:  # Absent, or there and broken: the pure-Python part needs neither.
    torch = None
    torch_error = f"{type(error).__name__}: {error}"
    BuildExtension = build_ext

PACKAGE = "adamal_kernels"
HEADERS = sorted(map(str, Path("csrc").glob("*.h")))
SOURCES = {
    "_C": [
        "csrc/bindings.cpp",
        "csrc/norm_cpu.cpp",
        "csrc/plan.cpp",
        "csrc/plan_triton.cpp",
        "csrc/projection_cpu.cpp",
        "csrc/sharded_class.cpp",
        "csrc/steady_groups.cpp",
        "csrc/steady_members.cpp",
        "csrc/steady_sharded.cpp",
        "csrc/steady_state.cpp",
        "csrc/step_cpu.cpp",
    ],
    "_cuda": [
        "csrc/bindings_cuda.cpp",
        "csrc/norm_cuda.cu",
        "csrc/projection_cuda.cu",
        "csrc/scalars_cuda.cu",
        "csrc/step_cuda.cu",
        "csrc/watched_step_cuda.cu",
    ],
}
# What each backend consists of: the steps on CUDA are planned by _C.
BACKENDS = {"cpu": ("_C",), "cuda": ("_C", "_cuda"), "none": ()}

# The operations of an element are rounded one by one, as on every backend: no fused multiply-add,
# no approximate division or root. errno and traps change no value, and hinder vectorisation.
CXX_FLAGS = "-O3 -g0 -ffp-contract=off -fno-math-errno -fno-trapping-math -fvisibility=hidden"
NVCC_FLAGS = (
    "-std=c++17 -O3 -fmad=false -prec-div=true -prec-sqrt=true -ftz=false --threads=0 "
    "-shared -cudart=static -Xcompiler=-fPIC,-ffp-contract=off,-fvisibility=hidden"
)
# Each takes as long to compile as any other: 7.5 has no other way, and 12.0 would wait for the
# driver to compile the PTX in every new environment. The PTX is the last one's: 10.0's runs on all
# that are newer, which 12.0's does not on 11.0.
CUDA_ARCHS = ("75", "80", "90", "120", "100")
OLDEST_CUDA = (12, 1)


class CannotBuildError(Exception):
    """Why an extension cannot be built here, and what would help."""


class CudaExtension(Extension):
    """An extension that one nvcc command compiles and links."""

    def __init__(self, name: str, sources: list[str], command: list[str]) -> None:
        super().__init__(name, sources, depends=HEADERS)
        self.command = command


def requested_extensions() -> set[str] | None:
    """Return the extensions that ADAMAL_BUILD asks for; None where it leaves the choice."""
    value = os.environ.get("ADAMAL_BUILD", "").strip()
    if not value:
        return None
    names = [name.strip() for name in value.split(",")]
    if not set(names) <= BACKENDS.keys() or ("none" in names and len(names) > 1):
        raise SystemExit(
            f"ADAMAL_BUILD={value!r} is not understood: set it to cpu, cuda, cpu,cuda or none, or "
            "leave it unset to build whatever can be built"
        )
    return {extension for name in names for extension in BACKENDS[name]}


def require_torch() -> None:
    """Check that the Python that builds has torch."""
    if torch is None:
        raise CannotBuildError(
            f"torch could not be imported by the build ({torch_error}); pip builds in an "
            "environment without torch unless --no-build-isolation is given"
        )


def find_cxx() -> list[str]:
    """Return the command of the C++ compiler."""
    command = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(command[0]) is None:
        raise CannotBuildError(
            f"the C++ compiler {command[0]!r} was not found; install g++ (on Debian and Ubuntu: "
            "apt-get install g++), or set CXX to a compiler that is there"
        )
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise CannotBuildError(
            "Python's own headers (Python.h) were not found; install them (on Debian and Ubuntu: "
            "apt-get install python3-dev)"
        )
    return command


def find_nvcc() -> str:
    """Return the path of nvcc."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    for candidate in candidates:
        if nvcc := shutil.which(candidate):
            return nvcc
    raise CannotBuildError(
        f"nvcc was not found (looked for {' and '.join(candidates)}); install the CUDA toolkit and "
        "put nvcc on PATH, or set CUDA_HOME to the toolkit's folder"
    )


def output_of(*command: str) -> str:
    """Return what a command prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def cuda_archs(nvcc: str, cuda: str) -> list[str]:
    """Return the architectures to compile for: those set by the user, else ours."""
    supported = re.findall(r"compute_(\d+)", output_of(nvcc, "--list-gpu-arch"))
    for variable in ("ADAMAL_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"):
        value = os.environ.get(variable, "").strip()
        if not value:
            continue
        if variable == "ADAMAL_CUDA_ARCHS" and value == "native":
            value = native_archs()
        archs = [word.removesuffix("+PTX").replace(".", "") for word in re.split(r"[\s,;]+", value)]
        if unknown := [arch for arch in archs if arch.rstrip("af") not in supported]:
            raise CannotBuildError(
                f"nvcc {cuda} does not compile for {', '.join(unknown)} ({variable}={value!r}); "
                f"set ADAMAL_CUDA_ARCHS to some of {', '.join(supported)}"
            )
        return archs
    return [arch for arch in CUDA_ARCHS if arch in supported]


def native_archs() -> str:
    """Return the compute capabilities of the GPUs that torch finds here."""
    if not torch.cuda.is_available():
        raise CannotBuildError(
            "ADAMAL_CUDA_ARCHS=native means the GPUs of this machine, and torch finds none "
            "(torch.cuda.is_available() is False); name their compute capabilities instead, such "
            'as ADAMAL_CUDA_ARCHS="9.0"'
        )
    capabilities = {
        torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())
    }
    return ";".join(f"{major}.{minor}" for major, minor in sorted(capabilities))


def pybind11_include() -> str:
    """Return the folder of pybind11's headers: the package's, else the copy that torch carries."""
    try:
        import pybind11
    except ImportError:
        return str(Path(torch.__file__).with_name("include"))
    return pybind11.get_include()


def plan_cpu() -> tuple[Extension, dict[str, Any]]:
    """Return the extension _C and what to record of it."""
    require_torch()
    compiler = find_cxx()
    extension = CppExtension(
        f"{PACKAGE}._C",
        SOURCES["_C"],
        depends=HEADERS,
        # OpenMP is compiled for and not linked: its symbols are found in the runtime that torch
        # has loaded. A second runtime would bring a second pool of threads.
        extra_compile_args=[*CXX_FLAGS.split(), "-fopenmp"],
    )
    version = output_of(*compiler, "--version").splitlines()[0]
    return extension, {"torch": torch.__version__, "compiler": version}


def plan_cuda() -> tuple[Extension, dict[str, Any]]:
    """Return the extension _cuda and what to record of it. Needs no GPU and asks for none."""
    require_torch()
    if torch.version.cuda is None:
        raise CannotBuildError(
            f"torch {torch.__version__} is not a CUDA build (torch.version.cuda is None); install "
            "one that is"
        )
    nvcc = find_nvcc()
    cxx = find_cxx()
    cuda = re.search(r"release (\d+\.\d+)", output_of(nvcc, "--version"))[1]
    if tuple(map(int, cuda.split("."))) < OLDEST_CUDA:
        raise CannotBuildError(f"nvcc {cuda} is too old; install CUDA 12.1 or newer")
    archs = cuda_archs(nvcc, cuda)
    command = [nvcc, *NVCC_FLAGS.split()]
    if len(cxx) == 1:  # nvcc takes no launcher before it, and no flags after it.
        command.append(f"-ccbin={cxx[0]}")
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    # The last one's PTX as well, for GPUs that are newer.
    command.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    command += [f"-I{folder}" for folder in (sysconfig.get_path("include"), pybind11_include())]
    extension = CudaExtension(f"{PACKAGE}._cuda", SOURCES["_cuda"], command)
    return extension, {"cuda": cuda, "archs": archs, "compiler": f"nvcc {cuda}"}


REQUESTED = requested_extensions()
PLANS = {"_C": plan_cpu, "_cuda": plan_cuda}


def left_out(name: str, error: Exception) -> dict[str, Any]:
    """Return the record of an extension that cannot be built; fail if it was asked for."""
    if REQUESTED is not None and name in REQUESTED:
        raise SystemExit(
            f"ADAMAL_BUILD={os.environ['ADAMAL_BUILD']} asks for {PACKAGE}.{name}, which cannot be "
            f"built: {error}"
        ) from error
    return {"built": False, "reason": str(error)}


def plan() -> tuple[list[Extension], dict[str, dict[str, Any]]]:
    """Return the extensions to build, and a record of every extension."""
    extensions, records = [], {}
    for name, plan_extension in PLANS.items():
        try:
            if REQUESTED is not None and name not in REQUESTED:
                value = os.environ["ADAMAL_BUILD"]
                raise CannotBuildError(f"ADAMAL_BUILD={value} left it out; unset ADAMAL_BUILD")
            extension, record = plan_extension()
        except Exception as error:
            records[name] = left_out(name, error)
        else:
            extensions.append(extension)
            records[name] = {"built": True, "python": platform.python_version(), **record}
    return extensions, records


class BuildAndRecord(BuildExtension):
    """Builds the planned extensions one by one, and leaves ``_build.json`` beside them."""

    def run(self) -> None:
        """Build, and record the outcome in the wheel, or in the source tree where in place."""
        if torch is not None:  # Objects compiled for one torch must not be linked for another.
            self.build_temp = f"{self.build_temp}-torch{torch.__version__}"
        super().run()
        installed = Path(self.get_ext_fullpath(f"{PACKAGE}._C")).parent
        for name, record in RECORDS.items():
            if not record["built"]:  # An earlier build may have left one.
                file = Path(self.get_ext_filename(f"{PACKAGE}.{name}")).name
                for folder in (installed, Path(self.build_lib, PACKAGE)):
                    (folder / file).unlink(missing_ok=True)
        if self.inplace:
            command = f"{Path(sys.executable).name} setup.py build_ext --inplace"
        else:
            command = "pip install --no-build-isolation --no-deps --force-reinstall ."
        installed.mkdir(parents=True, exist_ok=True)
        content = {"command": command, "extensions": RECORDS}
        (installed / "_build.json").write_text(json.dumps(content, indent=2) + "\n")
        for name, record in RECORDS.items():
            outcome = "built"
            if not record["built"]:
                outcome = f"left out: {record['reason']}; then, in the source tree: {command}"
            print(f"{PACKAGE}.{name}: {outcome}", file=sys.stderr)

    def build_extensions(self) -> None:
        """Build each extension; one that fails takes no other with it."""
        planned, built = self.extensions, []
        for extension in planned:
            name = extension.name.rpartition(".")[2]
            try:
                if isinstance(extension, CudaExtension):
                    self.build_with_nvcc(extension)
                else:
                    self.extensions = [extension]
                    super().build_extensions()
            except Exception as error:
                failure = f"its compilation failed ({error}); the build's output (pip -v) says why"
                RECORDS[name] = left_out(name, CannotBuildError(failure))
            else:
                built.append(extension)
        self.extensions = built

    def build_with_nvcc(self, extension: CudaExtension) -> None:
        """Compile and link an extension, unless that was done by the same command before."""
        output = Path(self.get_ext_fullpath(extension.name))
        command = [*extension.command, *extension.sources, "-o", str(output)]
        log = Path(self.build_temp, f"{output.name}.command")
        if (
            output.exists()
            and log.exists()
            and log.read_text() == shlex.join(command)
            and all(
                Path(file).stat().st_mtime < output.stat().st_mtime
                for file in (*extension.sources, *extension.depends)
            )
        ):
            return
        output.parent.mkdir(parents=True, exist_ok=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        print(shlex.join(command), flush=True)
        if status := subprocess.run(command).returncode:
            raise RuntimeError(f"nvcc exited with status {status}")
        log.write_text(shlex.join(command))


class Build(build):
    """Runs build_ext even where there is nothing to build: it writes the record."""

    sub_commands: ClassVar = [
        (name, None if name == "build_ext" else condition) for name, condition in build.sub_commands
    ]


EXTENSIONS, RECORDS = plan()
setup(ext_modules=EXTENSIONS, cmdclass={"build": Build, "build_ext": BuildAndRecord})
