"""What the extensions are made of, and how they are compiled: for setup.py and ``adamal build``.

``ADAMAL_BUILD`` names the native backends to build: ``cpu``, ``cuda`` or both with a comma
between them, or ``none``. A backend it names that cannot be built is an error. Unset, everything
that can be built is, and the rest is left out with a message: the package works without it.

``ADAMAL_CUDA_ARCHS``, else ``TORCH_CUDA_ARCH_LIST``, sets the CUDA architectures ("8.0;9.0").
``ADAMAL_CUDA_ARCHS=native`` means those of the GPUs that torch finds here.
``CXX`` and ``CUDA_HOME`` choose the compilers, ``MAX_JOBS`` how many files compile at a time.
``CFLAGS``, ``CXXFLAGS`` and ``CPPFLAGS`` go before our own flags for C++; the linker takes
``LDFLAGS``.

setup.py loads this file by its path, where torch may be absent: it imports nothing of the package.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

__all__ = [
    "CannotBuildError",
    "Extension",
    "build_key",
    "compile_extensions",
    "configure",
    "jobs",
    "left_out",
    "objects_folder",
    "source_files",
    "source_folder",
    "sources_digest",
]

SOURCES = {
    "_C": [
        "bindings.cpp",
        "cpu/norm.cpp",
        "cpu/projection.cpp",
        "cpu/step.cpp",
        "fast_path/fast_path.cpp",
        "fast_path/groups.cpp",
        "fast_path/members.cpp",
        "fast_path/sharded.cpp",
        "fast_path/sharded_class.cpp",
        "plan/cpu_plan.cpp",
        "plan/cuda_plan.cpp",
        "plan/plan.cpp",
        "plan/triton_plan.cpp",
    ],
    "_cuda": [
        "cuda/bindings.cpp",
        "cuda/norm.cu",
        "cuda/projection.cu",
        "cuda/scalars.cu",
        "cuda/step.cu",
        "cuda/watched_step.cu",
    ],
}
# What each backend consists of: the steps on CUDA are planned by _C.
BACKENDS = {"cpu": ("_C",), "cuda": ("_C", "_cuda"), "none": ()}

# The operations of an element are rounded one by one, as on every backend: no fused multiply-add,
# no approximate division or root, whatever CFLAGS say before. errno and traps change no value, and
# hinder vectorisation.
CXX_FLAGS = (
    "-std=c++20 -O3 -g0 -DNDEBUG -fPIC -fwrapv -fno-fast-math -ffp-contract=off -fno-math-errno "
    "-fno-trapping-math -fvisibility=hidden"
)
NVCC_FLAGS = (
    "-std=c++17 -O3 -fmad=false -prec-div=true -prec-sqrt=true -ftz=false --threads=0 "
    "-Xcompiler=-fPIC,-fno-fast-math,-ffp-contract=off,-fvisibility=hidden"
)
# On an AMD EPYC core, g++ 12 and nvcc 13.0; of _cuda for each architecture.
CPU_MINUTES = {"_C": 4, "_cuda": 2}
# Each takes as long to compile as any other: 7.5 has no other way, and 12.0 would wait for the
# driver to compile the PTX in every new environment. The PTX is the last one's: 10.0's runs on all
# that are newer, which 12.0's does not on 11.0.
CUDA_ARCHS = ("75", "80", "90", "120", "100")
OLDEST_CUDA = (12, 1)


class CannotBuildError(Exception):
    """Why an extension cannot be built here, and what would help."""


class Extension(NamedTuple):
    """An extension, and the commands that make it."""

    name: str
    compile: list[str]
    """Compiles a source, given with the output at the end."""
    link: list[str]
    """Links objects, likewise."""
    libraries: list[str]
    record: dict[str, Any]
    """What the build record says of it."""

    @property
    def sources(self) -> list[str]:
        """Paths of its sources, from :func:`source_folder`."""
        return SOURCES[self.name]


def source_folder(package: Path) -> Path:
    """Return the folder of the C++ and CUDA sources: an installed package's, or the source tree's.

    Args:
        package: the folder of ``adamal_kernels``.
    """
    installed = package / "csrc"
    return installed if installed.is_dir() else package.parent / "csrc"


def source_files(folder: Path) -> Iterator[Path]:
    """Yield the sources and headers in a folder and in those within it, in order.

    Raises:
        OSError: a folder cannot be read.
    """
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from source_files(path)
        elif path.suffix in (".h", ".cpp", ".cu"):
            yield path


def sources_digest(sources: Path) -> str:
    """Return the SHA-256 of everything an extension is made of, these flags included.

    Raises:
        OSError: a source cannot be read.
    """
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in source_files(sources):
        name = path.relative_to(sources).as_posix()
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def build_key() -> str:
    """Return a name for what extensions are compiled for: torch, Python and the platform.

    Raises:
        CannotBuildError: torch cannot be imported.
    """
    return f"torch{import_torch().__version__}-{sysconfig.get_config_var('SOABI')}"


def objects_folder(tree: Path) -> Path:
    """Return where the objects of a source tree are kept, for the torch and Python at hand."""
    return tree / "build" / f"objects-{build_key()}"


def requested_extensions() -> set[str] | None:
    """Return the extensions that ADAMAL_BUILD asks for; None where it leaves the choice.

    Raises:
        CannotBuildError: it is not understood.
    """
    value = os.environ.get("ADAMAL_BUILD", "").strip()
    if not value:
        return None
    names = [name.strip() for name in value.split(",")]
    if not set(names) <= BACKENDS.keys() or ("none" in names and len(names) > 1):
        raise CannotBuildError(
            f"ADAMAL_BUILD={value!r} is not understood: set it to cpu, cuda, cpu,cuda or none, or "
            "leave it unset to build whatever can be built"
        )
    return {extension for name in names for extension in BACKENDS[name]}


def import_torch() -> Any:
    """Return torch, of the Python that builds."""
    try:
        import torch
    except Exception as error:  # Absent, or there and broken.
        raise CannotBuildError(
            f"torch could not be imported by the build ({type(error).__name__}: {error}); pip "
            "builds in an environment without torch unless --no-build-isolation is given"
        ) from error
    return torch


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
    cuda = import_torch().cuda
    if not cuda.is_available():
        raise CannotBuildError(
            "ADAMAL_CUDA_ARCHS=native means the GPUs of this machine, and torch finds none "
            "(torch.cuda.is_available() is False); name their compute capabilities instead, such "
            'as ADAMAL_CUDA_ARCHS="9.0"'
        )
    capabilities = {cuda.get_device_capability(index) for index in range(cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(capabilities))


def pybind11_include(torch: Any) -> str:
    """Return the folder of pybind11's headers: the package's, else the copy that torch carries."""
    try:
        import pybind11
    except ImportError:
        return str(Path(torch.__file__).with_name("include"))
    return pybind11.get_include()


def _flags(*variables: str) -> list[str]:
    return [flag for name in variables for flag in shlex.split(os.environ.get(name, ""))]


def configure_cpu() -> Extension:
    """Return how the extension _C is made."""
    torch = import_torch()
    cxx = find_cxx()
    folder = Path(torch.__file__).parent
    includes = (
        folder / "include",
        folder / "include" / "torch" / "csrc" / "api" / "include",
        sysconfig.get_path("include"),
    )
    compile_ = [*cxx, *_flags("CFLAGS", "CXXFLAGS", "CPPFLAGS"), *CXX_FLAGS.split()]
    # OpenMP is compiled for and not linked: its symbols are found in the runtime that torch has
    # loaded. A second runtime would bring a second pool of threads.
    compile_ += ["-fopenmp", "-DTORCH_API_INCLUDE_EXTENSION_H", "-DTORCH_EXTENSION_NAME=_C"]
    compile_ += [f"-I{include}" for include in includes]
    libraries = [f"-L{folder / 'lib'}", "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]
    return Extension(
        "_C",
        compile_,
        [*cxx, "-shared", *_flags("LDFLAGS")],
        libraries,
        {"torch": torch.__version__, "compiler": output_of(*cxx, "--version").splitlines()[0]},
    )


def configure_cuda() -> Extension:
    """Return how the extension _cuda is made. Needs no GPU and asks for none."""
    torch = import_torch()
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
    command = [nvcc]
    if len(cxx) == 1:  # nvcc takes no launcher before it, and no flags after it.
        command.append(f"-ccbin={cxx[0]}")
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    # The last one's PTX as well, for GPUs that are newer.
    command.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    includes = (sysconfig.get_path("include"), pybind11_include(torch))
    return Extension(
        "_cuda",
        [*command, *NVCC_FLAGS.split(), *(f"-I{include}" for include in includes)],
        [*command, "-shared", "-cudart=static"],
        [],
        {"cuda": cuda, "archs": archs, "compiler": f"nvcc {cuda}"},
    )


_CONFIGURE = {"_C": configure_cpu, "_cuda": configure_cuda}


def left_out(name: str, error: Exception) -> dict[str, Any]:
    """Return the record of an extension that cannot be built.

    Raises:
        CannotBuildError: ADAMAL_BUILD asks for it.
    """
    requested = requested_extensions()
    if requested is not None and name in requested:
        raise CannotBuildError(
            f"ADAMAL_BUILD={os.environ['ADAMAL_BUILD']} asks for adamal_kernels.{name}, which "
            f"cannot be built: {error}"
        ) from error
    return {"built": False, "reason": str(error)}


def configure(sources: Path) -> tuple[list[Extension], dict[str, dict[str, Any]]]:
    """Return the extensions that can be built here, and a record of every extension.

    Raises:
        CannotBuildError: one that ADAMAL_BUILD asks for cannot be built.
    """
    requested = requested_extensions()
    common = {"python": platform.python_version(), "sources": sources_digest(sources)}
    extensions, records = [], {}
    for name, configure_extension in _CONFIGURE.items():
        try:
            if requested is not None and name not in requested:
                value = os.environ["ADAMAL_BUILD"]
                raise CannotBuildError(f"ADAMAL_BUILD={value} left it out; unset ADAMAL_BUILD")
            extension = configure_extension()
        except Exception as error:
            records[name] = left_out(name, error)
        else:
            extensions.append(extension)
            records[name] = {"built": True, **common, **extension.record}
    return extensions, records


def jobs() -> int:
    """Return how many files compile at a time: MAX_JOBS, else one a core.

    Raises:
        CannotBuildError: MAX_JOBS is no positive whole number.
    """
    value = os.environ.get("MAX_JOBS", "").strip()
    if not value:
        return len(os.sched_getaffinity(0))
    if not re.fullmatch(r"[1-9]\d{0,5}", value, re.ASCII):
        raise CannotBuildError(f"MAX_JOBS={value!r}: give a whole number from 1 up")
    return int(value)


def find_ninja() -> str:
    """Return the path of ninja: the package's, else the one on PATH."""
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
    else:
        found = str(Path(ninja.BIN_DIR, "ninja"))
    if found is None:
        raise CannotBuildError("ninja was not found; install it: pip install ninja")
    return found


