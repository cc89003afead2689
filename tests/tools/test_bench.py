"""The bench command: what it refuses, leaves out, times and writes. No times are asserted."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from adamal_kernels import __main__
from adamal_kernels.backends import BACKENDS
from adamal_kernels.bench import command, contenders, plot, report
from adamal_kernels.bench import run as bench_run
from adamal_kernels.bench.cases import CASES, SCALING, BenchCase
from adamal_kernels.bench.contenders import BASELINE, OURS, PEERS, Contender
from adamal_kernels.bench.measure import Sample, Spread
from adamal_kernels.bench.run import Pace, Venue, time_case
from adamal_kernels.core.bucket import Bucket
from adamal_kernels.verify.cases import Case, cases

CPU = torch.device("cpu")
PLENTY = Venue(CPU, 1 << 40)

TINY = {
    "small": BenchCase("small", "small", lambda room: [(3,), (2, 5)], saturated=True),
    "grouped": BenchCase("grouped", "grouped", lambda room: 3 * [(4,)], group_each=True),
}
TINY_SCALING = {
    "scaling-tensors": [
        BenchCase(f"{n}x16", f"{n} x 16", lambda room, n=n: n * [(16,)], series="scaling-tensors")
        for n in (1, 3)
    ]
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases that take no time, and a gate of few cases."""
    monkeypatch.setattr(command, "CASES", TINY)
    monkeypatch.setattr(command, "SCALING", TINY_SCALING)
    monkeypatch.setattr(command, "_MOST_CPU_MEMORY", 1 << 24)
    gate: list[Case] = [c for c in cases() if c.variant == "default" and not c.special]
    monkeypatch.setattr(bench_run, "cases", lambda: iter(gate))


