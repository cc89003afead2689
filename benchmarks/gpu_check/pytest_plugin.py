"""What a pytest process of the check does otherwise: it takes its share, and records failures."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from .records import append

_FIRST = ("test_streams.py", "test_cuda_graphs.py", "test_device_scalars.py")
# The table of cases, once more: parity has been over it by then.
_LAST = ("test_backends.py",)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--share", default="0/1", metavar="I/N", help="run every Nth test, from number I on"
    )
    parser.addoption("--records", type=Path, metavar="FILE", help="append failures as JSON lines")
    parser.addoption("--running", type=Path, metavar="FILE", help="holds the test that runs")
    parser.addoption("--records-section", default="tests", metavar="NAME")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Recorder(config), "gpu-check-recorder")


# Last: what is deselected by then is nobody's share.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def order(item: pytest.Item) -> int:
        name = item.path.name
        return _FIRST.index(name) if name in _FIRST else len(_FIRST) + (name in _LAST)

    items.sort(key=order)
    index, count = map(int, config.getoption("--share").split("/"))
    mine = items[index::count]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(mine)])
    items[:] = mine


class _Recorder:
    def __init__(self, config: pytest.Config) -> None:
        self._file: Path = config.getoption("--records")
        self._is_first = config.getoption("--share").startswith("0/")
        self._running: Path = config.getoption("--running")
        self._section: str = config.getoption("--records-section")
        self._counts: Counter[str] = Counter()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if self._is_first:  # All collect the same.
            self._record(report)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._running.write_text(nodeid)

    def pytest_runtest_logfinish(self) -> None:
        self._running.write_text("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._record(report)

    def _record(self, report: pytest.CollectReport | pytest.TestReport) -> None:
        if report.failed:
            text = report.longreprtext[-4000:]
            append(self._file, self._section, failed=True, test=report.nodeid, wrong=text)
        is_collected = isinstance(report, pytest.CollectReport)
        if report.failed or report.skipped or (not is_collected and report.when == "call"):
            self._counts[report.outcome] += 1

    def pytest_sessionfinish(self) -> None:
        append(self._file, self._section, counts=dict(self._counts))
