"""What the Triton kernels compile to: wide accesses, rounded arithmetic, no fused multiply-add.

Real compilation, without a GPU. The interpreter accepts kernels that do not compile, and says
nothing of how memory is accessed; this says nothing of the values.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cuda_machine_code import loads_in_flight, parse_code

from adamal_kernels.bucket import BucketKey
from adamal_kernels.buffers import SecondMoment
from adamal_kernels.dtypes import DTYPE_PAIRS, DtypePair, compute_dtype

triton = pytest.importorskip("triton")

from triton import language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from adamal_kernels.backends import triton_kernels  # noqa: E402

pytestmark = pytest.mark.skipif(
    triton_kernels.interpreted() is not False, reason="TRITON_INTERPRET is set"
)

SM80, SM90, SM100 = (GPUTarget("cuda", arch, 32) for arch in (80, 90, 100))
GFX942 = GPUTarget("hip", "gfx942", 64)
FLOAT32, FLOAT64, BFLOAT16 = DTYPE_PAIRS[:3]

_POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64"}
# Branches of the kernel, of which each does all of the arithmetic: whole blocks and the last.
_BRANCHES = 2


def types_id(dtypes: DtypePair) -> str:
    return "-".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


every_pair = pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=types_id)
every_moment = pytest.mark.parametrize("second_moment", SecondMoment, ids=lambda m: m.name.lower())
some_pairs = pytest.mark.parametrize("dtypes", [FLOAT32, FLOAT64, BFLOAT16], ids=types_id)


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile afresh: a cached kernel may come from another compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def compile_step(
    dtypes: DtypePair,
    second_moment: SecondMoment,
    target: GPUTarget,
    *,
    aligned: bool = True,
    device_scalars: bool = False,
) -> Any:
    """Compile what TritonBackend launches: its tables all start at multiples of 16 bytes."""
    key = BucketKey(torch.device("cuda", 0), dtypes, second_moment, device_scalars)
    constants = triton_kernels.constants(key, target, aligned=aligned)
    signature = {
        "tensors": "*i64",
        "items": "*i32",
        "inputs": "*i64",
        "scalars": _POINTERS[compute_dtype(dtypes.param)],
    }
    return compile_kernel(triton_kernels.step_kernel, signature, constants, target)


def compile_kernel(
    kernel: Any, pointers: dict[str, str], constants: dict[str, Any], target: GPUTarget
) -> Any:
    signature = {**pointers, **dict.fromkeys(constants, "constexpr")}
    alignment = {(i,): [["tt.divisibility", 16]] for i in range(len(pointers))}
    source = ASTSource(kernel, signature, constants, alignment)
    options = triton_kernels.launch_options(target)
    return triton.compile(source, target=target, options=options)


def elements_per_thread(target: GPUTarget) -> int:
    options = triton_kernels.launch_options(target)
    return triton_kernels.BLOCK // (options["num_warps"] * target.warp_size)


def stream_bytes(
    dtypes: DtypePair, second_moment: SecondMoment, target: GPUTarget
) -> dict[str, int]:
    """Return the bytes of each stream that a thread reads of a whole block."""
    moment = compute_dtype(dtypes.param)
    streams = {"param": dtypes.param, "grad": dtypes.grad, "exp_avg": moment, "exp_avg_sq": moment}
    if second_moment is SecondMoment.AMSGRAD:
        streams["max_exp_avg_sq"] = moment
    return {name: elements_per_thread(target) * dtype.itemsize for name, dtype in streams.items()}


def accesses_of(size: int) -> Counter[int]:
    """Return the accesses, by width in bytes, that ``size`` bytes of a stream take at best."""
    width = min(size, 16)
    return Counter({width: size // width})


def check_accesses(
    ptx: str, dtypes: DtypePair, second_moment: SecondMoment, target: GPUTarget
) -> None:
    """Check that whole blocks go in wide accesses, and the monotone buffer where it grew.

    Wide is all that a thread has of a stream, up to 128 bits; narrower ones are a last block's.
    """
    accesses = re.findall(
        r"^\s*(@!?%p\d+ )?(ld|st)\.global\.(?:\w+\.)*?v(\d)\.[bf](\d+)", ptx, re.MULTILINE
    )
    found: dict[tuple[bool, str], Counter[int]] = defaultdict(Counter)
    for predicate, operation, lanes, bits in accesses:
        found[bool(predicate), operation][int(lanes) * int(bits) // 8] += 1

    streams = stream_bytes(dtypes, second_moment, target)
    monotone = {
        SecondMoment.MONOTONE: "exp_avg_sq",
        SecondMoment.PLAIN: None,
        SecondMoment.AMSGRAD: "max_exp_avg_sq",
    }[second_moment]
    written = {name: size for name, size in streams.items() if name != "grad"}
    expected = {(False, "ld"): sum(map(accesses_of, streams.values()), Counter())}
    if monotone:
        expected[True, "st"] = accesses_of(written.pop(monotone))
    expected[False, "st"] = sum(map(accesses_of, written.values()), Counter())
    assert found == expected


def check_arithmetic(ptx: str, dtypes: DtypePair, target: GPUTarget) -> None:
    """Check that all arithmetic rounds to nearest, and that nothing is fused or flushed."""
    # Blackwell packs two float32 operations into one (f32x2).
    operations = Counter(
        re.findall(
            r"^\s*(?:@!?%p\d+ )?([a-z]\w*(?:\.\w+)*)\.f(?:32|64)(?:x2)?\s", ptx, re.MULTILINE
        )
    )
    moves = {"mov", "selp", "setp.eq", "setp.neu", "setp.gt", "setp.lt"}
    arithmetic = {kind for kind in operations if not kind.startswith("cvt.")} - moves
    assert arithmetic == {"add.rn", "sub.rn", "mul.rn", "div.rn", "sqrt.rn"}
    assert not re.search(r"\bfma\.|\bmad\.\S*f(32|64)|\.approx|\.full|\.ftz", ptx)
    # Not every ptxas leaves a packed product and a sum apart.
    assert "mul.rn.f32x2" not in ptx
    total = _BRANCHES * elements_per_thread(target)
    assert operations["sqrt.rn"] == total
    assert operations["div.rn"] == 2 * total
    narrowing = re.findall(r"cvt\.\S*(?:bf16|f16)\S*\.f32", ptx)
    assert all(convert.startswith("cvt.rn.") for convert in narrowing)
    assert bool(narrowing) == (dtypes.param.itemsize == 2)


def check_cuda(dtypes: DtypePair, second_moment: SecondMoment, target: GPUTarget) -> None:
    ptx = compile_step(dtypes, second_moment, target).asm["ptx"]
    check_accesses(ptx, dtypes, second_moment, target)
    check_arithmetic(ptx, dtypes, target)


@every_moment
@every_pair
def test_sm_90(dtypes: DtypePair, second_moment: SecondMoment) -> None:
    check_cuda(dtypes, second_moment, SM90)


@every_moment
@some_pairs
@pytest.mark.parametrize("target", [SM80, SM100], ids=["sm_80", "sm_100"])
def test_other_cuda_targets(
    target: GPUTarget, dtypes: DtypePair, second_moment: SecondMoment
) -> None:
    check_cuda(dtypes, second_moment, target)


@some_pairs
@pytest.mark.parametrize("target", [SM80, SM90, SM100], ids=["sm_80", "sm_90", "sm_100"])
def test_machine_code(target: GPUTarget, dtypes: DtypePair, tmp_path: Path) -> None:
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
def test_without_the_hint_nothing_is_wide(dtypes: DtypePair, second_moment: SecondMoment) -> None:
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
def test_gfx942(dtypes: DtypePair, second_moment: SecondMoment) -> None:
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
    constants = {"BLOCK": triton_kernels.BLOCK}
    probe = compile_kernel(two_divisions_and_a_root, pointers, constants, GFX942)
    inside = fused_operations(probe.asm["amdgcn"])
    assert inside > 0
    assert fused_operations(step.asm["amdgcn"]) == _BRANCHES * inside


def test_fusion_is_off_whatever_the_default() -> None:
    assert triton_kernels.launch_options(SM90)["enable_fp_fusion"] is False
    kernel = compile_step(FLOAT32, SecondMoment.MONOTONE, SM90)
    assert kernel.metadata.enable_fp_fusion is False


def test_interpreter_has_not_leaked_here() -> None:
    assert os.environ.get("TRITON_INTERPRET", "0") == "0"
