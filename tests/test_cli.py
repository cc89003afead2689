"""The command line: what it prints, what it writes, and its exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import adamal_kernels
from adamal_kernels import __main__, backends, verify
from adamal_kernels.backends import BACKENDS
from adamal_kernels.bucket import Bucket
from adamal_kernels.cases import Case, cases

FEW: list[Case] = [case for case in cases() if case.variant == "box"][::11]


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "cases", lambda: iter(FEW))


def unavailable(monkeypatch: pytest.MonkeyPatch, name: str, reason: str) -> None:
    monkeypatch.setattr(BACKENDS[name], "unavailable", lambda device: reason, raising=False)


def plant_mismatch(monkeypatch: pytest.MonkeyPatch, name: str, where: str) -> None:
    """Make the backend change one bit of ``where`` in the first tensor of its buckets."""
    rightly = BACKENDS[name].step

    def step(bucket: Bucket) -> None:
        rightly(bucket)
        tensor = next(tensor for tensor in getattr(bucket, where) if tensor.numel())
        bits = tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])
        bits.view(-1)[0] ^= 1

    monkeypatch.setattr(BACKENDS[name], "step", step, raising=False)


def run(arguments: str, *more: str) -> subprocess.CompletedProcess[str]:
    root = Path(adamal_kernels.__file__).parents[1]
    command = [sys.executable, "-m", "adamal_kernels", *arguments.split(), *more]
    environment = {**os.environ, "PYTHONPATH": str(root), "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_info_as_a_command(tmp_path: Path) -> None:
    done = run("info --json", str(tmp_path / "info.json"))
    assert done.returncode == 0, done.stderr
    assert adamal_kernels.__version__ in done.stdout
    assert torch.__version__ in done.stdout
    for name in BACKENDS:
        assert name in done.stdout
    found = json.loads((tmp_path / "info.json").read_text())
    assert found["backends"]["reference"]["cpu"] == "usable"
    assert found["versions"]["torch"] == torch.__version__


def test_unknown_commands_and_backends_exit_2() -> None:
    for arguments in (["verify", "--backend", "gpu"], ["prove"], [], ["info", "--backend", "cpu"]):
        with pytest.raises(SystemExit) as left:
            __main__.main(arguments)
        assert left.value.code == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        __main__.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out.strip() == adamal_kernels.__version__


def test_a_folder_that_is_not_there_is_told_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        __main__.main(["verify", "--json", str(tmp_path / "none" / "verify.json")])
    assert left.value.code == 2
    assert "cannot be written" in capsys.readouterr().err


def test_info_says_why_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unavailable(monkeypatch, "cpu", "planted reason")
    assert __main__.main(["info"]) == 0
    assert "planted reason" in capsys.readouterr().out


@pytest.mark.usefixtures("few_cases")
def test_verify_reference(tmp_path: Path) -> None:
    file = tmp_path / "verify.json"
    assert __main__.main(["verify", "--backend", "reference", "--json", str(file)]) == 0
    found: dict[str, Any] = json.loads(file.read_text())
    assert found["ok"] is True
    assert found["cases"] == [case.name for case in FEW]
    assert [outcome["backend"] for outcome in found["outcomes"]] == ["reference"] * len(
        verify.devices()
    )
    assert [outcome["passed"] for outcome in found["outcomes"]] == [len(FEW)] * len(
        verify.devices()
    )


@pytest.mark.usefixtures("few_cases")
def test_verify_checks_all_that_can_run(tmp_path: Path) -> None:
    file = tmp_path / "verify.json"
    assert __main__.main(["verify", "--json", str(file)]) == 0
    outcomes = json.loads(file.read_text())["outcomes"]
    assert {outcome["backend"] for outcome in outcomes} == set(BACKENDS)
    for outcome in outcomes:
        reason = BACKENDS[outcome["backend"]].unavailable(torch.device(outcome["device"]))
        assert outcome["left_out"] == reason
        done = outcome["passed"] + len(outcome["unsupported"])
        assert done == (0 if reason else len(FEW))


@pytest.mark.usefixtures("few_cases")
@pytest.mark.parametrize(
    ("where", "value"),
    [("params", "param"), ("exp_avgs", "exp_avg"), ("exp_avg_sqs", "exp_avg_sq")],
)
def test_a_planted_mismatch_is_named(
    where: str,
    value: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plant_mismatch(monkeypatch, "foreach", where)
    file = tmp_path / "verify.json"
    assert __main__.main(["verify", "--backend", "foreach", "--json", str(file)]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert f"foreach on cpu, {FEW[0].name}" in printed
    assert f"params[0].{value} differs from reference" in printed
    found = json.loads(file.read_text())
    assert found["ok"] is False
    on_cpu = next(outcome for outcome in found["outcomes"] if outcome["device"] == "cpu")
    assert on_cpu["passed"] == 0
    assert on_cpu["mismatches"].keys() == {case.name for case in FEW}


@pytest.mark.usefixtures("few_cases")
def test_a_wrong_reference_is_caught_by_the_oracle(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = BACKENDS["reference"]
    rightly = reference.step

    def step(bucket: Bucket) -> None:
        bucket.scalars = [row._replace(bias2_sqrt=1.0) for row in bucket.scalars]
        rightly(bucket)

    monkeypatch.setattr(reference, "step", step, raising=False)
    assert __main__.main(["verify", "--backend", "reference"]) == 1
    assert "is far from the oracle" in capsys.readouterr().out


@pytest.mark.usefixtures("few_cases")
def test_a_named_backend_that_cannot_run_exits_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backends, "_announced", set())
    unavailable(monkeypatch, "cpu", "planted reason")
    assert __main__.main(["verify", "--backend", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "planted reason" in printed
    assert "cpu was asked for and cannot run here" in " ".join(printed.split())
    assert __main__.main(["verify"]) == 0
