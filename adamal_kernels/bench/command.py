"""The command: its arguments, the plan of a run, and its exit status."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..backends import BACKENDS
from .cases import CASES, SCALING, BenchCase
from .contenders import BASELINE, OURS, PEERS, Contender
from .measure import Spread, copy_bandwidth
from .plot import draw, why_no_plot
from .report import Run, device_slug, environment, print_run, write_json
from .run import Gate, Pace, Record, Venue, time_case

__all__ = ["add_arguments", "available_memory", "check_arguments", "main", "measure"]

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_CASE_SECONDS = 7.0
_POINT_SECONDS = 1.5
_IN_SCALING = ("torch-foreach",)
# On a CPU, memory is also the rest of the machine's.
_MOST_CPU_MEMORY = int(6.25 * 2**30)
# From this size on, the time of a step is in proportion.
_TELLING_PARAMETERS = 10**7
_REFRESH_SECONDS = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``bench``."""
    for option, names, what in (
        ("--case", [*CASES, *SCALING], "time only this case, or this scaling curve"),
        ("--peer", list(PEERS), f"time only this peer (and {BASELINE}, the measure of all)"),
        ("--backend", list(BACKENDS), "time only this backend of ours"),
        ("--dtype", list(_DTYPES), "time parameters of this type instead of each case's own"),
    ):
        parser.add_argument(
            option,
            action="append",
            choices=names,
            metavar="NAME",
            help=f"{what}; may be given more than once: {', '.join(names)}",
        )
    parser.add_argument(
        "--device", help="such as cpu or cuda:0. Default: the first CUDA device, else the CPU"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        metavar="N",
        help="timed steps of every contender. Default: as many as there is time for",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="also draw ratios and scaling curves into FILE, a PNG; needs matplotlib",
    )


def check_arguments(parser: argparse.ArgumentParser, chosen: argparse.Namespace) -> None:
    """Refuse what cannot be done before time is spent; fill ``{device}`` and ``{date}`` in."""
    if chosen.rounds is not None and chosen.rounds < 1:
        parser.error(f"--rounds {chosen.rounds}: at least 1 round has to be timed")
    try:
        chosen.device = _device(chosen.device)
    except (RuntimeError, ValueError) as error:
        parser.error(f"--device {chosen.device}: {error}")
    for option in ("json", "plot"):
        file: Path | None = getattr(chosen, option)
        if file is None:
            continue
        file = Path(
            str(file)
            .replace("{device}", device_slug(chosen.device))
            .replace("{date}", time.strftime("%Y-%m-%d"))
        )
        if not file.parent.is_dir():
            parser.error(f"--{option} {file}: the folder {file.parent} does not exist")
        setattr(chosen, option, file)
    if chosen.plot is not None and (reason := why_no_plot()):
        parser.error(f"--plot {chosen.plot}: {reason}")


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    device = torch.device(name)
    if device.type not in ("cpu", "cuda"):
        raise ValueError("only cpu and cuda devices are timed")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = device.index or 0
        if index >= count:
            raise ValueError(f"torch finds {count} CUDA devices here")
        return torch.device("cuda", index)
    return torch.device("cpu")


def main(chosen: argparse.Namespace, command: str, console: Console) -> int:
    """Run the benchmarks and return the exit status.

    Returns:
        1 if a backend's parity is red, a backend that was named cannot run, or ours raised; else 0.
    """
    found = measure(chosen, command, console)
    print_run(found, console)
    if chosen.json is not None:
        write_json(found, chosen.json)
    if chosen.plot is not None:
        draw(found, chosen.plot)
    named = {OURS[name].name for name in chosen.backend or ()}
    ours = {contender.name for contender in OURS.values()}
    raised = any(ours & record.failed.keys() for record in found.records)
    return 1 if found.parity_is_red or raised or named & found.left_out.keys() else 0


