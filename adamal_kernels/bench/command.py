"""The command: its arguments, the plan of a run, and its exit status."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..backends import BACKENDS
from ..command_line import (
    JsonOutput,
    add_device,
    add_json,
    add_seconds,
    check_file,
    deadline,
)
from .cases import CASES, SCALING, BenchCase
from .contenders import BASELINE, OURS, PEERS, Contender
from .measure import Spread, copy_bandwidth
from .plot import draw, why_no_plot
from .report import Run, as_json, device_slug, environment, print_run
from .run import Gate, Pace, Record, Venue, dtype_name, time_case

__all__ = ["add_arguments", "available_memory", "main"]

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_CASE_SECONDS = 7.0
_POINT_SECONDS = 1.5
_IN_SCALING = ("torch-foreach",)
# On a CPU, memory is also the rest of the machine's.
_MOST_CPU_MEMORY = int(6.25 * 2**30)
# From this size on, the time of a step is in proportion.
_TELLING_PARAMETERS = 10**7
_REFRESH_SECONDS = 0.5


class _Work(NamedTuple):
    """One case to be timed."""

    case: BenchCase
    dtype: torch.dtype
    seconds: float

    @property
    def name(self) -> str:
        """What it is called where it is not reached."""
        parts = [self.case.series, self.case.name]
        parts.append(None if self.dtype == torch.float32 else dtype_name(self.dtype))
        return ", ".join(part for part in parts if part)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``bench``."""
    parser.description = (
        "Everyone steps in turn, in one process. Nothing is timed of a backend whose parity is not "
        "right here. In a FILE, {device} and {date} are filled in. Exit status: 0; 1 if a "
        "backend's parity is red, if one that was named cannot run here or raised, or if nothing "
        "was timed; 130 after Ctrl-C."
    )
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
    add_device(parser, "such as cpu or cuda:0. Default: the first CUDA device, else the CPU")
    parser.add_argument(
        "--rounds",
        type=_rounds,
        metavar="N",
        help="timed steps of every contender. Default: as many as there is time for",
    )
    add_seconds(
        parser,
        "start no case after N seconds, parity included; the others are named as not reached. "
        "Default: no limit",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="also draw ratios and scaling curves into FILE, a PNG; needs matplotlib",
    )
    add_json(parser)


def _rounds(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _check_arguments(chosen: argparse.Namespace) -> None:
    """Fill defaults, ``{device}`` and ``{date}`` in; refuse files that cannot be written."""
    if chosen.device is None:
        has_gpu = torch.cuda.is_available()
        chosen.device = torch.device("cuda", 0) if has_gpu else torch.device("cpu")
    for option in ("json", "plot"):
        if (file := getattr(chosen, option)) is None:
            continue
        named = str(file).replace("{device}", device_slug(chosen.device))
        file = Path(named.replace("{date}", time.strftime("%Y-%m-%d")))
        check_file(chosen.parser, f"--{option}", file)
        setattr(chosen, option, file)
    if chosen.plot is not None and (reason := why_no_plot()):
        chosen.parser.error(f"--plot {chosen.plot}: {reason}")
    if str(chosen.plot) == "-":
        chosen.parser.error("--plot -: a picture goes to a file; name one")


def main(chosen: argparse.Namespace, console: Console) -> int:
    """Run the benchmarks and return the exit status.

    The file of ``--json`` is written anew after each case.
    """
    end = deadline(chosen.seconds)
    _check_arguments(chosen)
    device: torch.device = chosen.device
    contenders, left_out = _contenders(chosen, device)
    work = _work(chosen)
    run = Run(environment(device, chosen.command_line), left_out=left_out)
    run.not_reached = [one.name for one in work]
    output = JsonOutput(chosen.json, lambda: as_json(run))
    named = {OURS[name].name for name in chosen.backend or ()}
    for name in sorted(named & left_out.keys()):
        reason = escape(left_out[name])
        console.print(f"[red]{name} was asked for and cannot run here[/red]: {reason}")
    if named and named <= left_out.keys():
        output.finish()
        return 1
    output.update()
    interrupted = False
    try:
        _measure(run, work, contenders, chosen, end, console, output)
    except KeyboardInterrupt:
        interrupted = True
    print_run(run, console)
    output.finish()
    if chosen.plot is not None:
        draw(run, chosen.plot)
    if interrupted:
        return 130
    ours = {contender.name for contender in OURS.values()}
    raised = any(ours & record.failed.keys() for record in run.records)
    timed = any(record.results for record in run.records)
    is_right = timed and not (run.parity_is_red or raised or named & left_out.keys())
    return 0 if is_right else 1


def _measure(
    run: Run,
    work: Sequence[_Work],
    contenders: list[Contender],
    chosen: argparse.Namespace,
    end: float,
    console: Console,
    output: JsonOutput,
) -> None:
    """Check parity, then time what was chosen, until ``end``; add what is found to ``run``."""
    device: torch.device = chosen.device
    # Without a thread that redraws it: that would run during timed steps.
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        auto_refresh=False,
        transient=True,
        disable=not console.is_terminal,
    )
    with progress, _current(device):
        bar = _Bar(progress)
        gate = Gate(device)
        run.parity = gate.mismatches
        dtypes = list(dict.fromkeys(one.dtype for one in work))
        for contender in [contender for contender in contenders if contender.backend is not None]:
            bar.report(f"parity of {contender.name}")
            for dtype in dtypes:
                if time.monotonic() >= end:
                    return
                if gate.check(contender.backend, dtype) and contender in contenders:
                    contenders.remove(contender)
                    run.left_out[contender.name] = "its parity is red: nothing of it is timed"
        venue = Venue(device, available_memory(device))
        copies: list[float] = []
        rates: dict[str, float] = {}
        bar.start(len(work))
        for one in work:
            left = end - time.monotonic()
            if left <= 0:
                return
            bar.report("copy bandwidth")
            # Before every case, since other users of the machine come and go.
            copies += copy_bandwidth(device, venue.memory)
            run.copy_bandwidth = Spread.of(copies)
            pace = Pace(min(one.seconds, left), chosen.rounds)
            run.records += _time(one.case, one.dtype, contenders, venue, pace, rates, bar)
            run.not_reached.remove(one.name)
            output.update()
            bar.advance()


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


def _work(chosen: argparse.Namespace) -> list[_Work]:
    """Return what is to be timed, with the types of its parameters and the seconds for it."""
    names = chosen.case or [*CASES, *SCALING]
    asked = [getattr(torch, name) for name in dict.fromkeys(chosen.dtype or ())]
    work = [
        _Work(case, dtype, _CASE_SECONDS)
        for name, case in CASES.items()
        if name in names
        for dtype in asked or case.dtypes
    ]
    for name, points in SCALING.items():
        if name in names:
            dtypes = asked or points[0].dtypes
            work += [_Work(point, dtype, _POINT_SECONDS) for dtype in dtypes for point in points]
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
