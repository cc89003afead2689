"""The command line: what it prints, what it writes, and its exit status."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import adamal_kernels
from adamal_kernels import __main__, backends, command_line
from adamal_kernels.backends import BACKENDS
from adamal_kernels.core.bucket import Bucket
from adamal_kernels.core.buffers import SecondMoment
from adamal_kernels.core.storage import FORMATS
from adamal_kernels.verify import parity as verify
from adamal_kernels.verify.cases import QUICK_STEPS, Case, cases, quick_cases

ROOT = Path(adamal_kernels.__file__).parents[1]
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
        streams = {"param": bucket.params, **bucket.buffers}
        tensor = next(tensor for tensor in streams[where] if tensor.numel())
        bits = tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])
        bits.view(-1)[0] ^= 1

    monkeypatch.setattr(BACKENDS[name], "step", step, raising=False)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}


def run(arguments: str, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "adamal_kernels", *arguments.split(), *more]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment())


def python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment())


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], ["prove"]])
def test_without_a_command_torch_is_not_imported(arguments: list[str]) -> None:
    script = """if True:
        import runpy, sys
        try:
            runpy.run_module("adamal_kernels", run_name="__main__", alter_sys=True)
        finally:
            print("heavy:", sorted({"torch", "numpy", "rich"} & sys.modules.keys()))
    """
    done = python(script, *arguments)
    assert done.returncode == (2 if arguments == ["prove"] else 0), done.stderr
    assert done.stdout.endswith("heavy: []\n")
    if arguments in ([], ["--help"]):
        assert all(command in done.stdout for command in ("info", "verify", "bench"))


def test_the_package_imports_torch_with_its_first_name() -> None:
    script = """if True:
        import sys
        import adamal_kernels
        assert "torch" not in sys.modules
        assert set(adamal_kernels.__all__) <= set(dir(adamal_kernels))
        assert not hasattr(adamal_kernels, "AdamAll")
        assert "torch" not in sys.modules
        from adamal_kernels import *
        from adamal_kernels.projections import Box as TheSame
        assert Box is TheSame is adamal_kernels.Box is vars(adamal_kernels)["Box"]
        print(*sorted(name for name in adamal_kernels.__all__ if name in globals()))
    """
    done = python(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == sorted(adamal_kernels.__all__)
    assert pickle.loads(pickle.dumps(adamal_kernels.Box(-1, 1))) == adamal_kernels.Box(-1, 1)


def test_the_console_script_and_the_module_name_themselves(tmp_path: Path) -> None:
    entry = re.search(
        r'^\[project.scripts\]\nadamal = "(.+):(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M
    )
    assert entry is not None
    script = tmp_path / "adamal"  # As pip writes it.
    script.write_text(f"import sys\nfrom {entry[1]} import {entry[2]}\nsys.exit({entry[2]}())\n")
    command = [sys.executable, str(script), "verify", "--case", "nobody"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 2
    assert done.stderr.startswith("usage: adamal verify ")
    done = run("verify --case nobody")
    assert done.stderr.startswith("usage: python -m adamal_kernels verify ")


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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prove"], ["prove", "info", "verify", "bench"]),
        (["info", "--backend", "cpu"], ["--backend"]),
        (["verify", "--backend", "gpu"], ["--backend", "gpu", *BACKENDS]),
        (["verify", "--against", "cuda"], ["--against", "cuda", "reference", "cpu"]),
        (["verify", "--device", "cuda:77"], ["--device", "cuda:77", "finds here: cpu"]),
        (["verify", "--device", "toaster"], ["--device", "toaster", "finds here: cpu"]),
        (["verify", "--seconds", "soon"], ["--seconds", "'soon' is not a positive number"]),
        (["verify", "--seconds", "-1"], ["--seconds", "'-1' is not a positive number"]),
        (["verify", "--seconds", "nan"], ["--seconds", "'nan' is not a positive number"]),
        (["verify", "--case", "L2"], ["'L2'", "'*L2*' matches", "\n  monotone, float32, L2 ball"]),
        (["verify", "--case", "monotone, float32, bax"], ["bax'", "\n  monotone, float32, box\n"]),
        (["verify", "--json", "{folder}"], ["--json", "is a folder"]),
        (["verify", "--json", "{folder}/none/x"], ["--json", "none does not exist"]),
        (["info", "--json", "{folder}/none/x"], ["--json", "none does not exist"]),
    ],
)
def test_refused_before_the_work(
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delattr(verify, "run_case")
    with pytest.raises(SystemExit) as left:
        __main__.main([argument.format(folder=tmp_path) for argument in arguments])
    assert left.value.code == 2
    message = capsys.readouterr().err
    assert [word for word in words if word not in message] == [], message


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        __main__.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out.strip() == adamal_kernels.__version__


def test_info_says_why_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unavailable(monkeypatch, "cpu", "planted reason")
    assert __main__.main(["info"]) == 0
    assert "planted reason" in capsys.readouterr().out


def test_info_says_which_backend_a_user_gets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lines() -> list[str]:
        assert __main__.main(["info"]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if " tensors: " in line]

    on_cpu, on_gpu = lines()
    assert on_cpu == "CPU tensors: cpu"
    if not torch.cuda.is_available():
        assert on_gpu.startswith("CUDA tensors: none, because torch finds no usable CUDA device")
    # In brackets, as rich's markup is.
    unavailable(monkeypatch, "cpu", "planted reason; pip install 'adamal-kernels[planted]'")
    unavailable(monkeypatch, "cuda", "another")
    unavailable(monkeypatch, "triton", "a third")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert lines() == [
        "CPU tensors: foreach, because cpu: planted reason; pip install 'adamal-kernels[planted]'",
        "CUDA tensors: foreach, because cuda: another; triton: a third",
    ]


@pytest.mark.usefixtures("few_cases")
def test_verify_reference(tmp_path: Path) -> None:
    file = tmp_path / "verify.json"
    assert __main__.main(["verify", "--backend", "reference", "--json", str(file)]) == 0
    found: dict[str, Any] = json.loads(file.read_text())
    assert found["ok"] is True
    assert found["not_reached"] == []
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
@pytest.mark.parametrize("value", ["param", "exp_avg", "exp_avg_sq"])
def test_a_planted_mismatch_is_named(
    value: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plant_mismatch(monkeypatch, "foreach", value)
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


def test_a_named_backend_that_cannot_run_is_told_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unavailable(monkeypatch, "cpu", "planted reason")
    monkeypatch.delattr(verify, "run_case")
    monkeypatch.delattr(verify, "run_oracle")
    file = tmp_path / "verify.json"
    for option in ("--backend", "--against"):
        assert __main__.main(["verify", option, "cpu", "--json", str(file)]) == 1
        printed = " ".join(capsys.readouterr().out.split())
        assert "cpu was asked for and cannot run here: planted reason" in printed
        assert json.loads(file.read_text())["ok"] is False


@pytest.mark.usefixtures("few_cases")
def test_of_two_named_backends_the_one_that_can_run_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backends, "_announced", set())
    unavailable(monkeypatch, "cpu", "planted reason")
    file = tmp_path / "verify.json"
    both = ["--backend", "cpu", "--backend", "foreach"]
    assert __main__.main(["verify", *both, "--json", str(file)]) == 1
    assert "cpu was asked for and cannot run here" in capsys.readouterr().out
    passed = {o["backend"]: o["passed"] for o in json.loads(file.read_text())["outcomes"]}
    assert (passed["cpu"], passed["foreach"]) == (0, len(FEW))
    assert __main__.main(["verify"]) == 0


@pytest.mark.usefixtures("few_cases")
def test_only_backends_that_take_a_case_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS["cpu"], "unsupported", lambda key: "planted", raising=False)
    monkeypatch.delattr(verify, "run_case")
    check = verify.Verification(["cpu"])
    for case in FEW:
        check.run(case)
    assert check.outcomes[0].unsupported == {case.name: "planted" for case in FEW}
    assert not check.agrees


@pytest.mark.usefixtures("few_cases")
def test_what_a_backend_raises_is_a_mismatch_and_the_rest_is_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rightly = BACKENDS["foreach"].step

    def step(bucket: Bucket) -> None:
        if bucket.key.format == FEW[0].dtypes:
            raise RuntimeError("planted [error]")
        rightly(bucket)

    monkeypatch.setattr(BACKENDS["foreach"], "step", step, raising=False)
    assert __main__.main(["verify", "--backend", "foreach", "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert FEW[0].name in printed
    assert "raised RuntimeError: planted [error]" in printed
    assert FEW[-1].name not in printed


class Clock:
    """A clock that only moves when a case is run."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """Every case takes 10 seconds."""
    clock = Clock()
    rightly = verify.run_oracle

    def run_oracle(case: Case, steps: int) -> Any:
        clock.now += 10
        return rightly(case, steps)

    monkeypatch.setattr(verify, "run_oracle", run_oracle)
    monkeypatch.setattr(verify.time, "monotonic", clock.monotonic)
    monkeypatch.setattr(command_line.time, "monotonic", clock.monotonic)
    return clock


@pytest.mark.usefixtures("few_cases", "clock")
@pytest.mark.parametrize(("is_right", "status"), [(True, 0), (False, 1)])
def test_no_case_starts_after_the_time_is_used(
    is_right: bool,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not is_right:
        plant_mismatch(monkeypatch, "foreach", "param")
    file = tmp_path / "verify.json"
    only = ["--backend", "foreach", "--device", "cpu", "--json", str(file)]
    assert __main__.main(["verify", "--seconds", "20", *only]) == status
    assert f"NOT REACHED: {len(FEW) - 2} of {len(FEW)} cases" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["not_reached"] == [case.name for case in FEW[2:]]
    (outcome,) = found["outcomes"]
    assert outcome["passed"] + len(outcome["mismatches"]) == 2
    assert found["ok"] is is_right


@pytest.mark.usefixtures("few_cases")
def test_a_run_that_checks_nothing_exits_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["verify", "--seconds", "1e-9"]) == 1
    printed = capsys.readouterr().out
    assert f"NOT REACHED: {len(FEW)} of {len(FEW)} cases" in printed
    assert "nothing was checked" in printed


@pytest.mark.usefixtures("few_cases")
def test_the_json_is_whole_after_every_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "verify.json"
    file.write_text("what an earlier run left")
    seen: list[Any] = []
    rightly = verify.Verification.run

    def run(check: verify.Verification, case: Case) -> None:
        seen.append(json.loads(file.read_text()))
        rightly(check, case)

    monkeypatch.setattr(verify.Verification, "run", run)
    only = ["--backend", "foreach", "--device", "cpu"]
    assert __main__.main(["verify", *only, "--json", str(file)]) == 0
    assert [found["outcomes"][0]["passed"] for found in seen] == list(range(len(FEW)))
    assert [len(found["not_reached"]) for found in seen] == list(range(len(FEW), 0, -1))
    assert [path.name for path in tmp_path.iterdir()] == ["verify.json"]


def test_a_write_that_fails_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "found.json"
    command_line.JsonOutput(file, lambda: 1).finish()
    rightly = Path.write_text

    def half(path: Path, text: str) -> None:
        rightly(path, text[:2])
        raise OSError("planted: no space left")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="planted"):
        command_line.JsonOutput(file, lambda: "another").update()
    assert file.read_text() == "1\n"
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def test_a_link_and_a_pipe_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for name in ("link", "pipe"):
        output = command_line.JsonOutput(tmp_path / name, lambda: {"a": 1})
        output.update()
        output.finish()
    assert os.read(reader, 100) == b'{\n "a": 1\n}\n'
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "file").read_text()) == {"a": 1}


@pytest.mark.usefixtures("few_cases")
@pytest.mark.parametrize("command", ["info", "verify"])
def test_json_on_standard_output_is_alone_there(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert __main__.main([command, "--json", "-"]) == 0
    printed = capsys.readouterr()
    assert "outcomes" in json.loads(printed.out) or "auto" in json.loads(printed.out)
    assert "reference" in printed.err


@pytest.mark.parametrize(
    "command", ["verify --backend foreach", "bench --case 20000x16 --rounds 99"]
)
def test_ctrl_c_prints_and_writes_what_is_done(command: str, tmp_path: Path) -> None:
    # A shell's background jobs ignore Ctrl-C, and so would what they start.
    script = """if True:
        import signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from adamal_kernels.__main__ import main
        sys.exit(main(sys.argv[1:]))
    """
    file = tmp_path / "found.json"
    process = subprocess.Popen(
        [sys.executable, "-c", script, *command.split(), "--json", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    end = time.monotonic() + 300
    while not (file.exists() and is_under_way(json.loads(file.read_text()))):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate()
    assert process.returncode == 130
    assert errors == ""
    found = json.loads(file.read_text())
    assert f"NOT REACHED: {len(found['not_reached'])} of " in printed
    assert found["not_reached"]


def is_under_way(found: dict[str, Any]) -> bool:
    """Whether verify has checked a case; bench has one alone, and has only begun it."""
    return "outcomes" not in found or found["outcomes"][0]["passed"] > 0


def test_ctrl_c_elsewhere_leaves_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("adamal_kernels.info.collect", interrupt)
    assert __main__.main(["info"]) == 130


def test_quick_covers_every_pair_second_moment_and_variant() -> None:
    quick = list(quick_cases())
    assert {(case.dtypes, case.second_moment) for case in quick} == {
        (dtypes, second_moment) for dtypes in FORMATS for second_moment in SecondMoment
    }
    assert {case.variant for case in quick} == {case.variant for case in cases()}
    assert len(quick) == len(FORMATS) * len(SecondMoment)


def test_quick_on_the_cpu_backend(tmp_path: Path) -> None:
    file = tmp_path / "verify.json"
    arguments = ["verify", "--quick", "--backend", "cpu", "--device", "cpu", "--json", str(file)]
    assert __main__.main(arguments) == 0
    found = json.loads(file.read_text())
    assert found["steps"] == QUICK_STEPS
    assert found["cases"] == [case.name for case in quick_cases()]
    assert found["outcomes"][0]["passed"] == len(found["cases"])


def test_cases_are_chosen_by_name_and_by_pattern(tmp_path: Path) -> None:
    file = tmp_path / "verify.json"
    chosen = ["--case", "plain, float64, box", "--case", "amsgrad, float16, *special*"]
    only = ["--backend", "foreach", "--device", "cpu", "--quick", "--json", str(file)]
    assert __main__.main(["verify", *chosen, *only]) == 0
    found = json.loads(file.read_text())
    assert found["cases"] == [
        "plain, float64, box",
        *(
            f"amsgrad, float16, {name}, special gradients"
            for name in ("default", "box", "algorithm 1")
        ),
    ]
    assert found["steps"] == QUICK_STEPS


@pytest.mark.usefixtures("few_cases")
def test_only_the_named_device(tmp_path: Path) -> None:
    file = tmp_path / "verify.json"
    assert __main__.main(["verify", "--device", "cpu", "--json", str(file)]) == 0
    outcomes = json.loads(file.read_text())["outcomes"]
    assert {outcome["device"] for outcome in outcomes} == {"cpu"}
    assert {"cpu", "foreach", "reference"} <= {outcome["backend"] for outcome in outcomes}
    assert "cuda" not in {outcome["backend"] for outcome in outcomes}
    refused = verify.Verification(["cuda"], device=torch.device("cpu")).refused
    assert "it serves cuda tensors" in refused["cuda"]


@pytest.mark.usefixtures("few_cases")
def test_the_measure_can_be_the_cpu_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(bucket: Bucket) -> None:
        raise AssertionError("reference is not the measure")

    with monkeypatch.context() as patch:
        patch.setattr(BACKENDS["reference"], "step", never, raising=False)
        assert __main__.main(["verify", "--against", "cpu", "--backend", "foreach"]) == 0
    plant_mismatch(monkeypatch, "cpu", "param")
    file = tmp_path / "verify.json"
    arguments = ["verify", "--against", "cpu", "--backend", "foreach", "--json", str(file)]
    assert __main__.main(arguments) == 1
    assert "params[0].param differs from cpu" in capsys.readouterr().out
    assert json.loads(file.read_text())["against"] == "cpu"


def test_against_cpu_the_cpu_backend_runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for a GPU: reference's bits, on whatever device it is asked for."""
    asked = []
    gpu = torch.device("cuda", 0)
    rightly = verify.run_case

    def run_case(case: Case, backend: str, device: torch.device, steps: int) -> Any:
        asked.append((backend, device))
        return rightly(case, backend, torch.device("cpu"), steps)

    monkeypatch.setattr(verify, "run_case", run_case)
    for against, where in (("cpu", torch.device("cpu")), ("reference", gpu)):
        asked.clear()
        check = verify.Verification(["foreach"], device=gpu, against=against, steps=2)
        check.run(FEW[0])
        assert asked == [("foreach", gpu), (against, where)]
        assert check.agrees


