"""``python -m benchmarks.gpu_check``: everything that takes a GPU, within a budget of time."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .machine import PLANNED, NoGpuError, probe
from .records import append
from .runner import ROOT, Runner, Section
from .sections import results_file, sections

_RESULTS = Path("benchmarks", "results")
_PYTHON = (sys.executable, "-u")


def _parser(names: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpu-check",
        description="Check and measure on an NVIDIA GPU, with the packages of this Python and "
        "without a network. The most valuable comes first; what does not fit the time left is "
        f"named. Sections, in their order: {', '.join(names)}.",
        epilog="Results are appended to gpu-check-DEVICE.jsonl as they come, what is printed goes "
        "to gpu-check-DEVICE.log as well, and the last lines are a table. Exit status: 0 if "
        "nothing failed, though the last three sections, which fill the time left, may have ended "
        "early or not begun; 1 if a section failed, or was killed for taking far too long; 2 "
        "without a GPU, or for bad arguments; 3 if nothing failed and a section before the last "
        "three was not reached or cut off; 128 and the signal's number after SIGTERM or SIGINT.",
    )
    parser.add_argument(
        "--budget",
        default="540",
        metavar="SECONDS",
        help="after which all has ended. Default: %(default)s",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"for the results; made where it is missing. Default: {_RESULTS}",
    )
    parser.add_argument(
        "--section",
        action="append",
        metavar="NAME",
        help="run only this one; may be given more than once. What it needs is taken as there",
    )
    parser.add_argument(
        "--plan", action="store_true", help="run nothing: show the sections; needs no GPU"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check and return the exit status."""
    begin = time.monotonic()
    names = [section.name for section in sections(PLANNED, _RESULTS, _PYTHON)]
    parser = _parser(names)
    chosen = parser.parse_args(arguments)
    listed = f"sections: {', '.join(names)}"
    try:
        budget = float(chosen.budget)
    except ValueError:
        budget = math.nan
    if not 0 < budget < math.inf:
        parser.error(f"--budget {chosen.budget}: give a number of seconds above 0; {listed}")
    for name in chosen.section or ():
        if name not in names:
            parser.error(f"--section {name}: unknown; {listed}")
    wanted = chosen.section or names
    out = ROOT / _RESULTS if chosen.out is None else chosen.out.resolve()
    if chosen.plan:
        print(plan([s for s in sections(PLANNED, out, _PYTHON) if s.name in wanted], budget))
        return 0
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {out}: cannot be made a folder: {error.strerror}")
    try:
        machine = probe(_PYTHON)
    except NoGpuError as error:
        print(
            f"gpu-check needs an NVIDIA GPU and a CUDA build of torch in {sys.executable} (or "
            f"PYTHON=...): {error}",
            file=sys.stderr,
        )
        return 2
    results = results_file(machine, out)
    append(results, "", record="run", budget=budget, sections=wanted, machine=asdict(machine))
    print(f"{machine.gpu}; driver {machine.driver}; {dict(machine.versions)}")
    for what in machine.missing:
        print(f"not found: {what}")
    chosen_sections = [s for s in sections(machine, out, _PYTHON) if s.name in wanted]
    return Runner(chosen_sections, results, results.with_suffix(".log"), begin + budget).run()


def plan(chosen: Sequence[Section], budget: float) -> str:
    """Return the sections as text: name, seconds expected and at most, what for, and command."""
    lines = [f"gpu-check within {budget:g} s; seconds expected, and those after which it is killed"]
    for section in chosen:
        limit = "all left" if section.is_rest else f"{section.limit:.0f}"
        lines += [
            f"\n{section.name:12} {section.expected:4.0f} {limit:>8}  {section.title}"
            + (f"; needs {', '.join(section.needs)}" if section.needs else ""),
            f"    {shlex.join(section.command_for(section.expected))}",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
