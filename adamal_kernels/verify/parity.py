"""Parity: every backend bit for bit against one of them, and within tolerance of the oracle."""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from torch import Tensor

from ..backends import BACKENDS
from ..command_line import (
    JsonOutput,
    add_device,
    add_json,
    add_seconds,
    check_file,
    deadline,
    print_table,
)
from ..core.bucket import BucketKey
from ..core.buffers import SecondMoment
from ..optimizer import Adam, AdamAL
from ..projections import CoupledSet
from .cases import QUICK_STEPS, STEPS, Case, cases, quick_cases
from .oracle import Oracle, OracleOptions, is_within

__all__ = [
    "Outcome",
    "Verification",
    "add_arguments",
    "different_values",
    "main",
    "run_case",
    "same_bits",
]

_CPU = torch.device("cpu")
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Values = list[dict[str, Tensor]]


def run_case(case: Case, backend: str, device: torch.device | str, steps: int = STEPS) -> Values:
    """Run ``case`` with the optimizer and return every parameter and state tensor by name.

    The second half of the steps is watched; ``statistics`` are what was seen.
    """
    params = case.params(device)
    cls = AdamAL if case.second_moment is SecondMoment.MONOTONE else Adam
    optimizer = cls(case.groups(params), backend=backend)
    for step in range(steps):
        if step == steps // 2:
            watch = optimizer.watch()
        for param, grad in zip(params, case.grads(step, params), strict=True):
            param.grad = grad
        optimizer.step()
    seen = watch.read()
    return [
        {"param": p.detach(), "statistics": seen[p].as_tensor(), **optimizer.state[p]}
        for p in params
    ]


def run_oracle(case: Case, steps: int = STEPS) -> list[Oracle]:
    """Run ``case`` in the float64 oracle, one oracle a parameter; none where it has no say."""
    if not case.oracle:
        return []
    params = case.params()
    groups = case.groups(params)
    oracles = []
    for index, param in enumerate(params):
        group = groups[index % 2]
        options = {k: v for k, v in group.items() if k in OracleOptions._fields}
        if "betas" in group:
            options["beta1"], options["beta2"] = group["betas"]
        if group.get("projection") is not None:
            options["lower"], options["upper"] = group["projection"].bounds(param.dtype)
            if isinstance(group["projection"], CoupledSet):
                options["coupled"] = group["projection"]
        oracles.append(Oracle(param, OracleOptions(case.second_moment, **options)))
    for step in range(steps):
        for oracle, grad in zip(oracles, case.grads(step, params), strict=True):
            if grad is not None:
                oracle.step(grad)
    return oracles


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have equal types, shapes and bits; any NaN equals any NaN.

    Example:
        >>> same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
        False
    """
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    a, b = (torch.view_as_real(t) if t.is_complex() else t for t in (first, second))
    a, b = (t.detach().cpu().contiguous() for t in (a, b))
    integer = _INTEGERS[a.element_size()]
    equal = a.view(integer) == b.view(integer)
    return bool((equal | (a.isnan() & b.isnan())).all())


def different_values(found: Values, expected: Values) -> list[str]:
    """Return the names of the values whose bits differ, as ``params[i].name``."""
    different = []
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if ours.keys() != theirs.keys():
            different.append(f"params[{i}] has {sorted(ours)} instead of {sorted(theirs)}")
            continue
        different += [
            f"params[{i}].{name}" for name in ours if not same_bits(ours[name], theirs[name])
        ]
    return different


def outside_tolerance(found: Values, oracles: list[Oracle]) -> list[str]:
    """Return the names of the values that are not within the oracle's tolerance."""
    return [
        f"params[{i}].{name}"
        for i, (values, oracle) in enumerate(zip(found, oracles, strict=bool(oracles)))
        if oracle.steps
        for name, expected in oracle.expected().items()
        if not is_within(values[name], expected, oracle.tolerance(name))
    ]


def devices() -> list[torch.device]:
    """Return the devices there are to check on: the CPU and the first CUDA device."""
    found = [_CPU]
    if torch.cuda.is_available():
        found.append(torch.device("cuda", 0))
    return found


def places(
    names: Iterable[str], device: torch.device | None = None
) -> list[tuple[str, torch.device]]:
    """Return the backends ``names``, each with the devices it is made for or can run on.

    Args:
        names: the backends.
        device: the only one. Default: the CPU and the first CUDA device, which is among them where
            there is none, for a backend to say what it lacks.
    """
    present = devices() if device is None else [device]
    asked = dict.fromkeys([*present, torch.device("cuda", 0)]) if device is None else present
    return [
        (name, place)
        for name in names
        for place in asked
        if (place in present and BACKENDS[name].unavailable(place) is None)
        or place.type in (BACKENDS[name].device_types or ())
    ]


