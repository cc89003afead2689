"""What nvcc makes of the watched CUDA step; the twin of ``test_cuda_machine_code.py``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.machine_code import (
    CAPACITIES,
    compile_cuda,
    needs_nvcc,
    parse_code,
    rounded_arithmetic,
)

from adamal_kernels.core.buffers import SecondMoment
from adamal_kernels.core.storage import FORMATS

pytestmark = needs_nvcc


@pytest.mark.parametrize("arch", ["sm_80", "sm_100"])
def test_watched_kernels(arch: str, tmp_path: Path) -> None:
    """Rounded and never fused, nothing spilled, wide accesses, room for two blocks."""
    ptx, report, sass = compile_cuda("cuda/watched_step", arch, tmp_path)
    assert {"div.rn.f32", "sqrt.rn.f32", "div.rn.f64", "sqrt.rn.f64"} <= rounded_arithmetic(ptx)
    assert set(re.findall(r"(\d+) bytes spill (?:stores|loads)", report)) == {"0"}
    kernels = [part.split("\n", 1) for part in sass.split("Function : ")[1:]]
    assert len(kernels) == len(FORMATS) * len(SecondMoment) * CAPACITIES
    for name, body in kernels:
        opcodes = [instruction.opcode for instruction in parse_code(body)]
        kinds = {opcode.split(".")[0] for opcode in opcodes}
        assert kinds.isdisjoint({"STL", "LDL", "ATOMG", "RED", "FFMA2"}), name
        assert opcodes.count("LDG.E.128") >= 8, name
        assert opcodes.count("BAR.SYNC.DEFER_BLOCKING") == 1, name
