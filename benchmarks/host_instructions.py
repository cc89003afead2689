"""Guards the host's work per tensor: instructions counted by callgrind, which no noise moves.

    python benchmarks/host_instructions.py            # compares with host_instructions.json
    python benchmarks/host_instructions.py --record   # counts anew and writes it

Counts the instructions of one steady-state ``step()`` over 2000 tensors of 16 elements, the
elements' own arithmetic included, on the cpu backend and one thread, with gradients that moved
since the last step. Each Python version has a record of its own, of the environment that ``make``
gives it: ``make bench-check`` and ``make newest-bench-check``. Needs valgrind.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_suffix(".json")
TOLERANCE = 0.03
TENSORS = 2000
ELEMENTS = 16
STEPS = 3
CASES = {"2000 x 16": False, "2000 groups of 1 x 16": True}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name}")
    parser.add_argument("--inside-valgrind", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.inside_valgrind:
        step_between_dumps()
        return 0
    missing = [tool for tool in ("valgrind", "callgrind_control") if shutil.which(tool) is None]
    if missing:
        print(
            f"bench-check needs {' and '.join(missing)}, not found on PATH: "
            "install valgrind (Debian, Ubuntu: apt-get install valgrind)",
            file=sys.stderr,
        )
        return 2
    found = {"instructions_a_tensor": count(), "environment": environment()}
    records = json.loads(RECORD.read_text())
    version = found["environment"]["python"].rpartition(".")[0]
    if chosen.record:
        RECORD.write_text(json.dumps({**records, version: found}, indent=2) + "\n")
        print(f"wrote {RECORD}, Python {version}: {found['instructions_a_tensor']}")
        return 0
    if version not in records:
        print(
            f"no record for Python {version}, only for {', '.join(records)}: --record on the code "
            "before the change, then compare",
            file=sys.stderr,
        )
        return 2
    lines, passed = compare(found, records[version])
    print("\n".join(lines))
    return 0 if passed else 1


def compare(found: dict[str, Any], recorded: dict[str, Any]) -> tuple[list[str], bool]:
    """Return what to print, and whether no case takes more instructions than recorded."""
    lines = []
    passed = True
    for case, before in recorded["instructions_a_tensor"].items():
        now = found["instructions_a_tensor"][case]
        change = now / before - 1
        line = f"{case}: {now:.0f} instructions a tensor, {before:.0f} recorded ({change:+.1%})"
        if change > TOLERANCE:
            passed = False
            line += f": MORE than the {TOLERANCE:.0%} allowed"
        elif change < -TOLERANCE:
            line += ": fewer; keep that with --record"
        lines.append(line)
    if found["environment"] != recorded["environment"]:
        lines.append(
            f"recorded with {recorded['environment']}, counted with {found['environment']}: other "
            "versions count otherwise; --record on the code before the change, then compare"
        )
    return lines, passed


def environment() -> dict[str, str]:
    """Return what a count depends on besides this package."""
    import torch

    from adamal_kernels.build_info import extension_record

    return {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiler": extension_record("_C").compiler or "unknown",
    }


def count() -> dict[str, float]:
    """Run this file in valgrind; return the instructions a tensor takes, by case."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "valgrind",
            "--tool=callgrind",
            "--instr-atstart=no",
            f"--callgrind-out-file={folder}/out",
            sys.executable,
            __file__,
            "--inside-valgrind",
        ]
        # One thread: the others' waiting would count. A fixed seed: sets and dicts in one order.
        settings = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        done = subprocess.run(
            command, env={**os.environ, **settings}, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"valgrind failed ({done.returncode}):\n{done.stderr[-2000:]}")
        dumps = [file.read_text() for file in Path(folder).glob("out.*")]
    counts: dict[str, list[int]] = {}
    for dump in dumps:
        trigger = re.search(r"^desc: Trigger: dump (.+)$", dump, re.MULTILINE)
        total = re.search(r"^summary: (\d+)$", dump, re.MULTILINE)
        if trigger and total:
            counts.setdefault(trigger[1].strip(), []).append(int(total[1]))
    # What taking a dump itself takes.
    nothing = statistics.median(counts["nothing"])
    return {case: round((statistics.median(counts[case]) - nothing) / TENSORS, 1) for case in CASES}


def step_between_dumps() -> None:
    """Dump the counter before and after every step that counts."""
    import torch

    from adamal_kernels import AdamAL

    for case, group_each in CASES.items():
        params = [torch.zeros(ELEMENTS, requires_grad=True) for _ in range(TENSORS)]
        grads = [[torch.ones(ELEMENTS) for _ in params] for _ in range(2)]
        groups = [{"params": [param]} for param in params] if group_each else params
        optimizer = AdamAL(groups, backend="cpu")
        for step in range(3 + STEPS):
            for param, grad in zip(params, grads[step % 2], strict=True):
                param.grad = grad
            if step < 3:  # Made, bound, and repeated once.
                optimizer.step()
                continue
            callgrind("--instr=on")  # Only now: all else would take minutes.
            callgrind("--dump=before")
            callgrind("--dump=nothing")
            optimizer.step()
            callgrind(f"--dump={case}")
            callgrind("--instr=off")


def callgrind(command: str) -> None:
    subprocess.run(
        ["callgrind_control", command, str(os.getpid())], check=True, stdout=subprocess.DEVNULL
    )


if __name__ == "__main__":
    sys.exit(main())
