"""What was found, as a table and as JSON, and where it was found."""

from __future__ import annotations

import platform
import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from .. import info
from ..command_line import print_table
from .contenders import BASELINE
from .measure import Spread
from .run import Record, Result

__all__ = ["SERIES", "Run", "as_json", "device_slug", "environment", "print_run"]

_PACKAGES = ("numpy", "torch-optimi", "torchao", "bitsandbytes", "flashoptim")

_TABLE_WIDTH = 180
_BUSY_CORES = 0.15

SERIES = {
    "scaling-tensors": "tensors of 16 elements",
    "scaling-parameters": "elements of one tensor",
}
"""What grows along each scaling curve, in words."""


@dataclass
class Run:
    """Everything one run found."""

    environment: dict[str, Any]
    copy_bandwidth: Spread | None = None
    """Bytes a second, read and written; None before the first case."""
    parity: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    """By backend and type of the parameters: what differs."""
    left_out: dict[str, str] = field(default_factory=dict)
    """By contender: why none of it was timed."""
    records: list[Record] = field(default_factory=list)
    not_reached: list[str] = field(default_factory=list)
    """The cases that there was no time for, or that Ctrl-C ended."""

    @property
    def parity_is_red(self) -> bool:
        """Whether a backend was caught, and so nothing of it timed."""
        return any(self.parity.values())


def environment(device: torch.device, command: str) -> dict[str, Any]:
    """Return what has to be known to read a figure: device, versions, date and command."""
    found = info.collect()
    versions = dict(found["versions"])
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": command,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": {
            "type": device.type,
            "name": _device_name(device),
            "description": found["devices"].get(str(device), ""),
            "driver": _driver() if device.type == "cuda" else None,
        },
        "host": {"system": f"{platform.system()} {platform.machine()}", "cpu": _cpu_name()},
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip()


