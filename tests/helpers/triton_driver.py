"""Checks of Triton launches against a CUDA driver that only remembers them (fake_libcuda.c).

Triton compiles for sm_90 and launches through its own launcher, all of it real but the driver. A
process takes only one libcuda, so test_triton_launcher.py sends these functions to a worker that
has called :func:`start`.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from adamal_kernels import L2Ball
from adamal_kernels.core.bucket import Bucket, BucketKey, DeviceScalars
from adamal_kernels.core.buffers import SecondMoment
from adamal_kernels.core.rows import coupled_rows
from adamal_kernels.core.scalars import StepOptions, derive_step_scalars
from adamal_kernels.core.stats import WORDS
from adamal_kernels.core.storage import FORMATS, Format, compute_dtype

BLOCK = 1024
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
    source = Path(__file__).parents[1] / "native" / "fake_libcuda.c"
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


def tables(dtypes: Format, offset: int = 0) -> tuple[Tensor, ...]:
    """Return tables, each ``offset`` bytes after a multiple of 16 bytes."""
    types = (torch.int64, torch.int32, torch.int64, compute_dtype(dtypes.param))
    made = tuple(torch.zeros(96, dtype=torch.uint8)[offset:][:80].view(t) for t in types)
    assert {table.data_ptr() % 16 for table in made} == {offset}
    return made


def arguments(dtypes: Format, *, aligned: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the constants and options of a step."""
    from triton.runtime import driver

    from adamal_kernels.backends.triton import element

    key = BucketKey(torch.device("cuda", 0), dtypes, SecondMoment.MONOTONE)
    target = driver.active.get_current_target()
    constants = element.constants(key, target, aligned=aligned)
    return constants, element.launch_options(target)


def check_same_launch(dtypes: Format, aligned: bool, offset: int) -> None:
    """Check that a prepared launch is the one that ``kernel[grid]`` makes, on its own stream."""
    from adamal_kernels.backends.triton.element import step_kernel
    from adamal_kernels.backends.triton.launcher import prepare_launch

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


def kernels() -> set[str]:
    """Return the names of all kernels that a launcher may launch."""
    from triton.runtime.jit import JITFunction

    modules = (
        *("element", "long_rows", "norm", "projection"),
        *("rows", "scalars", "sets", "watch"),
    )
    return {
        name
        for module in modules
        for name, value in vars(import_module(f"adamal_kernels.backends.triton.{module}")).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel") and name[0] != "_"
    }


def check_every_kernel_launches_twice() -> None:
    """Check that each is prepared twice, and launched twice each time.

    At every launch but the first Triton compares the globals of a kernel with what they were.
    """
    from triton.runtime import driver

    from adamal_kernels.backends.triton import element
    from adamal_kernels.backends.triton import launcher as triton_launcher
    from adamal_kernels.backends.triton.backend import TritonBackend

    target = driver.active.get_current_target()
    launches: Counter[str] = Counter()

    class Launcher(triton_launcher.Launcher):
        """Launches kernels compiled for the driver's GPU over tensors of the CPU."""

        def __init__(self, key: BucketKey) -> None:
            super().__init__(key)
            self._options = element.launch_options(target)

        def _prepare(self, kernel: Any, *args: Any) -> Callable[[int], None]:
            launch = super()._prepare(kernel, *args)

            def counted(stream: int) -> None:
                launched(launch, stream)
                launches[kernel.__name__] += 1

            return counted

    def bucket_of(lengths: Sequence[int], **kind: bool) -> Bucket:
        device = torch.device("cpu")
        key = BucketKey(device, FORMATS[0], SecondMoment.MONOTONE, **kind)
        bucket = Bucket(key, rows=[0] * len(lengths))
        for stream in (bucket.params, bucket.grads, *bucket.elementwise_buffers):
            stream += [torch.ones(2 * length) for length in lengths]
        options = StepOptions(0.1, 0.9, 0.99, 1e-8, 0.0, False, False, True)
        if key.device_scalars:
            steps = [torch.zeros(()) for _ in lengths]
            bucket.device_scalars = DeviceScalars([options], steps)
            bucket.records = [torch.zeros(-(-2 * n // BLOCK), WORDS).long() for n in lengths]
        else:
            bucket.scalars = [derive_step_scalars(1, options)]
        if key.coupled:
            rows = [torch.empty(2, length) for length in lengths]
            bucket.sets = [coupled_rows(tensor, L2Ball(1.0, dim=1)) for tensor in rows]
            bucket.buffers["multiplier"] = [torch.zeros(2).double() for _ in lengths]
        return bucket

    backend = TritonBackend()
    with mock.patch.object(triton_launcher, "Launcher", Launcher):
        for _ in range(2):
            plain = bucket_of([8])
            # Rows for each kind of tile, and long ones.
            coupled = bucket_of([8, 100, 1000, 20000], coupled=True)
            for bucket in (plain, coupled, bucket_of([8], device_scalars=True)):
                for _ in range(2):
                    backend.step(bucket)
            plan = plain.workspace["plan"]
            for _ in range(2):
                plan.squared_norm(plain.grads)
    assert launches.keys() == kernels()
    assert min(launches.values()) >= 4


def check_tables_are_specialized_for() -> None:
    """Check that tables which are no multiples of 16 get another kernel, not the promise."""
    from adamal_kernels.backends.triton.element import step_kernel
    from adamal_kernels.backends.triton.launcher import prepare_launch

    constants, options = arguments(FORMATS[0])
    functions = {
        launched(
            prepare_launch(step_kernel, GRID, tables(FORMATS[0], offset), constants, options),
            CURRENT_STREAM,
        ).function
        for offset in (0, 8, 0)
    }
    assert len(functions) == 2


def launches_by_run(version: str | None, warmup: Any = None) -> bool:
    """Whether a launch, prepared under a version of Triton, goes through ``kernel[grid]``."""
    import triton

    from adamal_kernels.backends.triton.element import step_kernel
    from adamal_kernels.backends.triton.launcher import prepare_launch

    constants, options = arguments(FORMATS[0])
    installed, runs = triton.__version__, []
    if version is not None:
        triton.__version__ = version
    if warmup is not None:
        step_kernel.warmup = warmup
    try:
        launch = prepare_launch(step_kernel, GRID, tables(FORMATS[0]), constants, options)
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
