"""What the Triton kernels compile to: wide accesses, rounded arithmetic, no fused multiply-add.

Real compilation, without a GPU. The interpreter accepts kernels that do not compile, and says
nothing of how memory is accessed; this says nothing of the values.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.machine_code import loads_in_flight, parse_code

from adamal_kernels.core.buffers import SecondMoment
from adamal_kernels.core.storage import Format

triton = pytest.importorskip("triton")

from helpers.triton_compiling import (  # noqa: E402
    BRANCHES,
    FLOAT32,
    GFX942,
    SM80,
    SM90,
    SM100,
    accesses_of,
    check_accesses,
    check_arithmetic,
    compile_kernel,
    compile_step,
    every_moment,
    every_pair,
    not_interpreted,
    some_pairs,
    stream_bytes,
)
from triton import language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from adamal_kernels.backends.triton import element  # noqa: E402

pytestmark = not_interpreted


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile afresh: a cached kernel may come from another compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def check_cuda(dtypes: Format, second_moment: SecondMoment, target: GPUTarget) -> None:
    ptx = compile_step(dtypes, second_moment, target).asm["ptx"]
    check_accesses(ptx, dtypes, second_moment, target)
    check_arithmetic(ptx, dtypes, target)


@every_moment
@every_pair
def test_sm_90(dtypes: Format, second_moment: SecondMoment) -> None:
    check_cuda(dtypes, second_moment, SM90)


@every_moment
@some_pairs
@pytest.mark.parametrize("target", [SM80, SM100], ids=["sm_80", "sm_100"])
def test_other_cuda_targets(target: GPUTarget, dtypes: Format, second_moment: SecondMoment) -> None:
    check_cuda(dtypes, second_moment, target)


@some_pairs
@pytest.mark.parametrize("target", [SM80, SM90, SM100], ids=["sm_80", "sm_90", "sm_100"])
def test_machine_code(target: GPUTarget, dtypes: Format, tmp_path: Path) -> None:
    """The assembler keeps the vectors and loads them before use, and takes few registers."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compile_step(dtypes, SecondMoment.MONOTONE, target).asm["cubin"])

    def disassembled(what: str) -> str:
        command = [triton.knobs.nvidia.cuobjdump.path, what, cubin]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    code = parse_code(disassembled("-sass"))
    opcodes = Counter(i.opcode for i in code)
    streams = stream_bytes(dtypes, SecondMoment.MONOTONE, target)
    loads = sum(map(accesses_of, streams.values()), Counter())
    stores = loads - accesses_of(streams["grad"])
    assert opcodes["LDG.E.128"] == loads[16] == loads_in_flight(code)
    assert opcodes["STG.E.128"] == stores[16]
    # Nothing is spilled, no lane meets another through shared memory and waits for it at a
    # barrier, and no packed operations are fused.
    kinds = {opcode.split(".")[0] for opcode in opcodes}
    assert kinds.isdisjoint({"LDL", "STL", "LDS", "STS", "BAR", "FFMA2"})
    # Of a multiprocessor's 65536, 64 a thread are four blocks of 256 threads, 128 are two.
    registers = int(re.search(r"REG:(\d+)", disassembled("-res-usage"))[1])
    assert registers <= (128 if dtypes.param == torch.float64 else 64)


@every_moment
@every_pair
def test_without_the_hint_nothing_is_wide(dtypes: Format, second_moment: SecondMoment) -> None:
    kernel = compile_step(dtypes, second_moment, SM90, aligned=False)
    ptx = kernel.asm["ptx"]
    assert not re.search(r"(ld|st)\.global\S*\.v[248]", ptx)
    check_arithmetic(ptx, dtypes, SM90)


@triton.jit
def two_divisions_and_a_root(source, target, BLOCK: tl.constexpr):
    """The only operations of the step that expand to fused multiply-adds, as often as there."""
    lanes = tl.arange(0, BLOCK)
    x = tl.load(source + lanes)
    tl.store(target + lanes, tl.div_rn(x, tl.div_rn(tl.sqrt_rn(x), tl.load(source))))


def fused_operations(assembly: str) -> int:
    """Count fused multiply-adds; a packed one counts for two."""
    names = re.findall(r"^\s*(v_\w*(?:fma|fmac|mac|mad)_\w*f32)\w*", assembly, re.MULTILINE)
    return sum(2 if name.startswith("v_pk_") else 1 for name in names)


@every_moment
@some_pairs
def test_gfx942(dtypes: Format, second_moment: SecondMoment) -> None:
    kernel = compile_step(dtypes, second_moment, GFX942)
    assembly, llir = kernel.asm["amdgcn"], kernel.asm["llir"]
    streams = stream_bytes(dtypes, second_moment, GFX942)

    loads = re.findall(r"\b(?:global|buffer)_load_dwordx4\b", assembly)
    assert len(loads) >= sum(streams.values()) // 16
    stores = re.findall(r"\b(?:global|buffer)_store_dwordx4\b", assembly)
    assert len(stores) == (sum(streams.values()) - streams["grad"]) // 16

    # No fast-math flag stands between an operation and its type.
    operations = re.findall(
        r"= (?:tail call )?(f(?:add|sub|mul|div)|call\b.*?sqrt.*?\() ?(.*)", llir
    )
    assert operations
    assert all(
        re.match(r"(<\d+ x )?(float|double)\b", rest)
        for name, rest in operations
        if name.startswith("f")
    )
    assert not re.search(r"llvm\.fmuladd|!fpmath|\b(contract|fast|afn|arcp)\b", llir)
    assert '"denormal-fp-math-f32"="ieee"' in llir


@every_moment
def test_gfx942_fuses_only_inside_divisions_and_roots(second_moment: SecondMoment) -> None:
    step = compile_step(FLOAT32, second_moment, GFX942)
    pointers = {"source": "*fp32", "target": "*fp32"}
    constants = {"BLOCK": element.BLOCK}
    probe = compile_kernel(two_divisions_and_a_root, pointers, constants, GFX942)
    inside = fused_operations(probe.asm["amdgcn"])
    assert inside > 0
    assert fused_operations(step.asm["amdgcn"]) == BRANCHES * inside


def test_fusion_is_off_whatever_the_default() -> None:
    assert element.launch_options(SM90)["enable_fp_fusion"] is False
    kernel = compile_step(FLOAT32, SecondMoment.MONOTONE, SM90)
    assert kernel.metadata.enable_fp_fusion is False


def test_interpreter_has_not_leaked_here() -> None:
    assert os.environ.get("TRITON_INTERPRET", "0") == "0"
