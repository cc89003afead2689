"""Drives the native harness: the kernels on the host, under sanitizers, without torch."""

from __future__ import annotations

import os
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adamal_kernels.core.rows import CoupledRows
from adamal_kernels.core.scalars import StepOptions, StepScalars
from helpers.native_programs import BUILD_DIR, CSRC, PROGRAMS, Command, Program, built

Array = npt.NDArray[Any]

STREAMS = ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
"""The streams of a tensor, in the harness's order."""


class HarnessError(RuntimeError):
    """The harness stopped: a sanitizer's report, a trapped access, or a bad case."""


@dataclass
class TensorCase:
    """One tensor of a bucket. 16-bit types are uint16 arrays of their bits."""

    param: Array
    grad: Array | None
    """None: no gradient in this step."""
    exp_avg: Array
    exp_avg_sq: Array
    max_exp_avg_sq: Array | None = None
    """None unless the second moment is AMSGRAD."""
    row: int = 0
    misaligned: dict[str, int] = field(default_factory=dict)
    """Stream -> elements its first one lies behind a 64-byte boundary; 0 if not named."""
    read_only: frozenset[str] = frozenset()
    """Streams that a store to traps."""


@dataclass
class StepCase:
    """One step of one bucket."""

    format: int
    second_moment: int
    scalars: Sequence[StepScalars]
    tensors: list[TensorCase]
    seed: int = 0
    """Of the order of items, blocks and threads."""


@dataclass
class StepResult:
    """The tensors after a step; ``grad`` is that of the case."""

    tensors: list[TensorCase]
    launches: int = 0
    small_launches: int = 0


@dataclass
class DeviceCase:
    """What the scalars of a step are derived from; tensor ``i`` has ``options[tensor.row]``."""

    options: Sequence[StepOptions]
    counts: Array
    """Float32: the steps each tensor has taken."""
    grad_scale: float | None = None
    found_inf: float | None = None
    grad_norm: float | None = None
    max_grad_norm: float = np.inf
    by_address: bool = False
    """Whether learning rate and betas are read from memory."""
    small: bool = True
    """Whether the launches are those of few tensors."""


@dataclass
class DeviceResult:
    """The tensors after a step on the device, and what was counted."""

    tensors: list[TensorCase]
    counts: Array
    skipped_steps: int


@dataclass
class SetCase:
    """The set of a tensor, and what its rows' searches start from."""

    rows: CoupledRows
    multipliers: Array
    """Float64, one a row."""


@dataclass
class ProjectResult:
    """The tensors after a step and its projection, and the multipliers found."""

    tensors: list[TensorCase]
    multipliers: list[Array]
    passes: int | None = None
    """How often threads shared work out, on the CPU."""
    counts: Array | None = None
    """Of the steps taken, where the scalars were the device's."""


@dataclass
class Capacity:
    """What the parameters of a launch hold."""

    bytes: int
    tensors: int
    rows: int


@dataclass
class Info:
    """The constants the kernels were compiled with."""

    cpu_chunk: int
    formats: list[tuple[int, ...]]
    """Codes of the types that each has."""
    cuda_chunks: list[int]
    """Of each format."""
    small: tuple[Capacity, Capacity]
    """Computing in float32, float64."""
    large: tuple[Capacity, Capacity]


