"""Real compilation of Triton kernels, without a GPU, and what its output shows."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import Any

import pytest
import torch

from adamal_kernels.core.bucket import BucketKey
from adamal_kernels.core.buffers import SecondMoment
from adamal_kernels.core.storage import FORMATS, Format, compute_dtype

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from adamal_kernels.backends.triton import element  # noqa: E402

not_interpreted = pytest.mark.skipif(
    element.interpreted() is not False, reason="TRITON_INTERPRET is set"
)

SM80, SM90, SM100 = (GPUTarget("cuda", arch, 32) for arch in (80, 90, 100))
GFX942 = GPUTarget("hip", "gfx942", 64)
FLOAT32, FLOAT64, BFLOAT16 = FORMATS[:3]

_POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64"}
# Branches of the kernel, of which each does all of the arithmetic: whole blocks and the last.
BRANCHES = 2


def types_id(dtypes: Format) -> str:
    return "-".join(str(dtype).removeprefix("torch.") for dtype in dtypes[:2])


every_pair = pytest.mark.parametrize("dtypes", FORMATS, ids=types_id)
every_moment = pytest.mark.parametrize("second_moment", SecondMoment, ids=lambda m: m.name.lower())
some_pairs = pytest.mark.parametrize("dtypes", [FLOAT32, FLOAT64, BFLOAT16], ids=types_id)


def compile_step(
    dtypes: Format,
    second_moment: SecondMoment,
    target: GPUTarget,
    *,
    aligned: bool = True,
    device_scalars: bool = False,
) -> Any:
    """Compile what TritonBackend launches: its tables all start at multiples of 16 bytes."""
    key = BucketKey(torch.device("cuda", 0), dtypes, second_moment, device_scalars)
    constants = element.constants(key, target, aligned=aligned)
    signature = {
        "tensors": "*i64",
        "items": "*i32",
        "inputs": "*i64",
        "scalars": _POINTERS[compute_dtype(dtypes.param)],
    }
    return compile_kernel(element.step_kernel, signature, constants, target)


def compile_kernel(
    kernel: Any, pointers: dict[str, str], constants: dict[str, Any], target: GPUTarget
) -> Any:
    signature = {**pointers, **dict.fromkeys(constants, "constexpr")}
    alignment = {(i,): [["tt.divisibility", 16]] for i in range(len(pointers))}
    source = ASTSource(kernel, signature, constants, alignment)
    options = element.launch_options(target)
    return triton.compile(source, target=target, options=options)


def elements_per_thread(target: GPUTarget) -> int:
    options = element.launch_options(target)
    return element.BLOCK // (options["num_warps"] * target.warp_size)


def stream_bytes(dtypes: Format, second_moment: SecondMoment, target: GPUTarget) -> dict[str, int]:
    """Return the bytes of each stream that a thread reads of a whole block."""
    streams = dtypes._asdict()
    if second_moment is SecondMoment.AMSGRAD:
        streams["max_exp_avg_sq"] = dtypes.exp_avg_sq
    return {name: elements_per_thread(target) * dtype.itemsize for name, dtype in streams.items()}


def accesses_of(size: int) -> Counter[int]:
    """Return the accesses, by width in bytes, that ``size`` bytes of a stream take at best."""
    width = min(size, 16)
    return Counter({width: size // width})


def check_accesses(
    ptx: str, dtypes: Format, second_moment: SecondMoment, target: GPUTarget
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


def check_arithmetic(ptx: str, dtypes: Format, target: GPUTarget) -> None:
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
    total = BRANCHES * elements_per_thread(target)
    assert operations["sqrt.rn"] == total
    assert operations["div.rn"] == 2 * total
    narrowing = re.findall(r"cvt\.\S*(?:bf16|f16)\S*\.f32", ptx)
    assert all(convert.startswith("cvt.rn.") for convert in narrowing)
    assert bool(narrowing) == (dtypes.param.itemsize == 2)
