"""What nvcc makes of the CUDA step, read from its PTX and its machine code; needs no GPU."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers.between_workers import locked
from helpers.machine_code import (
    CAPACITIES,
    Instruction,
    compile_cuda,
    loads_in_flight,
    needs_nvcc,
    parse_code,
    rounded_arithmetic,
)

from adamal_kernels.core.buffers import SecondMoment
from adamal_kernels.core.storage import FORMATS, Format

ARCHS = ("sm_80", "sm_90", "sm_100")
STEP_ARCHS = ("sm_75", *ARCHS, "sm_120")  # all that setup.py names; each takes minutes
THREAD_BYTES = 32  # of every moment, in one thread's registers

pytestmark = needs_nvcc


@dataclass(frozen=True)
class Kernel:
    """One kernel's machine code, and what its name says."""

    dtypes: Format
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
        return THREAD_BYTES // (16 * self.accesses(self.dtypes.compute))

    @property
    def vector_loads(self) -> int:
        has_maximum = self.second_moment == SecondMoment.AMSGRAD
        return sum(map(self.accesses, self.dtypes)) + has_maximum * self.accesses(
            self.dtypes.exp_avg_sq
        )

    @property
    def vector_stores(self) -> int:
        return self.vector_loads - self.accesses(self.dtypes.grad)


@dataclass(frozen=True)
class Build:
    """What nvcc made for one architecture."""

    ptx: str
    report: str
    kernels: list[Kernel]


TYPES = {"f": torch.float32, "d": torch.float64}
TYPES |= {"NS_8bfloat16E": torch.bfloat16, "NS_7float16E": torch.float16}
TYPE = rf"{'|'.join(TYPES)}|S\d*_"
NAME = re.compile(
    rf"adamal_stepINS_9KernelKeyILNS_12SecondMomentE(?P<moment>\d)E(?P<types>(?:{TYPE}){{4}})E"
)


def parse_name(name: str) -> tuple[Format, SecondMoment]:
    match = NAME.search(name)
    assert match, f"not a step kernel: {name}"
    # A substitution can only repeat the parameter's type.
    param, *others = re.findall(TYPE, match["types"])
    types = [TYPES.get(name, TYPES[param]) for name in (param, *others)]
    return Format(*types), SecondMoment(int(match["moment"]))


def parse_sass(text: str) -> Iterator[Kernel]:
    for part in text.split("Function : ")[1:]:
        name, body = part.split("\n", 1)
        yield Kernel(*parse_name(name), parse_code(body))


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
    found = sorted((FORMATS.index(k.dtypes), k.second_moment) for k in build.kernels)
    kinds = [(pair, moment) for pair in range(len(FORMATS)) for moment in SecondMoment]
    assert found == sorted(kinds * CAPACITIES)


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
        stores = vectors * kernel.accesses(kernel.dtypes.exp_avg_sq)
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
