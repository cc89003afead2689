"""What the Triton kernels that project onto sets which couple elements compile to."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from helpers.triton_compiling import (  # noqa: E402
    BFLOAT16,
    FLOAT32,
    FLOAT64,
    GFX942,
    SM80,
    SM90,
    SM100,
    compile_kernel,
)
from triton.backends.compiler import GPUTarget  # noqa: E402

from adamal_kernels.backends.triton import element  # noqa: E402
from adamal_kernels.backends.triton import long_rows as triton_long_rows  # noqa: E402
from adamal_kernels.backends.triton import rows as triton_rows  # noqa: E402
from adamal_kernels.core.bucket import BucketKey  # noqa: E402
from adamal_kernels.core.buffers import SecondMoment  # noqa: E402
from adamal_kernels.core.storage import Format, compute_dtype  # noqa: E402

pytestmark = pytest.mark.skipif(
    element.interpreted() is not False, reason="TRITON_INTERPRET is set"
)

_LONG: dict[str, dict[str, str]] = {
    "size": {"long_items": "*i32", "firsts": "*fp64"},
    "begin": {"states": "*i32", "scales": "*fp64", "firsts": "*fp64"},
    "evaluate": {
        "long_items": "*i32",
        "states": "*i32",
        "firsts": "*fp64",
        "seconds": "*fp64",
    },
    "continue": {
        "states": "*i32",
        "scales": "*fp64",
        "firsts": "*fp64",
        "seconds": "*fp64",
    },
    "finish": {"states": "*i32", "scales": "*fp64"},
    "apply": {"long_items": "*i32", "states": "*i32", "scales": "*fp64"},
}
KERNELS = [*(f"rows of up to {most}" for most in triton_rows.TILES), *_LONG]
every_kernel = pytest.mark.parametrize("name", KERNELS)


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile afresh: a cached kernel may come from another compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def compile_projection(
    name: str,
    dtypes: Format,
    target: GPUTarget,
    second_moment: SecondMoment = SecondMoment.MONOTONE,
    *,
    device_scalars: bool = False,
) -> Any:
    """Compile one of ``KERNELS`` as the launcher does."""
    key = BucketKey(
        torch.device("cuda", 0), dtypes, second_moment, device_scalars, None, coupled=True
    )
    scalars = "*fp64" if compute_dtype(dtypes.param) == torch.float64 else "*fp32"
    pointers = {"tensors": "*i64", "sets": "*i64", "inputs": "*i64", "scalars": scalars}
    if name in _LONG:
        kernel = getattr(triton_long_rows, f"{name}_kernel")
        constants = triton_long_rows.constants(key)
        return compile_kernel(
            kernel, {**pointers, "long_rows": "*i64", **_LONG[name]}, constants, target
        )
    constants = triton_rows.constants(key, triton_rows.TILES[int(name.split()[-1])])
    return compile_kernel(
        triton_rows.project_kernel, {**pointers, "items": "*i32"}, constants, target
    )


def operations_of(ptx: str) -> set[tuple[str, str]]:
    """Return the kinds and types of operations; fail if one is fused, flushed or not rounded."""
    assert not re.search(r"\bfma\.|\bmad\.\S*f(32|64)|\.approx|\.full|\.ftz", ptx)
    found = re.findall(
        r"^\s*(?:@!?%p\d+ )?(add|sub|mul|div|sqrt)((?:\.\w+)*)\.(f32|f64)\S*\s", ptx, re.MULTILINE
    )
    assert {rounding for _, rounding, _ in found} <= {".rn"}
    return {(kind, dtype) for kind, _, dtype in found}


def check_cuda(name: str, dtypes: Format, target: GPUTarget, folder: Path) -> None:
    """Check that all is rounded, nothing spilled, and that two programs fit a multiprocessor."""
    kernel = compile_projection(name, dtypes, target)
    ptx = kernel.asm["ptx"]
    found = operations_of(ptx)
    compute = "f64" if dtypes.param == torch.float64 else "f32"
    in_float64 = {(kind, "f64") for kind in ("add", "sub", "mul", "div", "sqrt")}
    metric = {("sqrt", compute), ("div", compute), ("add", compute)}
    sums = in_float64 - {("div", "f64"), ("sqrt", "f64")}
    elements = in_float64 - {("sqrt", "f64")} | metric
    assert found == {
        # Whether a row is in its set takes no metric, which is another stream.
        "size": sums,
        "begin": sums,
        "evaluate": elements,
        "continue": in_float64,
        "apply": elements,
    }.get(name, in_float64 | metric)
    # 1e-100, where the metric is too small, whatever the parameter's type.
    assert ("0d2B2BFF2EE48E0530" in ptx) == (name not in ("size", "begin", "continue"))

    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "LOCAL:0" in usage
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    # The last is rare, and only one program a row.
    assert registers <= (255 if name == "finish" else 128)


@every_kernel
@pytest.mark.parametrize("target", [SM80, SM90, SM100], ids=["sm_80", "sm_90", "sm_100"])
def test_float32(target: GPUTarget, name: str, tmp_path: Path) -> None:
    check_cuda(name, FLOAT32, target, tmp_path)


@every_kernel
def test_float64(name: str, tmp_path: Path) -> None:
    check_cuda(name, FLOAT64, SM90, tmp_path)


@pytest.mark.parametrize("name", [KERNELS[0], "apply"])
def test_bfloat16(name: str, tmp_path: Path) -> None:
    check_cuda(name, BFLOAT16, SM90, tmp_path)


@pytest.mark.parametrize("second_moment", [SecondMoment.PLAIN, SecondMoment.AMSGRAD])
@pytest.mark.parametrize("name", [KERNELS[0], "evaluate"])
def test_scalars_of_the_device(second_moment: SecondMoment, name: str) -> None:
    kernel = compile_projection(name, FLOAT32, SM90, second_moment, device_scalars=True)
    operations_of(kernel.asm["ptx"])


@every_kernel
def test_gfx942(name: str) -> None:
    kernel = compile_projection(name, FLOAT32, GFX942)
    assert kernel.asm["amdgcn"]
    assert not re.search(
        r"llvm\.fmuladd|!fpmath|\b(contract|fast|afn|arcp|reassoc)\b", kernel.asm["llir"]
    )
