"""Parity: every backend bit for bit against ``reference``, which is held to the oracle."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from .backends import BACKENDS
from .bucket import BucketKey, SecondMoment
from .cases import STEPS, Case, cases
from .optimizer import Adam, AdamAL
from .oracle import Oracle, OracleOptions, is_within
from .projections import CoupledSet

__all__ = ["Outcome", "different_values", "run_case", "same_bits", "verify"]

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


@dataclass
class Outcome:
    """What :func:`verify` found of one backend on one device."""

    backend: str
    device: str
    left_out: str | None = None
    """Why the backend cannot run here at all; nothing was checked then."""
    passed: int = 0
    mismatches: dict[str, list[str]] = field(default_factory=dict)
    """By case: the values that differ."""
    unsupported: dict[str, str] = field(default_factory=dict)
    """By case: why the backend does not take it."""


def devices() -> list[torch.device]:
    """Return the devices there are to check on: the CPU and the first CUDA device."""
    found = [torch.device("cpu")]
    if torch.cuda.is_available():
        found.append(torch.device("cuda", 0))
    return found


def places(names: Iterable[str]) -> list[tuple[str, torch.device]]:
    """Return the backends ``names``, each with the devices it is made for or can run on.

    The first CUDA device is among them where there is none, for a backend to say what it lacks.
    """
    found = devices()
    first_gpu = torch.device("cuda", 0)
    return [
        (name, device)
        for name in names
        for device in dict.fromkeys([*found, first_gpu])
        if (device in found and BACKENDS[name].unavailable(device) is None)
        or device.type in (BACKENDS[name].device_types or ())
    ]


def verify(
    backends: Iterable[str] | None = None, *, steps: int = STEPS, progress: Progress | None = None
) -> list[Outcome]:
    """Check backends over the whole table of cases.

    Args:
        backends: their names; all by default.
        steps: steps a case takes, at least 1.
        progress: where to show how far it is.

    Returns:
        An outcome for each backend and device, also for backends that cannot run here.
    """
    names = list(backends) if backends is not None else list(BACKENDS)
    found_devices = devices()
    outcomes = {
        (name, device): Outcome(name, str(device), BACKENDS[name].unavailable(device))
        for name, device in places(names)
    }
    table = list(cases())
    task = progress.add_task("verify", total=len(table) * len(found_devices)) if progress else None
    for case in table:
        oracles = run_oracle(case, steps)
        for device in found_devices:
            reference = run_case(case, "reference", device, steps)
            for (_, place), outcome in outcomes.items():
                if place == device and outcome.left_out is None:
                    _check(case, outcome, device, reference, oracles, steps)
            if progress and task is not None:
                progress.advance(task)
    return list(outcomes.values())


def _check(
    case: Case,
    outcome: Outcome,
    device: torch.device,
    reference: Values,
    oracles: list[Oracle],
    steps: int,
) -> None:
    key = BucketKey(device, case.dtypes, case.second_moment)
    if reason := BACKENDS[outcome.backend].unsupported(key):
        outcome.unsupported[case.name] = reason
        return
    found = run_case(case, outcome.backend, device, steps)
    wrong = [f"{name} differs from reference" for name in different_values(found, reference)]
    wrong += [f"{name} is far from the oracle" for name in outside_tolerance(found, oracles)]
    if wrong:
        outcome.mismatches[case.name] = wrong
    else:
        outcome.passed += 1


def report(outcomes: list[Outcome], console: Console) -> bool:
    """Print the outcomes as a table; return whether there was no mismatch."""
    table = Table(title=f"Parity over {STEPS} steps: bits against reference, values against oracle")
    for header in ("backend", "device", "cases", "mismatches", ""):
        table.add_column(header)
    for outcome in outcomes:
        if outcome.left_out is not None:
            table.add_row(outcome.backend, outcome.device, "-", "-", f"cannot: {outcome.left_out}")
            continue
        remarks = sorted(set(outcome.unsupported.values()))
        if outcome.unsupported:
            remarks = [f"{len(outcome.unsupported)} cases left out: {', '.join(remarks)}"]
        bad = len(outcome.mismatches)
        table.add_row(
            outcome.backend,
            outcome.device,
            str(outcome.passed + bad),
            f"[red]{bad}[/red]" if bad else "[green]0[/green]",
            "; ".join(remarks),
        )
    console.print(table)
    for outcome in outcomes:
        for name, wrong in outcome.mismatches.items():
            console.print(f"[red]{outcome.backend} on {outcome.device}[/red], {name}:")
            console.print("    " + "\n    ".join(wrong), highlight=False)
    return not any(outcome.mismatches for outcome in outcomes)


def as_json(outcomes: list[Outcome]) -> dict[str, Any]:
    """Return the outcomes as what ``verify --json`` writes."""
    return {
        "torch": torch.__version__,
        "steps": STEPS,
        "cases": [case.name for case in cases()],
        "ok": not any(outcome.mismatches for outcome in outcomes),
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }


def write_json(outcomes: list[Outcome], path: Path) -> None:
    """Write :func:`as_json` to ``path``."""
    path.write_text(json.dumps(as_json(outcomes), indent=2) + "\n")