@dataclass
class Outcome:
    """What a :class:`Verification` found of one backend on one device."""

    backend: str
    device: str
    left_out: str | None = None
    """Why the backend cannot run here at all; nothing was checked then."""
    passed: int = 0
    mismatches: dict[str, list[str]] = field(default_factory=dict)
    """By case: the values that differ, or what was raised."""
    unsupported: dict[str, str] = field(default_factory=dict)
    """By case: why the backend does not take it."""

    @property
    def checked(self) -> int:
        """How many cases were compared."""
        return self.passed + len(self.mismatches)


class Verification:
    """A check of backends over cases, and what it found so far.

    Args:
        backends: their names. Default: all that are made for the devices.
        device: the only one to check on. Default: the CPU, and the first CUDA device if there is
            one.
        table: the cases. Default: all of :func:`adamal_kernels.verify.cases.cases`.
        steps: steps a case takes, at least 1.
        against: the backend whose bits are the measure: ``"reference"`` on each device, or
            ``"cpu"``, on the CPU whatever the device.

    Example:
        >>> check = Verification(["foreach"], device=torch.device("cpu"), steps=2)
        >>> check.run(check.cases[0])
        >>> check.outcomes[0].passed, len(check.cases) - len(check.not_reached)
        (1, 1)
    """

    def __init__(
        self,
        backends: Sequence[str] | None = None,
        *,
        device: torch.device | None = None,
        table: Iterable[Case] | None = None,
        steps: int = STEPS,
        against: str = "reference",
    ) -> None:
        self.cases = list(cases() if table is None else table)
        self.not_reached = list(self.cases)
        self.steps = steps
        self.against = against
        if backends is None:
            placed = places(BACKENDS, device)
        elif device is None:
            placed = places(dict.fromkeys(backends))
        else:
            placed = [(name, device) for name in dict.fromkeys(backends)]
        self.outcomes = [
            Outcome(name, str(place), BACKENDS[name].unavailable(place)) for name, place in placed
        ]
        able = {outcome.backend for outcome in self.outcomes if outcome.left_out is None}
        self.refused = {
            outcome.backend: outcome.left_out
            for outcome in self.outcomes
            if outcome.left_out is not None and backends is not None and outcome.backend not in able
        }
        """By backend that was asked for and runs on none of the devices: why."""
        if reason := BACKENDS[against].unavailable(_CPU):
            self.refused[against] = reason
        self.can_check = bool(able) and against not in self.refused
        """Whether there is anything to compare, and to compare it with."""

    @property
    def checked(self) -> int:
        """How many comparisons were made: a case on one backend and device is one."""
        return sum(outcome.checked for outcome in self.outcomes)

    @property
    def agrees(self) -> bool:
        """Whether something was checked, and all that was asked for is right."""
        if not self.checked or self.refused:
            return False
        return not any(outcome.mismatches for outcome in self.outcomes)

    def run(self, case: Case) -> None:
        """Check every backend on ``case``. What a backend raises is a mismatch."""

        @functools.cache
        def expected(device: torch.device) -> Values:
            return run_case(case, self.against, device, self.steps)

        @functools.cache
        def oracles() -> list[Oracle]:
            return run_oracle(case, self.steps)

        for outcome in self.outcomes:
            if outcome.left_out is not None:
                continue
            device = torch.device(outcome.device)
            key = BucketKey(device, case.dtypes, case.second_moment)
            if reason := BACKENDS[outcome.backend].unsupported(key):
                outcome.unsupported[case.name] = reason
                continue
            measure = _CPU if self.against == "cpu" else device
            try:
                found = run_case(case, outcome.backend, device, self.steps)
                wrong = [
                    f"{name} differs from {self.against}"
                    for name in different_values(found, expected(measure))
                ]
                wrong += [
                    f"{name} is far from the oracle" for name in outside_tolerance(found, oracles())
                ]
            # The other cases still count: a compiler may fail in one of them alone.
            except Exception as error:
                wrong = [f"raised {type(error).__name__}: {error}"]
            if wrong:
                outcome.mismatches[case.name] = wrong
            else:
                outcome.passed += 1
        self.not_reached.remove(case)


