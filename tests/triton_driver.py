"""Checks of Triton launches against a CUDA driver that only remembers them (fake_libcuda.c).

Triton compiles for sm_90 and launches through its own launcher, all of it real but the driver. A
process takes only one libcuda, so test_triton_launcher.py sends these functions to a worker that
has called :func:`start`.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adamal_kernels.bucket import BucketKey, SecondMoment
from adamal_kernels.dtypes import DTYPE_PAIRS, DtypePair, compute_dtype

GRID = (5, 1, 1)
CURRENT_STREAM, OTHER_STREAM = 77, 123

_driver: ctypes.CDLL


class LaunchRecord(ctypes.Structure):
    """``struct Launch`` of fake_libcuda.c."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint),
        ("stream", ctypes.c_uint64),
        ("function", ctypes.c_uint64),
        ("pointers", ctypes.c_uint64 * 4),
    )


class Launch(NamedTuple):
    """What the driver was asked for."""

    grid: tuple[int, ...]
    threads: int
    stream: int
    function: int
    pointers: tuple[int, ...]


def start(folder: Path) -> None:
    """Prepare this process: compile the driver in ``folder``, and have Triton use it."""
    global _driver
    os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    library = folder / "libcuda.so.1"
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source = Path(__file__).parent / "native" / "fake_libcuda.c"
    compiler = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-Wall", "-Werror", f"-I{headers}"]
    subprocess.run(
        [*compiler, "-Wl,-soname,libcuda.so.1", source, "-o", library], check=True, text=True
    )
    (folder / "libcuda.so").symlink_to(library)
    _driver = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    _driver.fake_last_launch.restype = ctypes.POINTER(LaunchRecord)

    class FakeDriver(CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: CURRENT_STREAM

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    driver.set_active(FakeDriver())


def launched(launch: Any, *args: Any, **kwargs: Any) -> Launch:
    """Return what ``launch`` asks of the driver, once."""
    before = _driver.fake_launches()
    launch(*args, **kwargs)
    assert _driver.fake_launches() == before + 1
    last = _driver.fake_last_launch().contents
    return Launch(tuple(last.grid), last.threads, last.stream, last.function, tuple(last.pointers))


def tables(dtypes: DtypePair, offset: int = 0) -> tuple[Tensor, ...]:
    """Return tables, each ``offset`` bytes after a multiple of 16 bytes."""
    types = (torch.int64, torch.int32, torch.int64, compute_dtype(dtypes.param))
    made = tuple(torch.zeros(96, dtype=torch.uint8)[offset:][:80].view(t) for t in types)
    assert {table.data_ptr() % 16 for table in made} == {offset}
    return made


def arguments(dtypes: DtypePair, *, aligned: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the constants and options of a step."""
    from triton.runtime import driver

    from adamal_kernels.backends import triton_kernels

    key = BucketKey(torch.device("cuda", 0), dtypes, SecondMoment.MONOTONE)
    target = driver.active.get_current_target()
    constants = triton_kernels.constants(key, target, aligned=aligned)
    return constants, triton_kernels.launch_options(target)


def check_same_launch(dtypes: DtypePair, aligned: bool, offset: int) -> None:
    """Check that a prepared launch is the one that ``kernel[grid]`` makes, on its own stream."""
    from adamal_kernels.backends.triton_kernels import step_kernel
    from adamal_kernels.backends.triton_launcher import prepare_launch

    made = tables(dtypes, offset)
    constants, options = arguments(dtypes, aligned=aligned)
    launch = prepare_launch(step_kernel, GRID, made, constants, options)
    found = launched(launch, OTHER_STREAM)
    expected = launched(step_kernel[GRID], *made, **constants, **options)
    assert expected.stream == CURRENT_STREAM
    assert found == expected._replace(stream=OTHER_STREAM)
    assert found.grid == GRID
    assert found.threads == 256
    assert found.pointers == tuple(table.data_ptr() for table in made)


def check_tables_are_specialized_for() -> None:
    """Check that tables which are no multiples of 16 get another kernel, not the promise."""
    from adamal_kernels.backends.triton_kernels import step_kernel
    from adamal_kernels.backends.triton_launcher import prepare_launch

    constants, options = arguments(DTYPE_PAIRS[0])
    functions = {
        launched(
            prepare_launch(step_kernel, GRID, tables(DTYPE_PAIRS[0], offset), constants, options),
            CURRENT_STREAM,
        ).function
        for offset in (0, 8, 0)
    }
    assert len(functions) == 2


def launches_by_run(version: str | None, warmup: Any = None) -> bool:
    """Whether a launch, prepared under a version of Triton, goes through ``kernel[grid]``."""
    import triton

    from adamal_kernels.backends.triton_kernels import step_kernel
    from adamal_kernels.backends.triton_launcher import prepare_launch

    constants, options = arguments(DTYPE_PAIRS[0])
    installed, runs = triton.__version__, []
    if version is not None:
        triton.__version__ = version
    if warmup is not None:
        step_kernel.warmup = warmup
    try:
        launch = prepare_launch(step_kernel, GRID, tables(DTYPE_PAIRS[0]), constants, options)
        run = type(step_kernel).run
        step_kernel.run = lambda *args, **kwargs: runs.append(run(step_kernel, *args, **kwargs))
        launched(launch, CURRENT_STREAM)
    finally:
        triton.__version__ = installed
        vars(step_kernel).pop("run", None)
        vars(step_kernel).pop("warmup", None)
    return bool(runs)


def check_route(version: str | None, by_run: bool) -> None:
    """Check by which way a launch goes under a version of Triton; None: the installed one."""
    assert launches_by_run(version) is by_run


def check_route_without_a_compiled_kernel() -> None:
    """Check that a kernel which ``warmup`` does not give is launched by ``kernel[grid]``."""
    assert launches_by_run(None, warmup=lambda *args, **kwargs: None)
