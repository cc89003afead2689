"""The check for GPU machines: its order, its budget and what it loses, with stand-in sections."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adamal_kernels.verify import Values
from adamal_kernels.verify.cases import Case
from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import build, memcheck, parity, sections
from benchmarks.gpu_check.machine import PLANNED
from benchmarks.gpu_check.runner import LEFT_OUT, ROOT, Runner, Section, Verdict
from benchmarks.gpu_check.tests import test_files as files_of_gpu_tests

NAMES = [
    *("versions", "build", "smoke", "parity", "bench", "tests", "memcheck"),
    *("all-bench", "all-verify", "eager-tests"),
]


def stand_in(name: str, code: str, *needs: str, expected: float = 0.1, **more: Any) -> Section:
    """Return a section that runs Python code, in which RESULTS is the file of records."""
    begin = "import os, sys, time; from benchmarks.gpu_check.records import append\n"
    options = {"limit": 60.0, **more}
    return Section(
        name,
        f"stand-in {name}",
        (sys.executable, "-c", begin + code),
        expected,
        needs=needs,
        **options,
    )


class Check:
    """Runs stand-ins, and reads what became of them."""

    def __init__(self, folder: Path) -> None:
        self.results, self.log = folder / "results.jsonl", folder / "results.log"

    def run(self, *chosen: Section, budget: float = 60.0) -> int:
        runner = Runner(chosen, self.results, self.log, time.monotonic() + budget)
        status = runner.run()
        self.verdicts = {o.section.name: o.verdict for o in runner.outcomes}
        self.reasons = {o.section.name: o.reason for o in runner.outcomes}
        return status

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.results.read_text().splitlines()]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    made = Check(tmp_path)
    monkeypatch.setenv("RESULTS", str(made.results))
    return made


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until(is_so: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not is_so() and time.monotonic() < end:
        time.sleep(0.02)
    return is_so()


# A grandchild that asks not to be ended, its id recorded, and then nothing.
STUBBORN = """
import signal, subprocess
code = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1); time.sleep(99)"
child = subprocess.Popen([sys.executable, "-uc", code], stdout=subprocess.PIPE)
child.stdout.readline()
append(os.environ["RESULTS"], "long", child=child.pid)
print("half of the results", flush=True)
time.sleep(99)
"""


def child_of(check: Check) -> int:
    return next(record["child"] for record in check.records() if "child" in record)


def test_a_section_that_overruns_is_killed_with_its_children(
    check: Check, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = time.monotonic()
    status = check.run(stand_in("long", STUBBORN, limit=3.0), stand_in("next", "pass"))
    assert time.monotonic() - begin < 20
    assert status == 1
    assert check.verdicts == {"long": Verdict.KILLED, "next": Verdict.PASSED}
    assert "more than 3 s" in check.reasons["long"]
    assert not is_running(child_of(check))
    assert "half of the results" in check.log.read_text()
    shown = capsys.readouterr().out
    assert "half of the results" in shown
    *_, header, long, following, missed = shown.splitlines()
    assert header.split() == ["section", "verdict", "seconds"]
    assert long.split()[:2] == ["long", "KILLED"]
    assert following.split()[:2] == ["next", "passed"]
    assert missed == "NOT REACHED: none"


def test_children_left_behind_are_ended(check: Check) -> None:
    code = """
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"])
append(os.environ["RESULTS"], "brief", child=child.pid)
"""
    assert check.run(stand_in("brief", code)) == 0
    assert wait_until(lambda: not is_running(child_of(check)))


def test_what_does_not_fit_is_named(check: Check, capsys: pytest.CaptureFixture[str]) -> None:
    """And what comes after it and is short enough still runs."""
    status = check.run(
        stand_in("first", "pass"),
        stand_in("large", "pass", expected=1000.0),
        stand_in("small", "pass"),
        stand_in("rest", "pass", expected=900.0, is_rest=True),
    )
    assert status == 3
    reached = Verdict.PASSED, Verdict.NOT_REACHED, Verdict.PASSED, Verdict.NOT_REACHED
    assert tuple(check.verdicts.values()) == reached
    assert capsys.readouterr().out.splitlines()[-1] == "NOT REACHED: large, rest"
    assert [r["section"] for r in check.records() if r.get("verdict") == "NOT REACHED"] == [
        "large",
        "rest",
    ]


@pytest.mark.parametrize(("is_rest", "status"), [(False, 3), (True, 0)])
def test_the_end_of_the_budget_cuts_a_section_off(check: Check, is_rest: bool, status: int) -> None:
    """Which is no failure of its, and none at all of what is there to fill the time."""
    begin = time.monotonic()
    sleeper = stand_in("long", "time.sleep(99)", is_rest=is_rest)
    assert check.run(sleeper, budget=6.0) == status
    assert check.verdicts == {"long": Verdict.CUT_OFF}
    assert time.monotonic() - begin < 6.0


def test_failures_recorded_before_a_cut_count(check: Check) -> None:
    code = 'append(os.environ["RESULTS"], "long", failed=True); time.sleep(99)'
    assert check.run(stand_in("long", code), budget=8.0) == 1
    assert check.verdicts == {"long": Verdict.FAILED}
    assert "1 failures recorded, at the end of the budget" in check.reasons["long"]


@pytest.mark.parametrize(("is_rest", "told"), [(False, 7), (True, 40)])
def test_a_section_is_told_when_to_end(check: Check, is_rest: bool, told: int) -> None:
    """By what it should take; of the rest by what is left, less what a last case takes."""
    section = stand_in("told", 'print("told", sys.argv[1])', expected=7.0, is_rest=is_rest)
    check.run(replace(section, command=(*section.command, "{seconds}"), limit=50.0))
    assert f"told {told}\n" in check.log.read_text()


def test_a_failure_stops_only_what_needs_it(
    check: Check, capsys: pytest.CaptureFixture[str]
) -> None:
    status = check.run(
        stand_in("build", "sys.exit(4)"),
        stand_in("tests", "pass", "build"),
        stand_in("after", "pass", "tests"),
        stand_in("other", "pass"),
    )
    assert status == 1
    failed, skipped = Verdict.FAILED, Verdict.SKIPPED
    assert tuple(check.verdicts.values()) == (failed, skipped, skipped, Verdict.PASSED)
    assert check.reasons["build"] == "exit status 4"
    assert "it needs build" in capsys.readouterr().out.split("NOT REACHED")[0]


def test_what_the_machine_lacks_is_named_and_no_failure(check: Check) -> None:
    code = f'append(os.environ["RESULTS"], "tool", left_out="no tool"); sys.exit({LEFT_OUT})'
    assert check.run(stand_in("tool", code)) == 0
    assert (check.verdicts["tool"], check.reasons["tool"]) == (Verdict.LEFT_OUT, "no tool")


def test_a_missing_sanitizer_is_named(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memcheck.shutil, "which", lambda name: None)
    assert memcheck.check(check.results, "memcheck") == LEFT_OUT
    assert check.records()[0]["left_out"] == "compute-sanitizer was not found"


def a_sanitizer(folder: Path, *, sees: bool, cases_status: int = 0) -> Path:
    """Return a compute-sanitizer that reports every canary, or none, and runs nothing."""
    script = folder / "compute-sanitizer"
    found = 9 if sees else 0
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *--canary*) exit {found} ;; *) exit {cases_status} ;; esac\n'
    )
    script.chmod(0o755)
    return script


@pytest.mark.parametrize(
    ("sees", "cases_status", "expected"),
    [(True, 0, []), (True, 9, ["cases"]), (False, 0, ["canary"])],
)
def test_memcheck_must_see_an_overrun(
    check: Check,
    monkeypatch: pytest.MonkeyPatch,
    sees: bool,
    cases_status: int,
    expected: list[str],
) -> None:
    script = a_sanitizer(check.results.parent, sees=sees, cases_status=cases_status)
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    assert memcheck.check(check.results, "memcheck") == bool(expected)
    failed = [(r["backend"], r["what"]) for r in check.records() if r["failed"]]
    assert failed == [(backend, what) for backend in ("cuda", "triton") for what in expected]


def beside(check: Check, *chosen: Section) -> subprocess.Popen[str]:
    """Run stand-ins in a process of their own, until the first one's child is there."""
    code = f"""
import sys, time
from pathlib import Path
from benchmarks.gpu_check.runner import Runner, Section
results, log = Path({str(check.results)!r}), Path({str(check.log)!r})
sys.exit(Runner({chosen!r}, results, log, time.monotonic() + 120).run())
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE
    )
    assert wait_until(lambda: check.log.exists() and "half of" in check.log.read_text())
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_kills_the_children_and_prints_the_table(check: Check, number: int) -> None:
    process = beside(check, stand_in("long", STUBBORN), stand_in("next", "pass"))
    process.send_signal(number)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert not is_running(child_of(check))
    *_, long, missed = shown.splitlines()
    assert long.split()[:3] == ["long", "cut", "off"]
    assert signal.Signals(number).name in long
    assert missed == "NOT REACHED: next"


def test_records_outlive_the_runner(check: Check) -> None:
    process = beside(check, stand_in("first", "pass"), stand_in("long", STUBBORN))
    process.kill()
    process.communicate()
    os.killpg(os.getpgid(child_of(check)), signal.SIGKILL)
    records = [(r["section"], r.get("record")) for r in check.records()]
    begun = [("first", "begin"), ("first", "end"), ("long", "begin"), ("long", None)]
    assert records == begun
    assert "half of the results" in check.log.read_text()


def main(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / ".ci" / "gpu-check", *arguments],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )


def test_the_plan_needs_no_gpu() -> None:
    done = main("--plan")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    planned = [line.split()[0] for line in lines if line and line[0] != " "][1:]
    assert planned == NAMES
    assert "540 s" in lines[0]


def test_the_order_is_by_value_and_the_expected_times_fit() -> None:
    made = sections.sections(PLANNED, Path("results"), ("python",))
    assert [section.name for section in made] == NAMES
    assert sum(section.expected for section in made if not section.is_rest) < 540
    assert [section.name for section in made if section.is_rest] == NAMES[-3:]
    for section in made:
        assert section.limit >= section.expected
        assert set(section.needs) <= set(NAMES[: NAMES.index(section.name)])


@pytest.mark.parametrize("budget", ["soon", "0", "-1", "nan", "inf", ""])
def test_a_budget_that_is_none_is_refused(budget: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main([f"--budget={budget}", "--plan"])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert f"--budget {budget}" in said
    assert ", ".join(NAMES) in said


def test_an_unknown_section_is_refused_with_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(["--section", "smoke", "--section", "smok"])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "--section smok: unknown" in said
    assert ", ".join(NAMES) in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_a_sentence(tmp_path: Path) -> None:
    done = main("--out", str(tmp_path))
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "needs an NVIDIA GPU" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_build_for_another_architecture_does_not_fit() -> None:
    reasons = list(build.why_unfit("42.0"))
    assert any("this GPU is 42.0" in reason for reason in reasons)


def test_parity_is_recorded_case_by_case(check: Check) -> None:
    """Run on the CPU, where foreach has the bits, and cuda cannot run."""
    where = ["--results", str(check.results), "--section", "smoke"]
    quick = [*where, *shlex.split("--workers 0 --steps 2 --quick --device cpu")]
    assert parity.main([*quick, "--backend", "foreach"]) == 0
    records = check.records()
    assert len(records) == len({record["case"] for record in records}) == 24
    assert not any(record["failed"] for record in records)
    assert parity.main([*quick, "--backend", "cuda"]) == 1
    records = check.records()[24:]
    assert all(record["failed"] and "serves cuda" in record["wrong"][0] for record in records)


def test_a_difference_of_bits_is_a_failure(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(case: Case, backend: str, device: object, steps: int) -> Values:
        if backend == "foreach":
            raise RuntimeError("illegal address")
        return [{"param": torch.tensor([-0.0 if backend == "reference" else 0.0])}]

    monkeypatch.setattr(parity, "run_case", run)
    where = ["--results", str(check.results), "--section", "smoke"]
    backends = shlex.split("--backend reference --backend foreach")
    assert parity.main([*where, *shlex.split("--workers 0 --device cpu"), *backends]) == 1
    assert all(record["failed"] for record in check.records())
    found = {(r["backend"], *r["wrong"]) for r in check.records()}
    raised = "raised RuntimeError: illegal address"
    assert found == {("reference", "params[0].param"), ("foreach", raised)}


STAND_IN_TESTS = """
import os, time
import pytest

