"""What the watched Triton step compiles to; the twin of ``test_triton_compile.py``."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch

from adamal_kernels.core.bucket import BucketKey
from adamal_kernels.core.buffers import SecondMoment
from adamal_kernels.core.storage import Format, compute_dtype

triton = pytest.importorskip("triton")

from helpers import triton_compiling as compiling  # noqa: E402
from helpers.triton_compiling import FLOAT32, GFX942, SM80, SM90, SM100  # noqa: E402

from adamal_kernels.backends.triton import element  # noqa: E402
from adamal_kernels.backends.triton import watch as triton_watch  # noqa: E402

pytestmark = compiling.not_interpreted


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def compile_watched(
    dtypes: Format, second_moment: SecondMoment, target: object, *, device_scalars: bool = False
) -> object:
    key = BucketKey(torch.device("cuda", 0), dtypes, second_moment, device_scalars)
    constants = element.constants(key, target, aligned=True)
    pointers = {
        "tensors": "*i64",
        "items": "*i32",
        "inputs": "*i64",
        "scalars": "*fp64" if compute_dtype(dtypes.param) is torch.float64 else "*fp32",
        "records": "*i64",
    }
    return compiling.compile_kernel(triton_watch.watched_step_kernel, pointers, constants, target)


@compiling.every_moment
@compiling.some_pairs
@pytest.mark.parametrize("target", [SM80, SM90, SM100], ids=["sm_80", "sm_90", "sm_100"])
def test_cuda_targets(target: object, dtypes: Format, second_moment: SecondMoment) -> None:
    """Wide accesses and rounded arithmetic, as in a step that is not watched."""
    ptx = compile_watched(dtypes, second_moment, target).asm["ptx"]
    assert not re.search(r"\bfma\.|\bmad\.\S*f(32|64)|\.approx|\.full|\.ftz", ptx)
    assert "mul.rn.f32x2" not in ptx
    kinds = set(re.findall(r"\b((?:add|sub|mul|div|sqrt)(?:\.\w+)*)\.f(?:32|64)", ptx))
    assert kinds == {"add.rn", "sub.rn", "mul.rn", "div.rn", "sqrt.rn"}
    streams = compiling.stream_bytes(dtypes, second_moment, target)
    wide = re.findall(r"ld\.global\.(?:\w+\.)*?v\d\.[bf]\d+", ptx)
    assert len(wide) >= sum(sum(compiling.accesses_of(size).values()) for size in streams.values())


@pytest.mark.parametrize("device_scalars", [False, True])
def test_gfx942(device_scalars: bool) -> None:
    kernel = compile_watched(FLOAT32, SecondMoment.MONOTONE, GFX942, device_scalars=device_scalars)
    assert not re.search(r"llvm\.fmuladd|!fpmath|\b(contract|fast|afn|arcp)\b", kernel.asm["llir"])
