"""What the Triton kernels beside the step compile to: the device's scalars and the norm."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from helpers.triton_compiling import (
    FLOAT32,
    FLOAT64,
    GFX942,
    SM80,
    SM90,
    SM100,
    check_accesses,
    check_arithmetic,
    compile_kernel,
    compile_step,
    every_pair,
    some_pairs,
    types_id,
)
from triton.backends.compiler import GPUTarget

from adamal_kernels.backends.triton import element
from adamal_kernels.backends.triton import norm as triton_norm
from adamal_kernels.backends.triton import scalars as triton_scalars
from adamal_kernels.core.bucket import BucketKey
from adamal_kernels.core.buffers import SecondMoment
from adamal_kernels.core.storage import Format, compute_dtype

pytestmark = pytest.mark.skipif(
    element.interpreted() is not False, reason="TRITON_INTERPRET is set"
)

CUDA_TARGETS = [SM80, SM90, SM100]
every_cuda_target = pytest.mark.parametrize("target", CUDA_TARGETS, ids=lambda t: f"sm_{t.arch}")

_ITEM_POINTERS = {
    "tensors": "*i64",
    "items": "*i32",
    "inputs": "*i64",
    "first_items": "*i64",
    "item_sums": "*fp64",
}
_TENSOR_POINTERS = {
    "tensors": "*i64",
    "first_items": "*i64",
    "item_sums": "*fp64",
    "tensor_sums": "*fp64",
}
_TOTAL_POINTERS = {"tensor_sums": "*fp64", "tensor_count": "*i64", "total": "*fp64"}


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile afresh: a cached kernel may come from another compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def compile_derive(dtypes: Format, target: GPUTarget) -> Any:
    scalars = "*fp64" if compute_dtype(dtypes.param) == torch.float64 else "*fp32"
    pointers = {"inputs": "*i64", "source": "*i64", "scalars": scalars}
    return compile_kernel(triton_scalars.derive_kernel, pointers, {}, target)


def compile_items(dtypes: Format, target: GPUTarget, *, aligned: bool = True) -> Any:
    key = BucketKey(torch.device("cuda", 0), dtypes, SecondMoment.MONOTONE)
    constants = triton_norm.constants(key, aligned=aligned)
    return compile_kernel(triton_norm.item_sums_kernel, _ITEM_POINTERS, constants, target)


def compile_sums(dtypes: Format, target: GPUTarget) -> tuple[Any, Any]:
    levels = {"CHUNK_LEVELS": triton_norm.chunk_levels(compute_dtype(dtypes.param))}
    return (
        compile_kernel(triton_norm.tensor_sums_kernel, _TENSOR_POINTERS, levels, target),
        compile_kernel(triton_norm.total_kernel, _TOTAL_POINTERS, {}, target),
    )


def arithmetic_of(ptx: str) -> Counter[str]:
    """Return the float64 operations that round; fail if one is fused, flushed or approximate."""
    assert not re.search(r"\bfma\.|\bmad\.\S*f(32|64)|\.approx|\.full|\.ftz", ptx)
    found = re.findall(r"^\s*(add|sub|mul|div|sqrt)((?:\.\w+)*)\.(f32|f64)\S*\s", ptx, re.MULTILINE)
    assert {(rounding, kind) for _, rounding, kind in found} <= {(".rn", "f64")}
    return Counter(name for name, _, _ in found)


@every_cuda_target
@pytest.mark.parametrize("dtypes", [FLOAT32, FLOAT64], ids=types_id)
def test_scalars(target: GPUTarget, dtypes: Format) -> None:
    ptx = compile_derive(dtypes, target).asm["ptx"]
    found = arithmetic_of(ptx)
    # The scale, the clip and the learning rate; a root of one bias.
    assert (found["div"], found["sqrt"]) == (3, 1)
    # Of two powers by 25 bits: a square each, the last of which is not used, and a product each,
    # the first of which is by 1.
    assert found["mul"] >= 2 * (24 + 24)
    narrowing = re.findall(r"cvt\.\S*f32\.f64", ptx)
    assert narrowing == ["cvt.rn.f32.f64"] * (11 if dtypes == FLOAT32 else 0)
    # 1e-6 in float64.
    assert "0d3EB0C6F7A0B5ED8D" in ptx


@every_cuda_target
@some_pairs
def test_step_by_scalars_of_the_device(target: GPUTarget, dtypes: Format) -> None:
    kernel = compile_step(dtypes, SecondMoment.MONOTONE, target, device_scalars=True)
    check_accesses(kernel.asm["ptx"], dtypes, SecondMoment.MONOTONE, target)
    check_arithmetic(kernel.asm["ptx"], dtypes, target)


@every_cuda_target
@some_pairs
def test_norm(target: GPUTarget, dtypes: Format) -> None:
    ptx = compile_items(dtypes, target).asm["ptx"]
    found = arithmetic_of(ptx)
    # Four squares a thread, of which each is added to its neighbour, then to the next pair.
    assert found["mul"] == 4
    width = 4 * dtypes.grad.itemsize
    wide = re.findall(r"ld\.global\.v(\d)\.b(\d+)", ptx)
    assert sum(int(lanes) * int(bits) // 8 for lanes, bits in wide) == width
    # Neighbouring threads first: within a warp, and of the eight warps' sums within one.
    strides = [int(s) for s in re.findall(r"shfl\.sync\.bfly\.b32\s+\S+ \S+ (\d+),", ptx)]
    assert list(dict.fromkeys(strides)) == [1, 2, 4, 8, 16]
    for kernel in compile_sums(dtypes, target):
        assert set(arithmetic_of(kernel.asm["ptx"])) == {"add"}


@every_pair
def test_norm_without_the_hint(dtypes: Format) -> None:
    ptx = compile_items(dtypes, SM90, aligned=False).asm["ptx"]
    assert not re.search(r"ld\.global\S*\.v[248]", ptx)
    arithmetic_of(ptx)


@some_pairs
def test_gfx942(dtypes: Format) -> None:
    kernels = [
        compile_derive(dtypes, GFX942),
        compile_items(dtypes, GFX942),
        *compile_sums(dtypes, GFX942),
        compile_step(dtypes, SecondMoment.MONOTONE, GFX942, device_scalars=True),
    ]
    for kernel in kernels:
        assert not re.search(
            r"llvm\.fmuladd|!fpmath|\b(contract|fast|afn|arcp|reassoc)\b", kernel.asm["llir"]
        )
