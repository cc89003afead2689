"""Runs the tests that need a GPU, by several pytest processes, each a share of them.

It needs none of pytest's plugins. A failure is recorded when it happens (:mod:`.pytest_plugin`).
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from .records import append, read
from .runner import ROOT

EAGER = "foreach-cuda or reference-cuda"
"""The tests, by their ids, of backends whose kernels are torch's."""

_NOTHING_SELECTED = 5
_ENDED = (0, 1, _NOTHING_SELECTED)
_TESTS = ROOT / "tests"


def main() -> int:
    """Run the tests and return the exit status: 1 where one failed, or a process did not end."""
    parser = argparse.ArgumentParser(prog="tests", description=__doc__)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--section", required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--eager", action="store_true", help="only those of foreach and reference")
    parser.add_argument("--tests", type=Path, default=_TESTS, help="a folder of others")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    run = Run(chosen.results, chosen.section, chosen.tests, chosen.workers)
    selection = ["-k", EAGER if chosen.eager else f"not ({EAGER})"]
    is_right = run.share(chosen.workers, ["-m", "gpu and not large", *selection])
    # Alone: it takes most of the GPU's memory.
    is_right &= run.share(1, ["-m", "gpu and large", *selection])
    for record in run.records():
        if record.get("failed"):
            print(f"FAILED {record['test']}")
    counts = run.counts()
    print(", ".join(f"{number} {what}" for what, number in counts.items()))
    return 0 if is_right and counts["passed"] else 1


class Run:
    """Pytest over the tests that may need a GPU, and what it recorded."""

    def __init__(self, results: Path, section: str, tests: Path, workers: int) -> None:
        self._results = results
        self._section = section
        self._files = test_files(tests)
        self._begin = results.stat().st_size if results.exists() else 0
        # Every process would take all cores for its CPU tensors.
        self._environment = os.environ | {
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers)),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # Their import takes longer than many a test.
        }

    def share(self, count: int, selection: list[str]) -> bool:
        """Run a selection by ``count`` processes; return whether all ended, without a failure."""
        with tempfile.TemporaryDirectory() as folder:
            running = [Path(folder, str(part)) for part in range(count)]
            processes = [
                subprocess.Popen(
                    self._command(part, count, selection, file),
                    stdout=subprocess.DEVNULL,  # The records say more, and at once.
                    cwd=ROOT,
                    env=self._environment,
                )
                for part, file in enumerate(running)
            ]
            try:
                statuses = [process.wait() for process in processes]
            except SystemExit:
                cut_off = list(filter(None, map(_content, running)))
                append(self._results, self._section, cut_off=cut_off)
                print("cut off in:", *cut_off, sep="\n    ")
                raise
            for part, status in enumerate(statuses):
                if status not in _ENDED:
                    test = _content(running[part]) or f"part {part} of {count}"
                    wrong = f"pytest ended with status {status}"
                    append(self._results, self._section, failed=True, test=test, wrong=wrong)
            return all(status in (0, _NOTHING_SELECTED) for status in statuses)

    def records(self) -> list[dict[str, object]]:
        """Return what was recorded since this began."""
        if not self._results.exists():
            return []
        return read(self._results, self._begin)

    def counts(self) -> dict[str, int]:
        """Return how many passed, failed and were skipped."""
        counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
        for record in self.records():
            found = record.get("counts")
            if isinstance(found, dict):
                for what, number in found.items():
                    counts[what] += number
        return counts

    def _command(self, part: int, count: int, selection: list[str], running: Path) -> list[str]:
        return [
            *(sys.executable, "-m", "pytest", "--tb=short", "-p", "no:cacheprovider"),
            *("-p", "benchmarks.gpu_check.pytest_plugin", f"--share={part}/{count}"),
            *(f"--records={self._results}", f"--records-section={self._section}"),
            *(f"--running={running}", "--continue-on-collection-errors", *selection),
            *map(str, self._files),
        ]


def test_files(folder: Path) -> list[Path]:
    """Return the files within ``folder`` of which a test may need a GPU.

    Importing the others takes its time.
    """
    places = re.compile(
        r"^from helpers\.support import|\bmark\.gpu\b"
        r"|^def test_\w+\([^)]*\bdevice: torch\.device\b",
        re.MULTILINE,
    )
    return [path for path in sorted(folder.rglob("test_*.py")) if places.search(path.read_text())]


def _content(file: Path) -> str:
    return file.read_text() if file.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
