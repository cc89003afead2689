"""compute-sanitizer's memcheck over our kernels, and proof that it sees them.

Each backend's cases run beside its canary, a step over a tensor that claims more memory than it
has: where memcheck does not report that, it has looked at nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .records import append
from .runner import LEFT_OUT, ROOT

_ERRORS_FOUND = 9
# Of their mangled names; torch's kernels are left alone, which would take minutes.
_KERNELS = {"cuda": "kns=adamal", "triton": "regex=^[a-z_]+_kernel$"}


def main() -> int:
    """Run everything under the sanitizer, or, named by it, one backend's cases or canary."""
    parser = argparse.ArgumentParser(prog="memcheck", description=__doc__)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--section")
    parser.add_argument("--cases", metavar="BACKEND", help="step all cases; no sanitizer")
    parser.add_argument("--canary", metavar="BACKEND", help="step past a tensor's end")
    chosen = parser.parse_args()
    if chosen.cases:
        return run_cases(chosen.cases)
    if chosen.canary:
        return overrun(chosen.canary)
    return check(chosen.results, chosen.section)


def check(results: Path, section: str) -> int:
    """Run cases and canaries side by side; return the exit status."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(
        "/usr/local/cuda/bin/compute-sanitizer"
    )
    if sanitizer is None:
        append(results, section, left_out="compute-sanitizer was not found")
        print("compute-sanitizer was not found")
        return LEFT_OUT
    # Without torch's caching allocator every tensor has bounds of its own to step over.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    status = 0
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for backend, kernels in _KERNELS.items():
            for what in ("cases", "canary"):
                output = Path(folder, f"{backend}-{what}").open("w+")  # noqa: SIM115
                command = [
                    *(sanitizer, "--tool", "memcheck", "--report-api-errors", "no"),
                    *("--error-exitcode", str(_ERRORS_FOUND), "--kernel-name", kernels),
                    *(sys.executable, "-m", "benchmarks.gpu_check.memcheck", f"--{what}", backend),
                ]
                process = subprocess.Popen(
                    command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment
                )
                running.append((backend, what, process, output))
        for backend, what, process, output in running:
            found = process.wait()
            output.seek(0)
            text = output.read()
            is_right = found == (_ERRORS_FOUND if what == "canary" else 0)
            wrong = f"exit status {found}" if what == "cases" else "its overrun was not reported"
            append(
                results,
                section,
                backend=backend,
                what=what,
                failed=not is_right,
                wrong="" if is_right else f"{wrong}\n{text[-4000:]}",
            )
            print(f"{backend}, {what}: {'right' if is_right else wrong}", flush=True)
            if not is_right:
                print(text[-4000:], flush=True)
                status = 1
    return status


def run_cases(backend: str) -> int:
    """Take two steps, the second one watched, of every pair of types and second moment."""
    import torch

    from adamal_kernels.verify import run_case
    from adamal_kernels.verify.cases import cases

    for case in cases():
        if case.variant == "default":
            run_case(case, backend, "cuda:0", steps=2)
    torch.cuda.synchronize()
    return 0


class _Claim:
    """Device memory that says it is larger than it is."""

    def __init__(self, address: int, elements: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (elements,),
            "typestr": "<f4",
            "data": (address, False),
            "version": 2,
        }


def overrun(backend: str) -> int:
    """Step over memory that is not there; return 0 whatever comes of it."""
    import torch

    from adamal_kernels import AdamAL

    memory = torch.zeros(1024, device="cuda:0")
    claimed = torch.as_tensor(_Claim(memory.data_ptr(), 1 << 22), device="cuda:0")
    claimed.requires_grad_()
    claimed.grad = torch.ones(1 << 22, device="cuda:0")
    try:
        AdamAL([claimed], backend=backend).step()
        torch.cuda.synchronize()
    except RuntimeError as error:  # What the sanitizer makes of it.
        print(f"the step raised {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
