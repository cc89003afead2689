"""Runs sections within a budget of time, and loses nothing of what they have found."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from .records import append, read

__all__ = ["LEFT_OUT", "ROOT", "Outcome", "Runner", "Section", "Verdict"]

ROOT = Path(__file__).resolve().parents[2]

LEFT_OUT = 77
"""A section's exit status where the machine lacks something; its last record says what."""

_POLL_SECONDS = 0.05
# What a process has to end by itself, before it is killed.
_GRACE_SECONDS = 2.0
# What begins just before a section's own time is over may take so long.
_LAST_CASE_SECONDS = 10.0
# What is kept of the budget for the table.
_RESERVE_SECONDS = 1.0


class Verdict(Enum):
    """What became of a section."""

    PASSED = "passed"
    FAILED = "FAILED"
    KILLED = "KILLED"
    """It took longer than it ever should; counts as failed."""
    CUT_OFF = "cut off"
    """The budget ended; nothing had failed until then."""
    LEFT_OUT = "left out"
    """The machine lacks something that it needs."""
    SKIPPED = "skipped"
    """What it needs has failed."""
    NOT_REACHED = "NOT REACHED"


@dataclass(frozen=True)
class Section:
    """One process, what it may take, and what it needs.

    Attributes:
        name: for ``--section`` and the table.
        title: what it finds out.
        command: the program and its arguments; in these, ``{seconds}`` is when it should end by
            itself: ``expected``, or of the rest what is left.
        expected: seconds; it is begun only where as many are left.
        limit: seconds after which it is killed.
        needs: the names of sections without whose success it means nothing.
        is_rest: whether it fills the time that is left: not reaching its end is no defect.
    """

    name: str
    title: str
    command: tuple[str, ...]
    expected: float
    limit: float
    needs: tuple[str, ...] = ()
    is_rest: bool = False

    def command_for(self, seconds: float) -> list[str]:
        """Return the command, which ends by itself after as many seconds."""
        own = str(max(1, int(seconds)))
        return [argument.replace("{seconds}", own) for argument in self.command]


@dataclass(frozen=True)
class Outcome:
    """A section's verdict, what it took, and in words why, where that is not plain."""

    section: Section
    verdict: Verdict
    seconds: float = 0.0
    reason: str = ""

    @property
    def is_failure(self) -> bool:
        """Whether something is wrong, or hangs."""
        return self.verdict in (Verdict.FAILED, Verdict.KILLED)

    @property
    def is_missing(self) -> bool:
        """Whether a section that should have its verdict has none."""
        missing = (Verdict.NOT_REACHED, Verdict.CUT_OFF)
        return self.verdict in missing and not self.section.is_rest


