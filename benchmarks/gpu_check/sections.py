"""The sections of the check, in their order: what a GPU alone can tell, first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .machine import Machine
from .runner import Section

__all__ = ["results_file", "sections"]

_HEADLINE = ("1xhuge", "300xlarge", "2000x16", "2000x2048")


def results_file(machine: Machine, out: Path) -> Path:
    """Return the file of the results' JSON lines."""
    return out / f"gpu-check-{machine.device}.jsonl"


def sections(machine: Machine, out: Path, python: Sequence[str]) -> list[Section]:
    """Return what is run on ``machine``, by ``python``, into the folder ``out``."""
    device, workers = "cuda:0", str(machine.workers)
    results = str(results_file(machine, out))

    def package(*arguments: str) -> tuple[str, ...]:
        return (*python, "-m", "adamal_kernels", *arguments)

    def program(name: str, *arguments: str) -> tuple[str, ...]:
        return (*python, "-m", f"benchmarks.gpu_check.{name}", *arguments)

    def recording(name: str, section: str, *arguments: str) -> tuple[str, ...]:
        return program(name, "--results", results, "--section", section, *arguments)

    def bench(file: str, *arguments: str) -> tuple[str, ...]:
        json = str(out / file)
        return package("bench", "--device", device, "--seconds", "{seconds}", "--json", json) + (
            arguments
        )

    only_headline = [word for name in _HEADLINE for word in ("--case", name)]
    return [
        Section("versions", "versions, and what can run here", package("info"), 5, 60),
        Section(
            "build",
            "_C and _cuda for this GPU alone, unless those that are there fit",
            program("build", "--arch", machine.arch),
            60,
            200,
        ),
        Section(
            "smoke",
            "every pair of types and second moment, two steps: cuda and triton have cpu's bits",
            recording("parity", "smoke", "--workers", workers, "--steps", "2", "--quick"),
            20,
            90,
            ("build",),
        ),
        Section(
            "parity",
            "every case: cuda and triton have cpu's bits; Triton compiles in all workers at once",
            recording("parity", "parity", "--workers", workers),
            90,
            180,
            ("build",),
        ),
        Section(
            "bench",
            "the headline cases against torch's fused Adam, v cold and saturated",
            bench(
                f"bench-{machine.device}-headline.json",
                *("--backend", "cuda", "--backend", "triton", "--peer", "torch-fused"),
                *("--dtype", "float32"),
                *only_headline,
            ),
            70,
            120,
            ("build",),
        ),
        Section(
            "tests",
            "the tests that need a GPU: streams, graphs and device scalars first",
            recording("tests", "tests", "--workers", workers),
            150,
            240,
            ("build",),
        ),
        Section(
            "memcheck",
            "compute-sanitizer over our kernels, two steps of every pair and second moment",
            recording("memcheck", "memcheck"),
            60,
            150,
            ("build",),
        ),
        Section(
            "all-bench",
            "every case of bench",
            bench(f"bench-{machine.device}.json"),
            20,
            3600,
            ("build",),
            is_rest=True,
        ),
        Section(
            "all-verify",
            "every case of verify against reference and the oracle, on the GPU",
            package(
                *("verify", "--device", device, "--seconds", "{seconds}"),
                *("--json", str(out / f"verify-{machine.device}.json")),
            ),
            20,
            3600,
            ("build",),
            is_rest=True,
        ),
        Section(
            "eager-tests",
            "the tests of foreach and reference on the GPU",
            recording("tests", "eager-tests", "--workers", workers, "--eager"),
            20,
            3600,
            ("build",),
            is_rest=True,
        ),
    ]