def report(check: Verification, console: Console) -> None:
    """Print the outcomes as a table, every mismatch, and what was not reached."""
    rows = []
    for outcome in check.outcomes:
        if outcome.left_out is not None:
            remark = escape(f"cannot: {outcome.left_out}")
            rows.append([outcome.backend, outcome.device, "-", "-", remark])
            continue
        remark = ""
        if outcome.unsupported:
            reasons = ", ".join(sorted(set(outcome.unsupported.values())))
            remark = escape(f"{len(outcome.unsupported)} cases left out: {reasons}")
        bad = len(outcome.mismatches)
        shown = f"[red]{bad}[/red]" if bad else "[green]0[/green]"
        rows.append([outcome.backend, outcome.device, str(outcome.checked), shown, remark])
    print_table(
        console,
        f"Parity over {check.steps} steps: bits against {check.against}, values against oracle",
        ["backend", "device", "cases", "mismatches", ""],
        rows,
        wrapped=4,
    )
    for outcome in check.outcomes:
        for name, wrong in outcome.mismatches.items():
            console.print(f"[red]{outcome.backend} on {outcome.device}[/red], {name}:")
            console.print("    " + "\n    ".join(wrong), highlight=False, markup=False)
    if check.not_reached:
        console.print(
            f"[yellow]NOT REACHED: {len(check.not_reached)} of {len(check.cases)} cases[/yellow]",
            highlight=False,
        )
    if not check.checked:
        console.print("[red]nothing was checked[/red]")


def as_json(check: Verification) -> dict[str, Any]:
    """Return the check, as far as it has come, as what ``verify --json`` writes."""
    return {
        "torch": torch.__version__,
        "steps": check.steps,
        "against": check.against,
        "cases": [case.name for case in check.cases],
        "not_reached": [case.name for case in check.not_reached],
        "ok": check.agrees,
        "outcomes": [asdict(outcome) for outcome in check.outcomes],
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``verify``."""
    parser.description = (
        "Exit status: 0 if everything that was checked agrees; 1 on any mismatch, if a backend "
        "that was named cannot run here, or if nothing was checked; 130 after Ctrl-C."
    )
    parser.add_argument(
        "--backend",
        action="append",
        choices=list(BACKENDS),
        metavar="NAME",
        help=f"check only this one; may be given more than once: {', '.join(BACKENDS)}",
    )
    add_device(
        parser, "check only on this one, such as cpu or cuda:0. Default: cpu, and cuda:0 if any"
    )
    parser.add_argument(
        "--case",
        action="append",
        metavar="NAME",
        help="check only the case of this name, or those that match it as a shell's pattern, such "
        "as '*bfloat16*'; may be given more than once. --json lists all names",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_STEPS} steps instead of {STEPS}; without --case, of a few cases in which "
        "every pair of types, second moment and variant occurs: seconds on the cpu backend",
    )
    parser.add_argument(
        "--against",
        choices=("reference", "cpu"),
        default="reference",
        help="the backend whose bits are the measure: reference on each device, or cpu on the CPU, "
        "which takes a GPU no launches. Default: reference",
    )
    add_seconds(
        parser,
        "start no case after N seconds; the others are counted, and listed in --json, as not "
        "reached. Default: no limit",
    )
    add_json(parser)


def _chosen_cases(chosen: argparse.Namespace) -> list[Case]:
    """Return the cases that ``--case`` and ``--quick`` ask for, in the table's order."""
    if not chosen.case:
        return list(quick_cases() if chosen.quick else cases())
    table = list(cases())
    names = [case.name for case in table]
    for pattern in chosen.case:
        if any(fnmatchcase(name, pattern) for name in names):
            continue
        holding = [name for name in names if pattern in name]
        closest = holding or get_close_matches(pattern, names, cutoff=0)
        advice = f"'*{pattern}*' matches {len(holding)}; " if holding else ""
        listed = "".join(f"\n  {name}" for name in closest[:3])
        chosen.parser.error(
            f"--case {pattern!r} is no case's name, and matches none; {advice}the closest:{listed}"
        )
    return [case for case in table if any(fnmatchcase(case.name, p) for p in chosen.case)]


def main(chosen: argparse.Namespace, console: Console) -> int:
    """Check what was chosen, and return the exit status.

    The file of ``--json`` is written anew after each case.
    """
    end = deadline(chosen.seconds)
    table = _chosen_cases(chosen)
    check_file(chosen.parser, "--json", chosen.json)
    check = Verification(
        chosen.backend,
        device=chosen.device,
        table=table,
        steps=QUICK_STEPS if chosen.quick else STEPS,
        against=chosen.against,
    )
    output = JsonOutput(chosen.json, lambda: as_json(check))
    for name, reason in check.refused.items():
        console.print(f"[red]{name} was asked for and cannot run here[/red]: {escape(reason)}")
    if not check.can_check:
        output.finish()
        return 1
    output.update()
    interrupted = False
    try:
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            for case in progress.track(table, description="verify"):
                if time.monotonic() >= end:
                    break
                check.run(case)
                output.update()
    except KeyboardInterrupt:
        interrupted = True
    report(check, console)
    output.finish()
    if interrupted:
        return 130
    return 0 if check.agrees else 1
