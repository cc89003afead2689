"""The bench command: what it refuses, leaves out, times and writes. No times are asserted."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from adamal_kernels import __main__
from adamal_kernels.backends import BACKENDS
from adamal_kernels.bench import command, contenders, plot
from adamal_kernels.bench import run as bench_run
from adamal_kernels.bench.cases import CASES, SCALING, BenchCase, Room
from adamal_kernels.bench.contenders import BASELINE, OURS, PEERS, Contender, Entrant
from adamal_kernels.bench.measure import sectors_changed, snapshot
from adamal_kernels.bench.run import Pace, Venue, gradients, time_case
from adamal_kernels.bucket import Bucket
from adamal_kernels.cases import Case, cases

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
    assert names(cold) == ours | torchs
    assert (cold["tensors"], cold["parameters"], cold["gradients"]) == (2, 13, "kept")
    assert names(by_case["small", "saturated"]) == {"adamal-cpu", BASELINE, "torch-fused-amsgrad"}
    assert names(by_case["3x16", "cold"]) == {"adamal-cpu", BASELINE, "torch-foreach"}
    for record in found["cases"]:
        assert record["error"] is None
        assert record["failed"] == record["left_out"] == {}
        for result in record["results"]:
            wall = result["wall_s"]
            assert 0 < wall["q1"] <= wall["median"] <= wall["q3"]
            assert wall["samples"] == 1
            others = names(record) - {result["contender"]}
            assert result["times_faster_than"].keys() == others
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
        (["--rounds", "0"], ["--rounds 0"]),
        (["--device", "cuda:77"], ["cuda:77", "CUDA devices"]),
        (["--device", "toaster"], ["--device toaster"]),
        (["--device", "meta"], ["only cpu and cuda"]),
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
        if bucket.key.dtypes.param == torch.bfloat16:
            max(bucket.exp_avgs, key=Tensor.numel).view(torch.int32).view(-1)[0] ^= 1

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
def test_a_named_backend_that_cannot_run_exits_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        BACKENDS["cpu"], "unavailable", lambda device: "planted reason", raising=False
    )
    status, found = bench(tmp_path, "--backend", "cpu", "--case", "small")
    assert status == 1
    assert found["left_out"]["adamal-cpu"] == "planted reason"
    status, found = bench(tmp_path, "--case", "small")
    assert status == 0
    assert "adamal-cpu" not in names(found["cases"][0])


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


def test_a_case_too_large_says_so_before_it_allocates() -> None:
    case = BenchCase("large", "large", lambda room: [(1 << 40,)])
    (record,) = time_case(case, torch.float32, list(PEERS.values())[:1], PLENTY, Pace(1.0, 1))
    assert record.results == []
    assert record.error is not None
    assert BASELINE in record.error
    assert "GiB" in record.error


def test_heats_fit_into_memory_and_all_hold_the_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    case = BenchCase("heats", "heats", lambda room: [(1000,)])
    four = [PEERS[name] for name in (BASELINE, "torch-fused-amsgrad", "torch-foreach")]
    four.insert(1, OURS["cpu"])
    # 4 bytes of gradients, 12 of the baseline, 12 of ours or 16 of amsgrad; 20 of foreach.
    venue = Venue(CPU, 33_000)
    seen: list[list[str]] = []
    time_heat = bench_run._time_heat
    monkeypatch.setattr(
        bench_run,
        "_time_heat",
        lambda heat, *rest: (seen.append([c.name for c in heat]), time_heat(heat, *rest)),
    )
    (record,) = time_case(case, torch.float32, four, venue, Pace(1.0, 1))
    assert seen == [[BASELINE, "adamal-cpu"], [BASELINE, "torch-fused-amsgrad"]]
    assert [result.contender for result in record.results] == [
        BASELINE,
        "adamal-cpu",
        "torch-fused-amsgrad",
    ]
    assert "GiB" in record.left_out["torch-foreach"]
    assert record.results[1].times_faster_than.keys() == {BASELINE}


def test_whoever_would_take_too_long_is_left_out() -> None:
    chosen = [PEERS[BASELINE], PEERS["torch-for-loop"]]
    rates = {"torch-for-loop": 1.0, BASELINE: 9.0}
    (record, _) = time_case(TINY["small"], torch.float32, chosen, PLENTY, Pace(0.01), rates)
    assert record.left_out == {"torch-for-loop": "a step would take 13.0 s"}
    assert [result.contender for result in record.results] == [BASELINE]
    given = Pace(0.01, rounds=1)
    (record, _) = time_case(TINY["small"], torch.float32, chosen, PLENTY, given, rates)
    assert record.left_out == {}


def test_contenders_alternate_and_gradients_are_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[str, set[int]]] = []

    def recording(name: str) -> Contender:
        class Recording(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                params = self.param_groups[0]["params"]
                steps.append((name, {p.grad.data_ptr() for p in params}))

        return Contender(name, lambda groups: Recording(groups, lr=0.1), principal=True)

    case = BenchCase("fresh", "fresh", lambda room: 1000 * [(16,)])
    pair = [recording(BASELINE), recording("other")]
    (record,) = time_case(case, torch.float32, pair, PLENTY, Pace(1.0, 3))
    assert record.gradients == "fresh"
    timed = steps[-6:]
    assert [name for name, _ in timed] == 3 * [BASELINE, "other"]
    for name in (BASELINE, "other"):
        addresses = [grads for who, grads in timed if who == name]
        assert all(before.isdisjoint(after) for before, after in pairwise(addresses))


def test_slow_contenders_sit_out_at_even_intervals() -> None:
    entrants = [
        Entrant(PEERS[name], [(4,)], torch.float32, CPU) for name in (BASELINE, "torch-for-loop")
    ]
    turns: list[str] = []
    samples = bench_run._alternate(
        entrants,
        {BASELINE: 6, "torch-for-loop": 2},
        [torch.ones(4)],
        False,
        CPU,
        turns.append,
        "",
    )
    assert [len(samples[name]) for name in (BASELINE, "torch-for-loop")] == [6, 2]
    slow = [int(turn.split("round ")[1].split()[0]) for turn in turns if "for-loop" in turn]
    assert slow == [3, 6]


def test_v_is_written_when_cold_and_not_when_saturated() -> None:
    case = BenchCase("v", "v", lambda room: [(1000,), (7,)], saturated=True)
    pair = [PEERS[BASELINE], OURS["reference"], OURS["cpu"]]
    if OURS["cpu"].unavailable(CPU):
        pytest.skip("the cpu backend is not built")
    cold, saturated = time_case(case, torch.float32, pair, PLENTY, Pace(1.0, 1))
    assert {r.contender: r.v_sectors_written for r in cold.results} == {
        BASELINE: None,
        "adamal-reference": None,
        "adamal-cpu": 1.0,
    }
    (ours,) = [result for result in saturated.results if result.ours]
    assert ours.v_sectors_written == 0.0


@pytest.mark.parametrize(
    ("contender", "dtype", "written", "expected"),
    [
        (PEERS[BASELINE], torch.float32, 1.0, 28),
        (PEERS["torch-fused-amsgrad"], torch.float32, 1.0, 36),
        (PEERS[BASELINE], torch.bfloat16, 1.0, 14),
        (OURS["cpu"], torch.float32, 1.0, 28),
        (OURS["cpu"], torch.float32, 0.25, 25),
        (OURS["cpu"], torch.bfloat16, 1.0, 22),
        (PEERS["torch-foreach"], torch.float32, 1.0, None),
    ],
)
@pytest.mark.parametrize("shape", [(), (5,)])
def test_bytes_a_parameter(
    contender: Contender,
    dtype: torch.dtype,
    written: float,
    expected: float | None,
    shape: tuple[int, ...],
) -> None:
    if reason := contender.unavailable(CPU):
        pytest.skip(reason)
    entrant = Entrant(contender, [shape], dtype, CPU)
    entrant.take_gradients([torch.ones(shape, dtype=dtype)], fresh=False)
    entrant.optimizer.step()
    assert entrant.bytes_per_parameter(written) == expected


def test_sectors_changed() -> None:
    tensors = [torch.zeros(17), torch.zeros(2, 4, dtype=torch.float64)]
    before = snapshot(tensors)
    assert sectors_changed(before, tensors) == 0.0
    tensors[0][16] = 1.0
    assert sectors_changed(before, tensors) == 1 / 5
    tensors[1][0] = 1.0
    tensors[0][:3] = -0.0
    assert sectors_changed(before, tensors) == 3 / 5


def test_gradients_are_random_whatever_their_size() -> None:
    made = gradients([(3,), (2, 2), ((1 << 20) + 5,)], torch.float32, CPU)
    assert [tuple(grad.shape) for grad in made] == [(3,), (2, 2), ((1 << 20) + 5,)]
    assert all(0 < grad.abs().max() < 10 and len(grad.unique()) > 2 for grad in made)


# Tensors and parameters of the published models.
@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [
        ("resnet50", 161, 25_557_032),
        ("gpt2-124m", 148, 124_439_808),
        ("vit-b", 152, 86_567_656),
        ("llama3-8b-stack", 9, 218_112_000),
        ("lora-2000", 2000, 16_384_000),
        ("1xhuge", 1, 20_000_000),
        ("300xlarge", 300, 30_000_000),
        ("2000x2048", 2000, 4_096_000),
        ("2000x16", 2000, 32_000),
        ("20000x16", 20_000, 320_000),
        ("2000-groups", 2000, 32_000),
    ],
)
def test_sizes_of_the_cases(name: str, tensors: int, parameters: int) -> None:
    shapes = CASES[name].shapes(Room("cpu", 250_000_000))
    assert len(shapes) == tensors
    assert sum(torch.Size(shape).numel() for shape in shapes) == parameters


def test_sizes_follow_the_memory_of_a_gpu() -> None:
    def parameters(name: str, elements: int) -> int:
        shapes = CASES[name].shapes(Room("cuda", elements))
        return sum(torch.Size(shape).numel() for shape in shapes)

    assert parameters("1xhuge", 5 * 10**9) == 10**9
    assert parameters("1xhuge", 10**8) == 10**8
    assert parameters("300xlarge", 5 * 10**9) == 3 * 10**8
    assert parameters("llama3-8b-stack", 5 * 10**9) == 22 * 218_112_000
    sizes = {shape[0] for shape in CASES["2000x1k-10k"].shapes(Room("cuda", 10**9))}
    assert (min(sizes), max(sizes), len(sizes)) == (1000, 10_000, 2000)


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


def host_instructions() -> ModuleType:
    file = Path(__file__).parents[1] / "benchmarks" / "host_instructions.py"
    spec = importlib.util.spec_from_file_location("host_instructions", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_more_instructions_than_recorded_are_a_failure() -> None:
    guard = host_instructions()
    recorded = json.loads(guard.RECORD.read_text())
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