pytestmark = pytest.mark.gpu  # and not on the device

@pytest.mark.parametrize("number", range(5))
def test_some(number):
    assert number != 3

@pytest.mark.parametrize("place", ["foreach-cuda", "cuda-cuda"])
def test_place(place):
    assert place == "cuda-cuda"  # the other is of another section

@pytest.mark.large
def test_alone():
    pytest.skip("no memory")
"""


class TestTests:
    """The processes of pytest: each takes a share, and a failure is recorded at once."""

    def run(self, folder: Path, *texts: str) -> tuple[int, str, list[dict[str, Any]]]:
        results = folder / "results.jsonl"
        for i, text in enumerate(texts):
            (folder / f"test_{i}.py").write_text(text)
        (folder / "test_unrelated.py").write_text("raise RuntimeError('no GPU, no import')")
        command = [sys.executable, "-m", "benchmarks.gpu_check.tests", "--tests", str(folder)]
        command += ["--results", str(results), "--section", "tests", "--workers", "2"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        records = [json.loads(line) for line in results.read_text().splitlines()]
        return done.returncode, done.stdout, records

    def test_shares_are_disjoint_and_complete(self, tmp_path: Path) -> None:
        status, shown, records = self.run(tmp_path, STAND_IN_TESTS)
        assert status == 1
        (failure,) = [record for record in records if record.get("failed")]
        assert failure["test"].endswith("test_some[3]")
        assert "assert 3 != 3" in failure["wrong"]
        assert shown.splitlines()[-1] == "5 passed, 1 failed, 1 skipped"

    def test_a_process_that_dies_is_a_failure_of_its_test(self, tmp_path: Path) -> None:
        code = STAND_IN_TESTS.replace("assert number != 3", "assert number != 3 or os._exit(7)")
        status, _, records = self.run(tmp_path, code)
        assert status == 1
        (failure,) = [record for record in records if record.get("failed")]
        assert failure["test"].endswith("test_some[3]")
        assert "status 7" in failure["wrong"]

    def test_a_file_that_cannot_be_imported_is_a_failure(self, tmp_path: Path) -> None:
        status, _, records = self.run(tmp_path, STAND_IN_TESTS, "import not_there  # mark.gpu")
        assert status == 1
        tests = {record["test"].rpartition("/")[2] for record in records if record.get("failed")}
        assert tests == {"test_0.py::test_some[3]", "test_1.py"}

    def test_no_test_at_all_is_a_failure(self, tmp_path: Path) -> None:
        assert self.run(tmp_path, "# mark.gpu")[0] == 1


def test_files_without_places_are_not_collected() -> None:
    names = {path.name for path in files_of_gpu_tests(ROOT / "tests")}
    assert {"test_streams.py", "test_cuda_graphs.py", "test_amp.py", "test_backends.py"} <= names
    assert names.isdisjoint({"test_install.py", "test_paper_data.py", "test_cuda_machine_code.py"})
    takes_a_place = re.compile(
        r"def test_\w+\([^)]*\b(?:place|device)\b: (?:Place|torch\.device)[,)]"
    )
    for path in (ROOT / "tests").rglob("test_*.py"):
        assert path.name in names or not takes_a_place.search(path.read_text()), path


def test_no_file_vanishes_without_hypothesis_and_expecttest(tmp_path: Path) -> None:
    """What needs them is left out by name, its neighbours run."""
    (tmp_path / "without.py").write_text(
        "import sys\nsys.modules |= dict.fromkeys(['hypothesis', 'expecttest'])\n"
    )
    chosen = "near_the_fraction or own_inputs or listed_twice"
    files = [
        str(ROOT / "tests" / "optimizer" / f"test_{name}.py")
        for name in ("hyperparameters", "torch_parity")
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "without", "-rs", "-q", "-k", chosen, *files],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(map(str, (tmp_path, ROOT)))}
        | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "hypothesis is not installed" in done.stdout
    assert "expecttest" in done.stdout
    assert re.search(r"[1-9]\d* passed", done.stdout)
    for path in (ROOT / "tests").rglob("*.py"):
        imports = re.search(r"^(?:from|import) (?:hypothesis|expecttest)", path.read_text(), re.M)
        assert imports is None, path


def test_a_test_on_a_gpu_place_is_marked(tmp_path: Path) -> None:
    """Also where it was parametrised without a mark."""
    (tmp_path / "test_places.py").write_text("""
import pytest, torch
from helpers.support import Place

@pytest.mark.parametrize("place", [Place(torch.device(d), "cpu") for d in ("cpu", "cuda")], ids=str)
def test_place(place): pass

@pytest.mark.parametrize("device", [torch.device(d) for d in ("cpu", "cuda:1")], ids=str)
def test_device(device): pass

def test_neither(): pass
""")
    program = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "conftest",
        "-m",
        "gpu",
        "--collect-only",
        "-q",
    ]
    done = subprocess.run(
        [*program, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])},
        capture_output=True,
        text=True,
    )
    collected = [line for line in done.stdout.splitlines() if "::" in line]
    assert len(collected) == 2, done.stdout + done.stderr
    assert all("cuda" in line for line in collected)
