"""What nvcc makes of the CUDA step, read from its PTX and its machine code; needs no GPU."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
from between_workers import locked
from native_programs import CSRC

from adamal_kernels.buffers import SecondMoment
from adamal_kernels.dtypes import DTYPE_PAIRS, DtypePair, compute_dtype

NVCC = shutil.which("nvcc")
NVCC_FLAGS = ("-O3", "-fmad=false", "-prec-div=true", "-prec-sqrt=true", "-ftz=false", "-std=c++17")
ARCHS = ("sm_80", "sm_90", "sm_100")
STEP_ARCHS = ("sm_75", *ARCHS, "sm_120")  # all that setup.py names; each takes minutes
CAPACITIES = 4  # small and large launches, by scalars of the host and of the device
THREAD_BYTES = 32  # of every moment, in one thread's registers

pytestmark = pytest.mark.skipif(
    NVCC is None and "CI" not in os.environ,
    reason="nvcc is not on PATH (with CI set this is a failure)",
)


def find_disassembler() -> str:
    """Return cuobjdump: the toolkit's, else the one in Triton's package."""
    beside_nvcc = Path(NVCC).resolve().with_name("cuobjdump")
    triton = Path(sysconfig.get_path("purelib"), "triton/backends/nvidia/bin/cuobjdump")
    for candidate in (beside_nvcc, shutil.which("cuobjdump"), triton):
        if candidate is not None and Path(candidate).exists():
            return str(candidate)
    pytest.fail("no cuobjdump beside nvcc, on PATH or in Triton's package: pip install triton")


@dataclass(frozen=True)
class Instruction:
    """One instruction of the machine code."""

    predicate: str
    """Such as ``@!P0``; empty if it runs always."""
    opcode: str
    operands: str

    @property
    def branches(self) -> bool:
        return self.opcode.split(".")[0] in ("BRA", "EXIT", "CALL", "RET", "BRX", "JMP")

    @cached_property
    def registers(self) -> frozenset[int]:
        return frozenset(int(number) for number in re.findall(r"\bR(\d+)", self.operands))

    @cached_property
    def loaded(self) -> frozenset[int]:
        """The registers a 128-bit load fills."""
        first = int(re.match(r"R(\d+)", self.operands)[1])
        return frozenset(range(first, first + 4))


@dataclass(frozen=True)
class Kernel:
    """One kernel's machine code, and what its name says."""

    dtypes: DtypePair
    second_moment: SecondMoment
    code: list[Instruction]

    def count(self, opcode: str) -> int:
        return sum(i.opcode == opcode for i in self.code)

    def accesses(self, dtype: torch.dtype) -> int:
        """How many 128-bit accesses a vector of a stream takes."""
        return dtype.itemsize // min(t.itemsize for t in self.dtypes)

    @property
    def vectors(self) -> int:
        """How many vectors of each stream a thread holds of a whole chunk."""
        moment = compute_dtype(self.dtypes.param)
        return THREAD_BYTES // (16 * self.accesses(moment))

    @property
    def vector_loads(self) -> int:
        moments = 3 if self.second_moment == SecondMoment.AMSGRAD else 2
        moment = self.accesses(compute_dtype(self.dtypes.param))
        return sum(map(self.accesses, self.dtypes)) + moments * moment

    @property
    def vector_stores(self) -> int:
        return self.vector_loads - self.accesses(self.dtypes.grad)


@dataclass(frozen=True)
class Build:
    """What nvcc made for one architecture."""

    ptx: str
    report: str
    kernels: list[Kernel]


NAME = re.compile(
    r"adamal_stepILNS_12SecondMomentE(?P<moment>\d)E"
    r"(?P<param>f|d|NS_8bfloat16E|NS_7float16E)(?P<grad>f|d|NS_8bfloat16E|NS_7float16E|S\d*_)"
)
SASS_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")


def parse_name(name: str) -> tuple[DtypePair, SecondMoment]:
    match = NAME.search(name)
    assert match, f"not a step kernel: {name}"
    types = {"f": torch.float32, "d": torch.float64}
    types |= {"NS_8bfloat16E": torch.bfloat16, "NS_7float16E": torch.float16}
    param = types[match["param"]]
    # A substitution can only repeat the parameter's type.
    grad = types.get(match["grad"], param)
    return DtypePair(param, grad), SecondMoment(int(match["moment"]))