def bench(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Run the command with one round; return its exit status and its JSON."""
    file = folder / "bench.json"
    options = ["bench", "--device", "cpu", "--rounds", "1", "--json", str(file), *arguments]
    status = __main__.main(options)
    return status, json.loads(file.read_text())


def names(record: dict[str, Any]) -> set[str]:
    return {result["contender"] for result in record["results"]}


def without_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        top = name.partition(".")[0]
        raise ModuleNotFoundError(f"No module named {top!r}", name=top)

    monkeypatch.setattr(contenders, "import_module", missing)


@pytest.mark.usefixtures("tiny")
def test_times_everyone_and_writes_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_packages(monkeypatch)
    status, found = bench(tmp_path)
    assert status == 0
    assert found["command"].startswith("python -m adamal_kernels bench --device cpu --rounds 1")
    assert found["device"]["type"] == "cpu"
    assert found["device"]["name"]
    assert found["versions"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["date"][:2] == "20"
    assert found["copy_bytes_a_second"]["median"] > 0

    ours = {OURS[name].name for name in ("cpu", "foreach", "reference")}
    torchs = {name for name, peer in PEERS.items() if peer.module is None}
    assert {(check["backend"], check["dtype"]) for check in found["parity"]} == {
        (name, "float32") for name in ("cpu", "foreach", "reference")
    }
    assert all(check["mismatches"] == [] for check in found["parity"])
    by_case = {(record["case"], record["v"]): record for record in found["cases"]}
    assert by_case.keys() == {
        ("small", "cold"),
        ("small", "saturated"),
        ("grouped", "cold"),
        ("1x16", "cold"),
        ("3x16", "cold"),
    }
    cold = by_case["small", "cold"]
    ours_cold = next(r for r in cold["results"] if r["contender"] == "adamal-cpu")
    # The slow ones step in rounds of their own.
    assert ours_cold["times_faster_than"].keys() == {BASELINE, "torch-fused-amsgrad"}
    assert names(cold) == ours | torchs
    assert (cold["tensors"], cold["parameters"], cold["gradients"]) == (2, 13, "kept")
    assert names(by_case["small", "saturated"]) == {"adamal-cpu", BASELINE, "torch-fused-amsgrad"}
    assert names(by_case["3x16", "cold"]) == {"adamal-cpu", BASELINE, "torch-foreach"}
    for record in found["cases"]:
        assert record["error"] is None
        assert record["other_cores"] is None or record["other_cores"] >= 0
        assert record["failed"] == record["left_out"] == {}
        for result in record["results"]:
            wall = result["wall_s"]
            assert 0 < wall["q1"] <= wall["median"] <= wall["q3"]
            assert wall["samples"] == 1
            others = {BASELINE} - {result["contender"]}
            assert others <= result["times_faster_than"].keys() <= names(record)
            expected = wall["median"] / record["tensors"] * 1e6
            assert result["microseconds_a_tensor"] == pytest.approx(expected)
    printed = capsys.readouterr().out
    for word in (*ours, *torchs, "grouped", "v saturated", "optimi", "not installed"):
        assert word in printed


@pytest.mark.usefixtures("tiny")
def test_only_what_was_chosen(tmp_path: Path) -> None:
    _, found = bench(
        tmp_path, "--case", "grouped", "--backend", "cpu", "--peer", "torch-foreach",
        "--dtype", "bfloat16", "--dtype", "float64",
    )  # fmt: skip
    assert [(record["case"], record["dtype"]) for record in found["cases"]] == [
        ("grouped", "bfloat16"),
        ("grouped", "float64"),
    ]
    for record in found["cases"]:
        assert names(record) == {"adamal-cpu", BASELINE, "torch-foreach"}


@pytest.mark.parametrize(
    ("option", "known"),
    [("--case", [*CASES, *SCALING]), ("--peer", list(PEERS)), ("--backend", list(BACKENDS))],
)
def test_unknown_names_are_told_the_known_ones(
    option: str, known: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        __main__.main(["bench", option, "nobody"])
    assert left.value.code == 2
    message = capsys.readouterr().err
    assert option in message
    assert "nobody" in message
    assert [name for name in known if name not in message] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rounds", "0"], ["--rounds", "'0' is not a positive whole number"]),
        (["--rounds", "1.5"], ["--rounds", "'1.5' is not a positive whole number"]),
        (["--seconds", "0"], ["--seconds", "'0' is not a positive number"]),
        (["--device", "cuda:77"], ["--device", "cuda:77", "finds here: cpu"]),
        (["--device", "toaster"], ["--device", "toaster", "finds here: cpu"]),
        (["--device", "meta"], ["--device", "meta", "finds here: cpu"]),
        (["--plot", "-"], ["--plot -", "name one"]),
        (["--json", "/nowhere/x.json"], ["--json", "/nowhere"]),
        (["--plot", "/nowhere/x.png"], ["--plot", "/nowhere"]),
    ],
)
def test_refused_before_anything_is_timed(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        __main__.main(["bench", *arguments])
    assert left.value.code == 2
    message = capsys.readouterr().err
    assert [word for word in words if word not in message] == []


def test_a_plot_without_matplotlib_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as left:
        __main__.main(["bench", "--plot", str(tmp_path / "x.png")])
    assert left.value.code == 2
    assert "pip install 'adamal-kernels[plot]'" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_nothing_is_timed_of_a_backend_whose_parity_is_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    foreach = BACKENDS["foreach"]
    rightly = foreach.step

    def step(bucket: Bucket) -> None:
        rightly(bucket)
        if bucket.key.format.param == torch.bfloat16:
            max(bucket.buffers["exp_avg"], key=Tensor.numel).view(torch.int32).view(-1)[0] ^= 1

    monkeypatch.setattr(foreach, "step", step, raising=False)
    status, found = bench(tmp_path, "--dtype", "float32", "--dtype", "bfloat16", "--case", "small")
    assert status == 1
    red = [check for check in found["parity"] if check["mismatches"]]
    assert [(check["backend"], check["dtype"]) for check in red] == [("foreach", "bfloat16")]
    assert "differs from reference" in red[0]["mismatches"][0]
    for record in found["cases"]:
        assert "adamal-foreach" not in names(record)
        assert BASELINE in names(record)
    assert "red" in found["left_out"]["adamal-foreach"]
    assert "foreach, bfloat16" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny")
def test_a_wrong_reference_is_caught_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = BACKENDS["reference"]
    rightly = reference.step

    def step(bucket: Bucket) -> None:
        bucket.scalars = [row._replace(bias2_sqrt=1.0) for row in bucket.scalars]
        rightly(bucket)

    monkeypatch.setattr(reference, "step", step, raising=False)
    status, found = bench(tmp_path, "--backend", "reference", "--case", "small")
    assert status == 1
    assert "far from the oracle" in found["parity"][0]["mismatches"][0]
    assert "adamal-reference" not in names(found["cases"][0])


@pytest.mark.usefixtures("tiny")
def test_a_named_backend_that_cannot_run_is_told_before_anything_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        BACKENDS["cpu"], "unavailable", lambda device: "planted [reason]", raising=False
    )
    with monkeypatch.context() as patch:
        patch.delattr(command, "time_case")
        patch.delattr(bench_run, "run_case")
        status, found = bench(tmp_path, "--backend", "cpu", "--case", "small")
    assert status == 1
    assert found["left_out"]["adamal-cpu"] == "planted [reason]"
    assert found["cases"] == []
    printed = " ".join(capsys.readouterr().out.split())
    assert "adamal-cpu was asked for and cannot run here: planted [reason]" in printed
    both = ["--backend", "cpu", "--backend", "foreach", "--case", "small"]
    status, found = bench(tmp_path, *both)
    assert status == 1
    assert "adamal-foreach" in names(found["cases"][0])
    status, found = bench(tmp_path, "--case", "small")
    assert status == 0
    assert "adamal-cpu" not in names(found["cases"][0])


@pytest.fixture
def ended_in_the_second_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Ctrl-C in the second case; returns what the file then held."""
    held: list[Any] = []
    rightly = command.time_case

    def time_case(case: BenchCase, *more: Any) -> Any:
        if case.name == "grouped":
            held.append(json.loads((tmp_path / "bench.json").read_text()))
            raise KeyboardInterrupt
        return rightly(case, *more)

    monkeypatch.setattr(command, "time_case", time_case)
    return held


NOT_REACHED = ["grouped", "scaling-tensors, 1x16", "scaling-tensors, 3x16"]


@pytest.mark.usefixtures("tiny")
def test_ctrl_c_prints_and_writes_what_is_done(
    tmp_path: Path, ended_in_the_second_case: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    only = ["--backend", "cpu", "--peer", BASELINE]
    status, found = bench(tmp_path, *only)
    assert status == 130
    # A kill would have lost no more.
    for content in (*ended_in_the_second_case, found):
        assert [(r["case"], r["v"]) for r in content["cases"]] == [
            ("small", "cold"),
            ("small", "saturated"),
        ]
        assert content["copy_bytes_a_second"]["median"] > 0
        assert content["not_reached"] == NOT_REACHED
    printed = capsys.readouterr().out
    assert "NOT REACHED: 3 of 4 cases" in printed
    assert [name for name in NOT_REACHED if printed.count(name) < 2] == []
    assert "adamal-cpu" in printed


@pytest.mark.usefixtures("tiny")
def test_no_case_starts_after_the_time_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    paces: list[float] = []
    rightly = command.time_case

    def time_case(*given: Any) -> Any:
        nonlocal now
        now += 10
        paces.append(given[4].seconds)
        return rightly(*given)

    monkeypatch.setattr(command, "time_case", time_case)
    monkeypatch.setattr(command, "deadline", lambda seconds: seconds)
    monkeypatch.setattr(command.time, "monotonic", lambda: now)
    only = ["--backend", "cpu", "--peer", BASELINE, "--dtype", "bfloat16"]
    status, found = bench(tmp_path, "--seconds", "12", *only)
    assert status == 0
    assert {record["case"] for record in found["cases"]} == {"small", "grouped"}
    assert found["not_reached"] == [f"scaling-tensors, {n}x16, bfloat16" for n in (1, 3)]
    assert "NOT REACHED: 2 of 4 cases" in capsys.readouterr().out
    # The last one is not to take longer than there is time left.
    assert paces == [7.0, 2.0]


@pytest.mark.usefixtures("tiny")
def test_a_run_that_times_nothing_exits_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "nothing.png"
    status, found = bench(tmp_path, "--seconds", "1e-9", "--plot", str(plot))
    assert status == 1
    assert found["cases"] == []
    assert found["not_reached"] == ["small", *NOT_REACHED]
    assert found["copy_bytes_a_second"] is None
    printed = capsys.readouterr().out
    assert "NOT REACHED: 4 of 4 cases" in printed
    assert "nothing was timed" in printed
    assert plot.exists()


@pytest.mark.usefixtures("tiny")
def test_json_on_standard_output_is_alone_there(capsys: pytest.CaptureFixture[str]) -> None:
    only = ["--backend", "cpu", "--peer", BASELINE, "--rounds", "1", "--device", "cpu"]
    assert __main__.main(["bench", "--case", "small", *only, "--json", "-"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["cases"][0]["case"] == "small"
    assert "adamal-cpu" in printed.err


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("width", [200, 80, 40])
def test_no_number_is_cut_off(
    width: int, is_terminal: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = bench_run.Record(
        "planted",
        "A model of many words",
        None,
        "bfloat16",
        "saturated",
        2000,
        218_112_000,
        "fresh",
    )
    spread = Spread(0.36712, 0.35111, 0.38222, 5)
    for name in (BASELINE, "torch-fused-amsgrad", "adamal-cpu"):
        result = bench_run.Result(
            name, False, spread, None, None, 183.56, 28.0, 21.7e9, 0.987, {BASELINE: 12.345}
        )
        record.results.append(result)
    curve = [
        replace(record, title=f"{n} x 16", series="scaling-tensors", v="cold") for n in (1, 10_000)
    ]
    where = report.environment(CPU, "command")
    found = report.Run(where, Spread.of([24e9]), records=[record, *curve])
    report.print_run(found, Console(width=width, force_terminal=is_terminal, color_system=None))
    printed = capsys.readouterr().out
    assert "…" not in printed
    if is_terminal:
        assert max(map(len, printed.splitlines())) <= width
    for number in ("367 ms", "351 ms .. 382 ms", "12.35", "184", "28", "99%", "21.7", "0.90"):
        assert printed.count(number) >= 2, number
    for text in ("model", "218 M", "v saturated", "fresh gradients", "10000 x 16"):
        assert text in printed


def refuse(*_: object, **__: object) -> Any:
    raise ValueError("planted refusal\nwith a second line")


class Refusing(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        refuse()


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("build", [refuse, lambda groups: Refusing(groups)])
def test_a_peer_that_raises_is_reported_and_the_rest_timed(
    build: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(PEERS, "planted", Contender("planted", build))
    status, found = bench(tmp_path, "--case", "small", "--backend", "cpu")
    assert status == 0
    record = found["cases"][0]
    assert record["failed"] == {"planted": "ValueError: planted refusal"}
    assert {"adamal-cpu", BASELINE} <= names(record)
    assert "planted refusal" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny")
def test_ours_raising_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OURS, "cpu", Contender("adamal-cpu", refuse, backend="cpu"))
    status, found = bench(tmp_path, "--case", "small")
    assert status == 1
    assert "adamal-cpu" in found["cases"][0]["failed"]


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("source", "word"),
    [("raise OSError('planted')", "planted"), ("import nowhere_to_be_found", "nowhere_to_be")],
)
def test_a_package_that_does_not_import_is_left_out(
    source: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_adam_package.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    peer = Contender("planted", refuse, module="broken_adam_package")
    monkeypatch.setitem(PEERS, "planted", peer)
    status, found = bench(tmp_path, "--case", "small", "--backend", "cpu")
    assert status == 0
    assert "cannot be imported" in found["left_out"]["planted"]
    assert word in found["left_out"]["planted"]


def out_of_memory(*_: object) -> Any:
    # torch's own error of the CPU allocator.
    return torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.usefixtures("tiny")
def test_out_of_memory_ends_the_case_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planted = BenchCase("planted", "planted", lambda room: [(8,)])
    monkeypatch.setattr(command, "CASES", {"planted": planted, **TINY})
    allocate = bench_run.gradients
    monkeypatch.setattr(
        bench_run,
        "gradients",
        lambda shapes, *where: out_of_memory() if shapes == [(8,)] else allocate(shapes, *where),
    )
    status, found = bench(tmp_path, "--backend", "cpu")
    assert status == 0
    first, *rest = found["cases"]
    assert (first["case"], first["results"]) == ("planted", [])
    assert first["error"].startswith("out of memory")
    assert all(record["results"] and record["error"] is None for record in rest)
    assert "planted" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("arguments", [[], ["--case", "scaling-tensors"], ["--case", "small"]])
def test_the_plot_is_a_png(arguments: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    bench(tmp_path, "--backend", "cpu", "--plot", str(tmp_path / "{device}.png"), *arguments)
    (file,) = tmp_path.glob("*.png")
    assert "{" not in file.name
    content = file.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert width > 800
    assert height > 400
    from matplotlib.image import imread

    assert len({tuple(pixel) for pixel in imread(file).reshape(-1, 4)[::7]}) > 10


def test_a_gpus_own_time_is_shown_written_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")

    def on_gpu(step: Callable[[], None], device: object, prepare: Callable[[], None]) -> Sample:
        prepare()
        step()
        return Sample(wall=4e-3, host=3e-3, device=2e-3)

    monkeypatch.setattr(bench_run, "time_step", on_gpu)
    pair = [PEERS[BASELINE], PEERS["torch-fused-amsgrad"]]
    records = time_case(TINY["small"], torch.float32, pair, PLENTY, Pace(1.0, 2))
    where = report.environment(CPU, "command")
    where["device"]["type"] = "cuda"
    records[0].other_cores = 1.3
    found = report.Run(where, Spread.of([1e9]), {}, {}, records)

    written = report.as_json(found)["cases"][0]["results"][1]
    assert (written["host_s"]["median"], written["device_s"]["median"]) == (3e-3, 2e-3)
    assert written["times_faster_on_device"] == {BASELINE: 1.0}
    # 36 bytes for each of 13 parameters, in the device's time.
    assert written["bytes_a_second"] == pytest.approx(36 * 13 / 2e-3)
    report.print_run(found, Console(width=200))
    printed = capsys.readouterr().out
    assert "device" in printed
    assert "2 ms" in printed
    assert "others: 1.3 cores" in printed
    assert "run again when it is idle" in printed
    plot.draw(found, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
