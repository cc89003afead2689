"""How it is timed: one step, the device's copy bandwidth, and how much of v is written."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "OtherLoad",
    "Sample",
    "Spread",
    "copy_bandwidth",
    "sectors_changed",
    "snapshot",
    "time_step",
]

_SECTOR_BYTES = 32
_SAMPLED_ELEMENTS = 1 << 24
_COPY_ROUNDS = 4
# torch.cuda._sleep counts clock cycles: more than any GPU has in a second.
_CYCLES_A_SECOND = 2.5e9
_LONGEST_SLEEP = 1.0


class Spread(NamedTuple):
    """A median, with the quartiles around it."""

    median: float
    q1: float
    q3: float
    samples: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise measured values, of which there is at least one.

        Example:
            >>> Spread.of([4.0, 1.0, 2.0, 3.0, 5.0])
            Spread(median=3.0, q1=2.0, q3=4.0, samples=5)
        """
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3, len(values))


class Sample(NamedTuple):
    """What one timed step took, in seconds."""

    wall: float
    """From the call until its work is done."""
    host: float | None = None
    """From the call until it returns; None where that is the same."""
    device: float | None = None
    """The device's own time; None where there is no clock but the host's, and where the device
    waited for the host within the step."""


def time_step(
    step: Callable[[], object], device: torch.device, prepare: Callable[[], None]
) -> Sample:
    """Time ``step``, with ``prepare`` called before it and not counted.

    On a GPU ``step`` runs twice: once from idle, by the host's clock, and once behind a pause on
    the device in which the host queues everything, so that the device's clock sees no waiting. A
    GPU's queue holds some thousand launches. Of a step with more, and of one that outlasts the
    pause, the device's clock would tell the host's time: it is left out.
    """
    prepare()
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return Sample(time.perf_counter() - start)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    returned = time.perf_counter()
    torch.cuda.synchronize(device)
    done = time.perf_counter()

    prepare()
    torch.cuda.synchronize(device)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    pause = min(_LONGEST_SLEEP, 2 * (returned - start) + 1e-4)
    torch.cuda._sleep(int(pause * _CYCLES_A_SECOND))
    first.record()
    step()
    last.record()
    # A full queue blocks the host until the pause is over.
    waited = first.query()
    last.synchronize()
    own = None if waited else first.elapsed_time(last) / 1e3
    return Sample(done - start, returned - start, own)


class OtherLoad:
    """Counts the cores that the rest of the machine keeps busy from now on.

    Timings taken while others work are theirs as much as ours, above all those of several threads
    that wait for each other.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._busy = self._busy_elsewhere()

    def cores(self) -> float | None:
        """Return how many, on average; None where the system does not tell (it takes Linux)."""
        busy = self._busy_elsewhere()
        if busy is None or self._busy is None:
            return None
        return max(0.0, (busy - self._busy) / (time.perf_counter() - self._start))

    @staticmethod
    def _busy_elsewhere() -> float | None:
        """Return the seconds that other processes, and other machines on this host, have run."""
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        user, nice, system, _, _, irq, softirq, steal = (int(field) for field in fields)
        ticks = user + nice + system + irq + softirq + steal
        return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


def copy_bandwidth(device: torch.device, room: int) -> list[float]:
    """Return samples of the bytes a second, read and written, of a large ``copy_``.

    Args:
        device: where.
        room: bytes that may be taken for it.
    """
    size = min(room // 4, (1 << 28) if device.type == "cpu" else (1 << 32))
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    samples = [
        time_step(lambda: target.copy_(source), device, lambda: None)
        for _ in range(1 + _COPY_ROUNDS)
    ]
    return [2 * size / (sample.device or sample.wall) for sample in samples[1:]]


def snapshot(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy the first elements of every tensor, some millions in all."""
    most = max(1, _SAMPLED_ELEMENTS // len(tensors))
    return [tensor.detach().view(-1)[:most].clone() for tensor in tensors]


def sectors_changed(before: Sequence[Tensor], tensors: Sequence[Tensor]) -> float:
    """Return the fraction of 32-byte sectors in which a bit differs from the snapshot.

    Args:
        before: what :func:`snapshot` returned.
        tensors: what it was given, float32 or float64, contiguous.

    Example:
        >>> v = torch.zeros(32)
        >>> before = snapshot([v])
        >>> v[9] = 1.0
        >>> sectors_changed(before, [v])
        0.25
    """
    changed = total = 0
    for old, tensor in zip(before, tensors, strict=True):
        bits = torch.int32 if old.itemsize == 4 else torch.int64
        differs = old.view(bits) != tensor.detach().view(-1)[: len(old)].view(bits)
        lanes = _SECTOR_BYTES // old.itemsize
        padded = torch.nn.functional.pad(differs, (0, -len(old) % lanes))
        sectors = padded.view(-1, lanes).any(dim=1)
        changed += int(sectors.sum())
        total += len(sectors)
    return changed / total
