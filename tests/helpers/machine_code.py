"""What nvcc compiles a CUDA source to, and how its machine code is read."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

from helpers.native_programs import CSRC

NVCC = shutil.which("nvcc")
NVCC_FLAGS = ("-O3", "-fmad=false", "-prec-div=true", "-prec-sqrt=true", "-ftz=false", "-std=c++17")
CAPACITIES = 4  # small and large launches, by scalars of the host and of the device

needs_nvcc = pytest.mark.skipif(
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


SASS_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")


def parse_code(body: str) -> list[Instruction]:
    lines = map(SASS_LINE.match, body.splitlines())
    # Turing's accesses name their scope, which all have.
    return [Instruction(m[1] or "", m[2].removesuffix(".SYS"), m[3]) for m in lines if m]


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