def measure(chosen: argparse.Namespace, command: str, console: Console) -> Run:
    """Check parity, then time everything that was chosen."""
    device: torch.device = chosen.device
    contenders, left_out = _contenders(chosen, device)
    work = _work(chosen)
    # Without a thread that redraws it: that would run during timed steps.
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        auto_refresh=False,
        transient=True,
    )
    with progress, _current(device):
        bar = _Bar(progress)
        gate = Gate(device)
        dtypes = list(dict.fromkeys(dtype for _, dtype, _ in work))
        for contender in list(contenders):
            if contender.backend is None:
                continue
            bar.report(f"parity of {contender.name}")
            for dtype in dtypes:
                if gate.check(contender.backend, dtype) and contender in contenders:
                    contenders.remove(contender)
                    left_out[contender.name] = "its parity is red: nothing of it is timed"
        venue = Venue(device, available_memory(device))
        records: list[Record] = []
        copies: list[float] = []
        rates: dict[str, float] = {}
        bar.start(len(work))
        for case, dtype, seconds in work:
            bar.report("copy bandwidth")
            # Before every case, since other users of the machine come and go.
            copies += copy_bandwidth(device, venue.memory)
            pace = Pace(seconds, chosen.rounds)
            records += _time(case, dtype, contenders, venue, pace, rates, bar)
            bar.advance()
    where = environment(device, command)
    return Run(where, Spread.of(copies), gate.mismatches, left_out, records)


class _Bar:
    """A progress bar that is drawn only when it is told something, and not too often."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None)
        self._drawn = 0.0

    def start(self, total: int) -> None:
        self._progress.update(self._task, total=total)

    def advance(self) -> None:
        self._progress.advance(self._task)

    def report(self, text: str) -> None:
        self._progress.update(self._task, description=text)
        if time.monotonic() - self._drawn > _REFRESH_SECONDS:
            self._progress.refresh()
            self._drawn = time.monotonic()


def _contenders(
    chosen: argparse.Namespace, device: torch.device
) -> tuple[list[Contender], dict[str, str]]:
    """Return who is timed, the baseline first, and why others are not."""
    backends = chosen.backend or [
        name
        for name, backend in BACKENDS.items()
        if device.type in (backend.device_types or (device.type,))
    ]
    peers = [name for name in PEERS if name in (chosen.peer or PEERS) and name != BASELINE]
    wanted = [
        PEERS[BASELINE],
        *(OURS[name] for name in OURS if name in backends),
        *(PEERS[name] for name in peers),
    ]
    reasons = {contender.name: contender.unavailable(device) for contender in wanted}
    able = [contender for contender in wanted if reasons[contender.name] is None]
    return able, {name: reason for name, reason in reasons.items() if reason is not None}


def _work(chosen: argparse.Namespace) -> list[tuple[BenchCase, torch.dtype, float]]:
    """Return what is to be timed, with the types of its parameters and the seconds for it."""
    names = chosen.case or [*CASES, *SCALING]
    asked = [getattr(torch, name) for name in dict.fromkeys(chosen.dtype or ())]
    work = [
        (case, dtype, _CASE_SECONDS)
        for name, case in CASES.items()
        if name in names
        for dtype in asked or case.dtypes
    ]
    for name, points in SCALING.items():
        if name in names:
            dtypes = asked or points[0].dtypes
            work += [(point, dtype, _POINT_SECONDS) for dtype in dtypes for point in points]
    return work


def _time(
    case: BenchCase,
    dtype: torch.dtype,
    contenders: Sequence[Contender],
    venue: Venue,
    pace: Pace,
    rates: dict[str, float],
    bar: _Bar,
) -> list[Record]:
    """Time one case; ``rates`` are the seconds a parameter of everyone timed so far."""
    if case.series is not None:
        contenders = [
            contender
            for contender in contenders
            if contender.name == BASELINE
            or contender.name in _IN_SCALING
            or (contender.backend is not None and contender.principal)
        ]
    records = time_case(case, dtype, contenders, venue, pace, rates, bar.report)
    for record in records:
        if record.parameters >= _TELLING_PARAMETERS:
            for result in record.results:
                rates[result.contender] = result.wall_s.median / record.parameters
    return records


def available_memory(device: torch.device) -> int:
    """Return the bytes that a case may take on ``device``."""
    if device.type == "cuda":
        return int(0.85 * torch.cuda.mem_get_info(device)[0])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return min(_MOST_CPU_MEMORY, int(0.6 * 1024 * int(line.split()[1])))
    return _MOST_CPU_MEMORY


def _current(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
