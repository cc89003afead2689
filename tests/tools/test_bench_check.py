"""The guard of the host's instructions: what it compares, and what it lacks."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def host_instructions() -> ModuleType:
    file = Path(__file__).parents[2] / "benchmarks" / "host_instructions.py"
    spec = importlib.util.spec_from_file_location("host_instructions", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("version", ["3.11", "3.13"])
def test_more_instructions_than_recorded_are_a_failure(version: str) -> None:
    guard = host_instructions()
    recorded = json.loads(guard.RECORD.read_text())[version]
    assert recorded["environment"]["python"].startswith(f"{version}.")
    assert recorded["instructions_a_tensor"].keys() == guard.CASES.keys()

    def found(factor: float) -> dict[str, Any]:
        counts = {case: factor * n for case, n in recorded["instructions_a_tensor"].items()}
        return {**recorded, "instructions_a_tensor": counts}

    assert guard.compare(recorded, recorded)[1]
    assert guard.compare(found(1.02), recorded)[1]
    lines, passed = guard.compare(found(1.05), recorded)
    assert not passed
    assert "+5.0%" in lines[0]
    lines, passed = guard.compare(found(0.5), recorded)
    assert passed
    assert "--record" in lines[0]
    elsewhere = {**found(1.0), "environment": {"torch": "other"}}
    assert "other versions" in guard.compare(elsewhere, recorded)[0][-1]


def test_bench_check_without_valgrind_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guard = host_instructions()
    monkeypatch.setenv("PATH", "/nowhere")
    assert guard.main([]) == 2
    assert "install valgrind" in capsys.readouterr().err


def test_a_python_without_a_record_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guard = host_instructions()
    monkeypatch.setattr(guard.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(guard, "count", dict)
    monkeypatch.setattr(guard, "environment", lambda: {"python": "3.9.1"})
    assert guard.main([]) == 2
    assert "no record for Python 3.9" in capsys.readouterr().err