class Harness:
    """The programs that run kernels; every method is one run of one of them over many cases.

    Each is built when it is first run, unless the same one has been built before.

    Args:
        csrc: Folder of the kernels.
        sanitize: Build with address and undefined-behaviour sanitizers. Without them the build
            takes a third of the time.
        build_dir: Folder that keeps what was built.
    """

    def __init__(
        self, csrc: Path = CSRC, *, sanitize: bool = True, build_dir: Path = BUILD_DIR
    ) -> None:
        self._csrc = csrc
        self._sanitize = sanitize
        self._build_dir = build_dir
        self._executables: dict[Program, Path] = {}

    def info(self) -> Info:
        """Return the constants the kernels were compiled with."""
        values = np.frombuffer(self._run(_integers(Command.INFO)), np.int64).tolist()
        cpu_chunk, *formats = values[:-12]
        capacities = [Capacity(*values[i : i + 3]) for i in range(len(values) - 12, len(values), 3)]
        return Info(
            cpu_chunk=cpu_chunk,
            formats=list(zip(*(formats[i::5] for i in range(4)), strict=True)),
            cuda_chunks=formats[4::5],
            small=(capacities[0], capacities[1]),
            large=(capacities[2], capacities[3]),
        )

    def decode(self, dtype: int, bits: Array) -> Array:
        """Return the float32 values of 16-bit patterns of the type with code ``dtype``."""
        head = _integers(Command.DECODE, dtype, bits.size)
        return np.frombuffer(self._run(head + bits.astype(np.uint16).tobytes()), np.float32).copy()

    def encode(self, dtype: int, values: Array) -> Array:
        """Return the 16-bit patterns that float32 values are stored as."""
        head = _integers(Command.ENCODE, dtype, values.size)
        return np.frombuffer(
            self._run(head + values.astype(np.float32).tobytes()), np.uint16
        ).copy()

    def derive_step_scalars(self, steps: Sequence[tuple[int, StepOptions, float]]) -> Array:
        """Return the rows of ``derive_step_scalars(*steps[i])``, float64."""
        payload = _integers(Command.SCALARS, len(steps))
        for step, o, grad_factor in steps:
            numbers = (o.lr, o.beta1, o.beta2, o.eps, o.weight_decay, o.lower, o.upper)
            payload += struct.pack("<q7d", step, *numbers)
            payload += _integers(o.decoupled_weight_decay, o.maximize, o.bias_correction)
            payload += struct.pack("<d", grad_factor)
        return np.frombuffer(self._run(payload), np.float64).reshape(len(steps), -1)

    def step_cpu(self, cases: Sequence[StepCase]) -> list[StepResult]:
        """Step every case with ``step_cpu``: ranges of items in random order."""
        return self._step(Command.STEP_CPU, cases)

    def step_cuda(self, cases: Sequence[StepCase]) -> list[StepResult]:
        """Step every case with the CUDA walk: blocks and threads in random order."""
        return self._step(Command.STEP_CUDA, cases)

    def step_on_device(
        self, cases: Sequence[StepCase], devices: Sequence[DeviceCase]
    ) -> list[DeviceResult]:
        """Step every case by scalars that the CUDA kernel's twin derives from ``devices[i]``."""
        results = []
        for case, device in zip(cases, devices, strict=True):
            payload = b"".join(_step_input(Command.STEP_ON_DEVICE, case)) + _device_input(device)
            output = self._run(payload)
            counts = np.frombuffer(output, np.float32, len(case.tensors)).copy()
            (skipped,) = np.frombuffer(output, np.int64, 1, counts.nbytes).tolist()
            taken = _Taken(output, counts.nbytes + 8)
            results.append(DeviceResult(taken.tensors(case), counts, skipped))
        return results

    def watched(
        self, command: Command, cases: Sequence[StepCase], records: Sequence[Sequence[Array]]
    ) -> list[tuple[list[Array], list[TensorCase]]]:
        """Step every case, and return its records, int64 ``[item, word]`` a tensor, and tensors.

        ``records[i]`` are those that case ``i`` begins with. ``WATCHED_ON_DEVICE`` has the CUDA
        walk find its scalars where the device would have derived them.
        """
        payload = b""
        for case, of_case in zip(cases, records, strict=True):
            payload += b"".join(_step_input(command, case))
            payload += b"".join(array.tobytes() for array in of_case)
        taken = _Taken(self._run(payload))
        return [
            ([taken.like(array) for array in of_case], taken.tensors(case))
            for case, of_case in zip(cases, records, strict=True)
        ]

    def squared_norms(self, command: Command, cases: Sequence[StepCase]) -> list[Array]:
        """Return the sum of squares of each tensor's gradient of each case."""
        output = self._run(b"".join(part for case in cases for part in _step_input(command, case)))
        sums = np.frombuffer(output, np.float64)
        return np.split(sums, np.cumsum([len(case.tensors) for case in cases])[:-1])

    def _step(self, command: Command, cases: Sequence[StepCase]) -> list[StepResult]:
        output = self._run(b"".join(part for case in cases for part in _step_input(command, case)))
        taken = _Taken(output)
        results = []
        for case in cases:
            counts = taken.integers(2) if command == Command.STEP_CUDA else [0, 0]
            results.append(StepResult(taken.tensors(case), *counts))
        assert taken.offset == len(output)
        return results

    def project(
        self, command: Command, cases: Sequence[StepCase], sets: Sequence[Sequence[SetCase]]
    ) -> list[ProjectResult]:
        """Step and project every case, a set a tensor: by threads' shares, or serially."""
        payload = b"".join(
            part
            for case, of_case in zip(cases, sets, strict=True)
            for part in (*_step_input(command, case), *map(_set_input, of_case))
        )
        output = self._run(payload)
        taken = _Taken(output)
        results = []
        for case, of_case in zip(cases, sets, strict=True):
            (passes,) = taken.integers(1)
            multipliers = [taken.array(np.dtype(np.float64), each.rows.rows) for each in of_case]
            results.append(ProjectResult(taken.tensors(case), multipliers, passes=passes))
        assert taken.offset == len(output)
        return results

    def project_cuda(
        self,
        cases: Sequence[StepCase],
        sets: Sequence[Sequence[SetCase]],
        devices: Sequence[DeviceCase | None],
        *,
        step_adds_sizes: bool = True,
    ) -> list[ProjectResult]:
        """Step and project every case by the CUDA kernels; a set a tensor.

        Without ``step_adds_sizes`` the sizes of whole tensors are added after the step, as after
        one that is watched.
        """
        payload = b""
        for case, of_case, device in zip(cases, sets, devices, strict=True):
            payload += b"".join(_step_input(Command.PROJECT_CUDA, case))
            for each in of_case:
                payload += _set_input(each)
            payload += _integers(step_adds_sizes, device is not None)
            payload += b"" if device is None else _device_input(device)
        output = self._run(payload)
        taken = _Taken(output)
        results = []
        for case, of_case, device in zip(cases, sets, devices, strict=True):
            multipliers = [taken.array(np.dtype(float), each.rows.rows) for each in of_case]
            counts = None
            if device is not None:
                counts = taken.array(np.dtype(np.float32), len(case.tensors))
                taken.integers(1)
            results.append(ProjectResult(taken.tensors(case), multipliers, counts=counts))
        assert taken.offset == len(output)
        return results

    def _run(self, payload: bytes) -> bytes:
        (command,) = struct.unpack_from("<q", payload)
        program = PROGRAMS[Command(command)]
        if program not in self._executables:
            self._executables[program] = built(
                program, self._csrc, sanitize=self._sanitize, build_dir=self._build_dir
            )
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder, "input"), Path(folder, "output")
            source.write_bytes(payload)
            done = subprocess.run(
                [self._executables[program], source, target],
                capture_output=True,
                text=True,
                # The leak check needs ptrace, which containers often forbid.
                env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"},
            )
            if done.returncode != 0:
                raise HarnessError(f"exit status {done.returncode}\n{done.stderr}")
            return target.read_bytes()