class Runner:
    """Runs sections one after another, and ends within the budget.

    Args:
        sections: in their order.
        results: JSON lines: a record as each section begins and ends, and all that they add.
        log: takes what they print, which is shown too.
        deadline: the time, by ``time.monotonic``, at which all has ended, the table printed.
    """

    def __init__(
        self, sections: Sequence[Section], results: Path, log: Path, deadline: float
    ) -> None:
        self._sections = sections
        self._results = results
        self._log = log
        self._deadline = deadline - _RESERVE_SECONDS
        self._signal = 0
        self.outcomes: list[Outcome] = []

    def run(self) -> int:
        """Run what there is time for, print the table and return the exit status.

        A SIGTERM or SIGINT kills the section that runs, and begins no other.

        Returns:
            1 if a section failed, else 3 if one was not reached or cut off that is not of the
            rest, else 0; after a signal 128 and its number.
        """
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for number in handlers:
                signal.signal(number, self._interrupt)
            for section in self._sections:
                outcome = self._outcome(section)
                self.outcomes.append(outcome)
                print(f"== {section.name}: {outcome.verdict.value} {outcome.reason}", flush=True)
                append(
                    self._results,
                    section.name,
                    record="end",
                    verdict=outcome.verdict.value,
                    seconds=round(outcome.seconds, 1),
                    reason=outcome.reason,
                )
            print(self.table(), flush=True)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self._signal:
            return 128 + self._signal
        if any(outcome.is_failure for outcome in self.outcomes):
            return 1
        return 3 if any(outcome.is_missing for outcome in self.outcomes) else 0

    def table(self) -> str:
        """Return a line for each section that has a verdict, and one for those not reached."""
        width = max(len(section.name) for section in self._sections)
        lines = [f"\n{'section':{width}}  {'verdict':8}  seconds"]
        for outcome in self.outcomes:
            if outcome.verdict is not Verdict.NOT_REACHED:
                line = f"{outcome.section.name:{width}}  {outcome.verdict.value:8}"
                lines.append(f"{line}  {outcome.seconds:7.1f}  {outcome.reason}".rstrip())
        missed = [o.section.name for o in self.outcomes if o.verdict is Verdict.NOT_REACHED]
        lines.append(f"NOT REACHED: {', '.join(missed) or 'none'}")
        return "\n".join(lines)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def _outcome(self, section: Section) -> Outcome:
        if self._signal:
            return Outcome(section, Verdict.NOT_REACHED, reason="interrupted")
        lost = [
            outcome.section.name
            for outcome in self.outcomes
            if outcome.section.name in section.needs
            and (outcome.is_failure or outcome.verdict is Verdict.SKIPPED)
        ]
        if lost:
            return Outcome(section, Verdict.SKIPPED, reason=f"it needs {', '.join(lost)}")
        left = self._deadline - time.monotonic() - _GRACE_SECONDS
        if left < section.expected:
            reason = f"{max(left, 0):.0f} s were left, and it takes {section.expected:.0f}"
            return Outcome(section, Verdict.NOT_REACHED, reason=reason)
        return self._run(section, min(section.limit, left))

    def _run(self, section: Section, seconds: float) -> Outcome:
        print(f"\n== {section.name}: {section.title} ==", flush=True)
        own = seconds - _LAST_CASE_SECONDS if section.is_rest else section.expected
        command = section.command_for(own)
        append(self._results, section.name, record="begin", command=command)
        results_begin = self._results.stat().st_size
        begin = time.monotonic()
        with self._log.open("ab") as sink, self._log.open("rb") as shown:
            shown.seek(0, os.SEEK_END)
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=_environment(),
                start_new_session=True,
            )
            while process.poll() is None and not self._signal:
                if time.monotonic() - begin > seconds:
                    break
                _show(shown)
                time.sleep(_POLL_SECONDS)
            status = process.poll()
            # Also where it has ended: what it left running would take the next one's GPU.
            _kill_group(process)
            _show(shown)
        took = time.monotonic() - begin
        found = read(self._results, results_begin)
        verdict, reason = self._verdict(section, status, seconds)
        failures = sum(bool(record.get("failed")) for record in found)
        if failures:
            reason = ", ".join(filter(None, [f"{failures} failures recorded", reason]))
            verdict = Verdict.FAILED
        elif verdict is Verdict.LEFT_OUT:
            reason = "; ".join(record["left_out"] for record in found if "left_out" in record)
        return Outcome(section, verdict, took, reason)

    def _verdict(self, section: Section, status: int | None, seconds: float) -> tuple[Verdict, str]:
        if status == 0:
            return Verdict.PASSED, ""
        if status == LEFT_OUT:
            return Verdict.LEFT_OUT, ""
        if status is not None:
            return Verdict.FAILED, f"exit status {status}"
        if self._signal:
            return Verdict.CUT_OFF, signal.Signals(self._signal).name
        if seconds < section.limit:
            return Verdict.CUT_OFF, "at the end of the budget"
        return Verdict.KILLED, f"took more than {section.limit:.0f} s"


def _environment() -> dict[str, str]:
    path = os.environ.get("PYTHONPATH")
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *([path] if path else [])]),
        "PYTHONUNBUFFERED": "1",
    }


def _show(log: BinaryIO) -> None:
    sys.stdout.write(log.read().decode(errors="replace"))
    sys.stdout.flush()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children: by SIGTERM, and soon after by SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        end = time.monotonic() + _GRACE_SECONDS
        while number == signal.SIGTERM and _is_alive(process) and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
    process.wait()


def _is_alive(process: subprocess.Popen[bytes]) -> bool:
    process.poll()  # or its own zombie would count
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True