def parse_code(body: str) -> list[Instruction]:
    lines = map(SASS_LINE.match, body.splitlines())
    # Turing's accesses name their scope, which all have.
    return [Instruction(m[1] or "", m[2].removesuffix(".SYS"), m[3]) for m in lines if m]


def parse_sass(text: str) -> Iterator[Kernel]:
    for part in text.split("Function : ")[1:]:
        name, body = part.split("\n", 1)
        yield Kernel(*parse_name(name), parse_code(body))


def compile_cuda(source: str, arch: str, folder: Path) -> tuple[str, str, str]:
    """Return the PTX, ptxas's report and the machine code of a CUDA source: a path in csrc."""
    assert NVCC, "CI is set and nvcc is not on PATH: install the CUDA toolkit"
    cubin = folder / "made.cubin"
    command = [NVCC, *NVCC_FLAGS, f"-I{CSRC}", f"-arch={arch}", "-cubin", "-keep", "-Xptxas=-v"]
    done = subprocess.run(
        [*command, f"-keep-dir={folder}", CSRC / f"{source}.cu", "-o", cubin],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (ptx,) = folder.glob("*.ptx")
    sass = subprocess.run(
        [find_disassembler(), "-sass", cubin], check=True, capture_output=True, text=True
    )
    return ptx.read_text(), done.stderr, sass.stdout


@pytest.fixture(scope="session", params=STEP_ARCHS)
def build(request: pytest.FixtureRequest, session_folder: Path) -> Build:
    folder = session_folder / request.param
    made = folder / "made.json"
    with locked(made):
        if not made.exists():
            made.write_text(json.dumps(compile_cuda("cuda/step", request.param, folder)))
    ptx, report, sass = json.loads(made.read_text())
    return Build(ptx, report, list(parse_sass(sass)))


def test_there_is_a_kernel_for_every_pair_and_second_moment(build: Build) -> None:
    found = sorted((DTYPE_PAIRS.index(k.dtypes), k.second_moment) for k in build.kernels)
    kinds = [(pair, moment) for pair in range(len(DTYPE_PAIRS)) for moment in SecondMoment]
    assert found == sorted(kinds * CAPACITIES)


def rounded_arithmetic(ptx: str) -> set[str]:
    """Return the kinds of floating-point arithmetic, having checked that each rounds to nearest."""
    arithmetic = re.findall(
        r"^\s*(?:@\S+\s+)?((?:add|sub|mul|div|sqrt|rcp|rsqrt|fma|mad|ex2|lg2)\.\S*f(?:16|32|64)\S*)",
        ptx,
        re.MULTILINE,
    )
    kinds = set(arithmetic)
    # Without .rn, add, sub and mul may be contracted later.
    operations = itertools.product(("add", "sub", "mul", "div", "rcp", "sqrt"), ("f32", "f64"))
    assert kinds <= {f"{operation}.rn.{real}" for operation, real in operations}
    for word in (".approx", ".ftz", "fma.", ".full.", "mad.f", "mad.rn"):
        assert word not in ptx
    return kinds


def test_arithmetic_is_rounded_and_never_fused(build: Build) -> None:
    kinds = rounded_arithmetic(build.ptx)
    assert {"div.rn.f32", "sqrt.rn.f32", "div.rn.f64", "sqrt.rn.f64"} <= kinds
    # Packed pairs, which ptxas fuses on sm_100 whatever the PTX says; div and sqrt use none.
    assert not any(i.opcode.startswith("FFMA2") for k in build.kernels for i in k.code)


def test_nothing_is_spilled(build: Build) -> None:
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", build.report)
    assert len(spills) == 2 * len(build.kernels)
    assert set(spills) == {"0"}
    for kernel in build.kernels:
        assert {i.opcode.split(".")[0] for i in kernel.code}.isdisjoint({"STL", "LDL"}), kernel


def test_vectors_are_moved_by_128_bit_accesses(build: Build) -> None:
    for kernel in build.kernels:
        # The whole chunk's vectors, and the one at a time of a ragged chunk; the two paths may
        # share their last store.
        vectors = kernel.vectors + 1
        assert kernel.count("LDG.E.128") >= vectors * kernel.vector_loads
        assert kernel.count("STG.E.128") >= vectors * kernel.vector_stores - 1
        # Generic addresses would cost a check each.
        assert {i.opcode.split(".")[0] for i in kernel.code}.isdisjoint({"LD", "ST"})


def loads_in_flight(code: list[Instruction]) -> int:
    """Return how many 128-bit loads are issued, at most, before the first of them is used."""
    longest = run = 0
    pending: frozenset[int] = frozenset()
    for instruction in code:
        if instruction.opcode == "LDG.E.128":
            run += 1
            pending |= instruction.loaded
            longest = max(longest, run)
        elif instruction.branches or instruction.registers & pending:
            run = 0
            pending = frozenset()
    return longest


def test_loads_of_a_chunk_come_before_the_first_use(build: Build) -> None:
    for kernel in build.kernels:
        longest = loads_in_flight(kernel.code)
        assert longest >= kernel.vectors * kernel.vector_loads, (kernel.dtypes, longest)


def conditional_stores(kernel: Kernel) -> int:
    """How many 128-bit stores are predicated, or follow a conditional jump past them.

    Between the jump and its stores stands at most what makes their addresses.
    """
    count = 0
    skippable = False
    for instruction in kernel.code:
        if instruction.opcode == "STG.E.128":
            count += bool(instruction.predicate) or skippable
        elif instruction.branches:
            skippable = bool(instruction.predicate)
        elif instruction.opcode.split(".")[0] not in ("LEA", "MOV", "UMOV", "IADD3", "IMAD"):
            skippable = False
    return count


def test_only_changed_second_moments_are_stored(build: Build) -> None:
    for kernel in build.kernels:
        vectors = kernel.vectors + 1
        stores = vectors * kernel.accesses(compute_dtype(kernel.dtypes.param))
        if kernel.second_moment == SecondMoment.PLAIN:
            assert conditional_stores(kernel) == 0
        else:  # The two paths may share their last store.
            assert conditional_stores(kernel) >= stores - 1, (kernel.dtypes, kernel.second_moment)


def test_registers_leave_room_for_several_blocks(build: Build) -> None:
    """Of a multiprocessor's 65536, 80 a thread are three blocks of 256 threads, 128 are two."""
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", build.report)]
    assert len(registers) == len(build.kernels)
    names = re.findall(r"Compiling entry function '(\w+)'", build.report)
    for name, used in zip(names, registers, strict=True):
        dtypes, second_moment = parse_name(name)
        wide = dtypes.param == torch.float64 or second_moment == SecondMoment.AMSGRAD
        assert used <= (128 if wide else 80), name


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("source", "operations"),
    [
        ("cuda/scalars", {"mul.rn.f64", "div.rn.f64", "sqrt.rn.f64"}),
        ("cuda/norm", {"mul.rn.f64", "add.rn.f64"}),
        ("cuda/projection", {"sqrt.rn.f32", "div.rn.f32", "sqrt.rn.f64", "div.rn.f64"}),
    ],
)
def test_the_other_kernels(source: str, operations: set[str], arch: str, tmp_path: Path) -> None:
    """Scalars, norms and projections: rounded to nearest, nothing spilled, 16 bytes at a time."""
    ptx, report, sass = compile_cuda(source, arch, tmp_path)
    assert operations <= rounded_arithmetic(ptx)
    assert set(re.findall(r"(\d+) bytes spill (?:stores|loads)", report)) == {"0"}
    kernels = [part.split("\n", 1) for part in sass.split("Function : ")[1:]]
    for name, body in kernels:
        opcodes = [instruction.opcode for instruction in parse_code(body)]
        assert {opcode.split(".")[0] for opcode in opcodes}.isdisjoint({"STL", "LDL"}), name
        assert not any(opcode.startswith("FFMA2") for opcode in opcodes), name
        if any(part in name for part in ("norm_of_items", "StepBlock", "Evaluate", "ProjectTile")):
            assert "LDG.E.128" in "\n".join(opcodes), name