class _Taken:
    """Reads the harness's output from its beginning on."""

    def __init__(self, output: bytes, offset: int = 0) -> None:
        self._output = output
        self.offset = offset

    def integers(self, count: int) -> list[int]:
        """Return the next integers."""
        return self.array(np.dtype(np.int64), count).tolist()

    def like(self, array: Array) -> Array:
        """Return the next array of the type and shape of ``array``."""
        return self.array(array.dtype, array.size).reshape(array.shape)

    def tensors(self, case: StepCase) -> list[TensorCase]:
        """Return the tensors of a case as the step left them."""

        def take(like: Array | None) -> Array | None:
            return None if like is None else self.array(like.dtype, like.size)

        return [
            TensorCase(
                take(tensor.param),
                tensor.grad,
                take(tensor.exp_avg),
                take(tensor.exp_avg_sq),
                take(tensor.max_exp_avg_sq),
            )
            for tensor in case.tensors
        ]

    def array(self, dtype: np.dtype[Any], count: int) -> Array:
        """Return the next numbers of a type."""
        array = np.frombuffer(self._output, dtype, count, self.offset).copy()
        self.offset += array.nbytes
        return array


def _integers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def _step_input(command: Command, case: StepCase) -> Iterable[bytes]:
    yield _integers(
        command, case.seed, case.format, case.second_moment, len(case.scalars), len(case.tensors)
    )
    yield np.array(case.scalars, np.float64).tobytes()
    for tensor in case.tensors:
        streams = [getattr(tensor, name) for name in STREAMS]
        yield _integers(
            tensor.param.size,
            tensor.row,
            *(stream is not None for stream in streams),
            *(tensor.misaligned.get(name, 0) for name in STREAMS),
            *(name in tensor.read_only for name in STREAMS),
        )
        for stream in streams:
            if stream is not None:
                yield stream.tobytes()


def _set_input(each: SetCase) -> bytes:
    rows = each.rows
    assert each.multipliers.shape == (rows.rows,)
    payload = struct.pack("<qdd", rows.kind, rows.size, rows.tolerance)
    for runs in (rows.kept, rows.reduced):
        payload += _integers(len(runs), *(number for run in runs for number in run))
    return payload + each.multipliers.astype(np.float64).tobytes()


def _device_input(device: DeviceCase) -> bytes:
    payload = _integers(device.small, len(device.options))
    for o in device.options:
        payload += struct.pack(
            "<7d", o.lr, o.beta1, o.beta2, o.eps, o.weight_decay, o.lower, o.upper
        )
        payload += _integers(
            o.decoupled_weight_decay, o.maximize, o.bias_correction, device.by_address
        )
    payload += device.counts.astype(np.float32).tobytes()
    given = (device.grad_scale, device.found_inf, device.grad_norm)
    payload += _integers(*(value is not None for value in given))
    scale, inf, norm = (0.0 if value is None else value for value in given)
    return payload + struct.pack("<ffdd", scale, inf, norm, device.max_grad_norm)