def test_cases_have_the_same_values_on_every_device(device: torch.device) -> None:
    for case in quick_cases():
        there, here = case.params(device), case.params()
        for step in range(2):
            tensors = zip(
                [*there, *case.grads(step, there)], [*here, *case.grads(step, here)], strict=True
            )
            for one, other in tensors:
                assert (one is None) == (other is None)
                if one is not None and other is not None:
                    assert one.device == device
                    assert one.stride() == other.stride()
                    assert verify.same_bits(one, other)


@pytest.mark.parametrize("width", [200, 80, 45, 24])
def test_tables_lose_nothing(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [
        "a case of some words",
        "torch-fused-amsgrad\ntorch-fused",
        "123.456 ms\n7.5 µs",
        "98.7%\n-",
    ]
    headers = ["case", "optimizer", "wall", "of copy"]
    command_line.print_table(
        Console(width=width), "title", headers, [cells], wrapped=0, right=(2, 3)
    )
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= width
    words = " ".join([*headers, *cells]).split()
    assert [word for word in words if word not in printed] == []


@pytest.mark.usefixtures("few_cases")
@pytest.mark.parametrize("columns", [80, 40, 25])
def test_narrow_terminals_lose_nothing(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for command in ("verify", "info"):
        assert __main__.main([command]) == 0
        printed = capsys.readouterr().out
        assert "…" not in printed
        assert "foreach" in printed
        assert str(len(FEW)) in printed.split() or command == "info"
