"""Parity on the GPU: cuda and triton against the bits of ``cpu``, in several processes.

``cpu`` steps the same cases a hundred times faster than eager kernels on the GPU would, and is
itself held to ``reference`` wherever the suite runs. Triton compiles what its cases need, in all
processes at once, into the cache that everything after this reads.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from adamal_kernels.backends import BACKENDS
from adamal_kernels.core.bucket import BucketKey
from adamal_kernels.core.buffers import SecondMoment
from adamal_kernels.core.storage import FORMATS
from adamal_kernels.verify import Values, different_values, run_case
from adamal_kernels.verify.cases import STEPS, Case, cases

from ..paper.workers import run_jobs
from .records import append

_QUICK = "default"


class Job(NamedTuple):
    """The cases of a pair of types and a second moment: what shares its compiled kernels."""

    pair: int
    second_moment: SecondMoment
    is_quick: bool
    steps: int
    backends: tuple[str, ...]
    device: str
    results: Path
    section: str

    def cases(self) -> Iterator[Case]:
        """Yield the cases; only the first, if quick."""
        for case in cases():
            is_mine = (case.dtypes, case.second_moment) == (
                FORMATS[self.pair],
                self.second_moment,
            )
            if is_mine and (not self.is_quick or case.variant == _QUICK):
                yield case


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare what was asked for and return the exit status: 1 where anything differs."""
    parser = argparse.ArgumentParser(prog="parity", description=__doc__)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--section", required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--steps", type=int, default=STEPS, help="of each case, 2 or more")
    parser.add_argument("--quick", action="store_true", help="only the cases of default options")
    parser.add_argument("--backend", action="append", help="default: cuda and triton")
    parser.add_argument("--device", default="cuda:0")
    chosen = parser.parse_args(arguments)
    jobs = [
        Job(
            pair,
            second_moment,
            chosen.quick,
            chosen.steps,
            tuple(chosen.backend or ("cuda", "triton")),
            chosen.device,
            chosen.results,
            chosen.section,
        )
        for pair in range(len(FORMATS))
        for second_moment in SecondMoment
    ]
    passed = failed = 0
    for _, (of_job, failures) in run_jobs(compare, jobs, chosen.workers):
        passed += of_job
        failed += len(failures)
        print("".join(f"{failure}\n" for failure in failures), end="", flush=True)
    print(f"{passed} cases have the bits of cpu, {failed} have not")
    return 0 if passed and not failed else 1


def compare(job: Job) -> tuple[int, list[str]]:
    """Run a job, recording each case; return how many passed, and what is wrong."""
    passed, failures = 0, []
    for case in job.cases():
        expected = run_case(case, "cpu", "cpu", job.steps)
        for backend in job.backends:
            wrong = _differences(case, backend, torch.device(job.device), job.steps, expected)
            values = {"backend": backend, "case": case.name, "steps": job.steps}
            append(job.results, job.section, failed=bool(wrong), wrong=wrong, **values)
            passed += not wrong
            failures += [f"{backend}, {case.name}: {what}" for what in wrong]
    return passed, failures


def _differences(
    case: Case, backend: str, device: torch.device, steps: int, expected: Values
) -> list[str]:
    key = BucketKey(device, case.dtypes, case.second_moment)
    if reason := BACKENDS[backend].unavailable(device) or BACKENDS[backend].unsupported(key):
        return [reason]
    try:
        return different_values(run_case(case, backend, device, steps), expected)
    except Exception as error:  # Whatever it is: the other cases still have to be seen.
        return [f"raised {type(error).__name__}: {error}"]


if __name__ == "__main__":
    sys.exit(main())