def device_slug(device: torch.device) -> str:
    """Return a device's name as a part of a file's."""
    name = re.sub(r"\((r|tm)\)", "", _device_name(device).lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def as_json(run: Run) -> dict[str, Any]:
    """Return the run as what ``bench --json`` writes."""
    return {
        **run.environment,
        "copy_bytes_a_second": run.copy_bandwidth._asdict() if run.copy_bandwidth else None,
        "parity": [
            {"backend": backend, "dtype": dtype, "mismatches": mismatches}
            for (backend, dtype), mismatches in run.parity.items()
        ],
        "left_out": run.left_out,
        "not_reached": run.not_reached,
        "cases": [_record_as_json(record) for record in run.records],
    }


def _record_as_json(record: Record) -> dict[str, Any]:
    fields = asdict(record)
    for written, result in zip(fields["results"], record.results, strict=True):
        for name in ("wall_s", "host_s", "device_s"):
            spread: Spread | None = getattr(result, name)
            written[name] = spread._asdict() if spread else None
    return fields


def print_run(run: Run, console: Console) -> None:
    """Print parity, a table of the cases, and what was left out."""
    if not console.is_terminal:
        console = Console(file=console.file, width=max(console.width, _TABLE_WIDTH))
    where = run.environment
    copies = f"; copies {_gb(run.copy_bandwidth.median)}" if run.copy_bandwidth else ""
    console.print(
        f"[bold]{where['device']['name']}[/bold], {where['threads']} threads, torch "
        f"{where['versions']['torch']}, {where['date']}{copies}",
        highlight=False,
    )
    _print_cases(run, console)
    for series, title in SERIES.items():
        points = [r for r in run.records if r.series == series and r.results]
        if points:
            _print_curve(points, title, console)
    for line in _remarks(run):
        console.print(line, highlight=False)


def _print_cases(run: Run, console: Console) -> None:
    on_gpu = run.environment["device"]["type"] == "cuda"
    headers = ["case", "optimizer", "wall", "quartiles", f"x {BASELINE}"]
    headers += ["device", f"x {BASELINE}"] if on_gpu else []
    headers += ["µs/tensor", "B/param", "v written", "GB/s", "of copy"]
    rows = []
    for record in run.records:
        if record.series is None and record.results:
            columns = zip(*_rows(run, record, on_gpu), strict=True)
            rows.append(["\n".join(_about(record)), *map("\n".join, columns)])
    if run.not_reached:
        rows.append(["\n".join(run.not_reached), "not reached", *[""] * (len(headers) - 2)])
    if rows:
        print_table(
            console,
            "Time of step(): medians, with quartiles; bytes as each optimizer moves them",
            headers,
            rows,
            wrapped=0,
            right=range(2, len(headers)),
            lines=True,
        )


def _print_curve(points: Sequence[Record], title: str, console: Console) -> None:
    """Print a table of one scaling curve: a row a point, a column a contender."""
    found = [{result.contender: result for result in point.results} for point in points]
    names = list(dict.fromkeys(name for results in found for name in results))
    headers = [""]
    for name in names:
        headers += [name] if name == BASELINE else [name, f"x {BASELINE}"]
    rows = []
    for point, results in zip(points, found, strict=True):
        row = [point.title + (f", {point.dtype}" if point.dtype != "float32" else "")]
        for name in names:
            result = results.get(name)
            row.append(_time(result.wall_s.median) if result else "-")
            if name != BASELINE:
                row.append(_ratio(result, result.times_faster_than) if result else "-")
        rows.append(row)
    right = range(1, len(headers))
    print_table(console, f"Time of step(): {title}", headers, rows, wrapped=0, right=right)


def _about(record: Record) -> list[str]:
    """Return the lines of the first column."""
    lines = [record.title]
    if record.dtype != "float32":
        lines[0] += f", {record.dtype}"
    if record.v == "saturated":
        lines.append("v saturated")
    lines.append(f"[dim]{record.tensors} tensors, {record.parameters / 1e6:.3g} M[/dim]")
    if record.gradients == "fresh":
        lines.append("[dim]fresh gradients[/dim]")
    if (record.other_cores or 0.0) > _BUSY_CORES:
        lines.append(f"[red]others: {record.other_cores:.1f} cores[/red]")
    return lines


def _rows(run: Run, record: Record, on_gpu: bool) -> Iterator[list[str]]:
    for result in record.results:
        name = f"[bold]{result.contender}[/bold]" if result.ours else result.contender
        spread = f"[dim]{_time(result.wall_s.q1)} .. {_time(result.wall_s.q3)}[/dim]"
        row = [name, _time(result.wall_s.median), spread, _ratio(result, result.times_faster_than)]
        if on_gpu:
            device = result.device_s
            ratio = _ratio(result, result.times_faster_on_device)
            row += [_time(device.median) if device else "-", ratio]
        yield [*row, *_traffic(run, result)]


def _traffic(run: Run, result: Result) -> list[str]:
    written = result.v_sectors_written
    cells = [_digits(result.microseconds_a_tensor)]
    cells += [f"{result.bytes_a_parameter:.3g}" if result.bytes_a_parameter else "-"]
    cells += [f"{written:.0%}" if written is not None else "-"]
    if result.bytes_a_second is None or run.copy_bandwidth is None:
        return [*cells, "-", "-"]
    fraction = result.bytes_a_second / run.copy_bandwidth.median
    return [*cells, _digits(result.bytes_a_second / 1e9), f"{fraction:.2f}"]


def _remarks(run: Run) -> Iterator[str]:
    """Yield a line for everything that was left out, failed, or differs."""
    if run.environment["device"]["type"] == "cpu":
        yield (
            "of copy: a CPU's copy_ also reads the memory it overwrites, which is not counted as "
            "copied; a step reads all it writes anyway, and so can pass 1"
        )
    busiest = max((record.other_cores or 0.0 for record in run.records), default=0.0)
    if busiest > _BUSY_CORES:
        yield (
            f"[red]Other processes kept up to {busiest:.1f} cores busy during a case: these times "
            "are not this machine's; run again when it is idle[/red]"
        )
    for (backend, dtype), mismatches in run.parity.items():
        if not mismatches:
            yield f"parity of {backend}, {dtype}: [green]bit for bit[/green]"
            continue
        yield f"[red]parity of {backend}, {dtype}: {len(mismatches)} values differ[/red]"
        yield f"    {escape(mismatches[0])}"
    if run.not_reached:
        total = len(run.not_reached) + len({(r.series, r.case, r.dtype) for r in run.records})
        yield (
            f"[yellow]NOT REACHED: {len(run.not_reached)} of {total} cases[/yellow]: "
            + "; ".join(run.not_reached)
        )
    if not any(record.results for record in run.records):
        yield "[red]nothing was timed[/red]"
    for name, reason in run.left_out.items():
        yield f"[yellow]{name}[/yellow] left out: {escape(reason)}"
    left_out: defaultdict[str, list[str]] = defaultdict(list)
    failures: Counter[tuple[str, str]] = Counter()
    for record in run.records:
        case = record.title + (f", {record.dtype}" if record.dtype != "float32" else "")
        for name, reason in record.left_out.items():
            left_out[name].append(f"{case}: {reason}")
        failures.update(record.failed.items())
        # A curve ends where memory does.
        if record.error is not None and record.v == "cold" and record.series is None:
            yield f"[yellow]{case}[/yellow] ended early: {escape(record.error)}"
    for name, reasons in left_out.items():
        yield f"[yellow]{name}[/yellow] not timed in " + "; ".join(reasons)
    for (name, reason), count in failures.items():
        yield f"[red]{name}[/red] failed in {count} cases: {escape(reason)}"


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{_digits(seconds / scale)} {unit}"
    return f"{_digits(seconds / 1e-6)} µs"


def _digits(number: float) -> str:
    """Three significant digits, never in exponents."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _ratio(result: Result, times_faster: dict[str, float]) -> str:
    if result.contender == BASELINE:
        return "1"
    return f"{times_faster[BASELINE]:.2f}" if BASELINE in times_faster else "-"


def _gb(bytes_a_second: float) -> str:
    return f"{bytes_a_second / 1e9:.1f} GB/s"