def compile_extensions(
    extensions: Iterable[Extension],
    sources: Path,
    objects: Path,
    output: Callable[[str], Path],
    *,
    report: Callable[[str], None],
    log: TextIO,
) -> dict[str, str]:
    """Compile and link extensions with ninja; one that fails takes no other with it.

    Args:
        extensions: what to build.
        sources: the folder of their sources.
        objects: a folder for objects, of this torch alone. An object that is there is kept if it
            was made by the same command and of files that have not changed since. Other builds in
            the same folder wait.
        output: returns the file that the extension of a name becomes.
        report: is given a line for each file that was made, such as ``3 of 12, 40.1 s: plan.cpp``.
        log: takes the errors, each with its command.

    Returns:
        What failed, by the name of the extension.

    Raises:
        CannotBuildError: ninja is not there, or fails by itself.
    """
    edges = {
        edge.output: edge
        for extension in extensions
        for edge in _edges(extension, sources, output(extension.name))
    }
    command = [find_ninja(), "-C", str(objects), "-k", "0", "-j", str(jobs())]
    objects.mkdir(parents=True, exist_ok=True)
    failures: dict[str, str] = {}
    with open(objects / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (objects / "build.ninja").write_text("".join(edge.text for edge in edges.values()))
        with subprocess.Popen(
            command,
            env={**os.environ, "NINJA_STATUS": "%f of %t, %e s: "},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as ninja:
            for line in ninja.stdout or ():
                if re.match(r"\d+ of \d+, ", line):
                    report(line.rstrip("\n"))
                    continue
                log.write(line)
                if line.startswith("FAILED: "):
                    edge = edges[line.split()[-1]]
                    failures.setdefault(edge.extension, edge.failure)
    log.flush()
    if ninja.returncode and not failures:
        raise CannotBuildError(f"ninja ended with status {ninja.returncode}")
    return failures


class _Edge(NamedTuple):
    """What makes one file."""

    output: str
    extension: str
    failure: str
    text: str
    """In ninja's language."""


def _edges(extension: Extension, sources: Path, made: Path) -> Iterable[_Edge]:
    """Yield what compiles an extension's sources, and what links it into ``made``."""
    rule = f"{extension.name}_compile"
    compile_ = [*extension.compile, f"-I{sources}"]  # Includes are written from there.
    command = f"{_escaped(compile_)} -c $in -o $out -MMD -MF $out.d"
    text = f"rule {rule}\n  command = {command}\n  depfile = $out.d\n  deps = gcc\n"
    objects = [f"{source}.o" for source in extension.sources]
    for source, target in zip(extension.sources, objects, strict=True):
        text += f"build {target}: {rule} {_path(sources / source)}\n  description = {source}\n"
        yield _Edge(target, extension.name, f"{source} does not compile", text)
        text = ""
    rule = f"{extension.name}_link"
    command = f"{_escaped(extension.link)} $in {_escaped(extension.libraries)} -o $out"
    yield _Edge(
        str(made),
        extension.name,
        "it does not link",
        f"rule {rule}\n  command = {command}\n  description = {made.name}\n"
        f"build {_path(made)}: {rule} {' '.join(objects)}\n",
    )


def _escaped(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _path(path: Path) -> str:
    return re.sub(r"[$ :]", r"$\g<0>", str(path))
