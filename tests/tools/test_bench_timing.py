"""How a case is timed: who steps when, with which gradients, and what is made of it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from adamal_kernels.bench import measure
from adamal_kernels.bench import run as bench_run
from adamal_kernels.bench.cases import CASES, BenchCase, Room
from adamal_kernels.bench.contenders import BASELINE, OURS, PEERS, Contender, Entrant
from adamal_kernels.bench.measure import OtherLoad, sectors_changed, snapshot
from adamal_kernels.bench.run import Pace, Venue, gradients, time_case

CPU = torch.device("cpu")
PLENTY = Venue(CPU, 1 << 40)

SMALL = BenchCase("small", "small", lambda room: [(3,), (2, 5)], saturated=True)


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
    rates = {"torch-for-loop": 1.0, BASELINE: 9.0}  # Seconds a parameter, of 13.
    (record, _) = time_case(SMALL, torch.float32, chosen, PLENTY, Pace(0.01), rates)
    assert record.left_out == {"torch-for-loop": "a step would take 13.0 s"}
    assert [result.contender for result in record.results] == [BASELINE]
    given = Pace(0.01, rounds=1)
    (record, _) = time_case(SMALL, torch.float32, chosen, PLENTY, given, rates)
    assert record.left_out == {}


Steps = list[tuple[str, set[int]]]


def recording(name: str, steps: Steps, **known: Any) -> Contender:
    """Return a contender that notes its name and its gradients' addresses at every step."""

    class Recording(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            params = self.param_groups[0]["params"]
            steps.append((name, {p.grad.data_ptr() for p in params}))

    return Contender(name, lambda groups: Recording(groups, lr=0.1), **known)


def test_contenders_alternate_and_gradients_are_fresh() -> None:
    steps: Steps = []
    case = BenchCase("fresh", "fresh", lambda room: 1000 * [(16,)])
    pair = [recording(name, steps, principal=True) for name in (BASELINE, "other")]
    (record,) = time_case(case, torch.float32, pair, PLENTY, Pace(1.0, 3))
    assert record.gradients == "fresh"
    timed = steps[-6:]
    assert [name for name, _ in timed] == 3 * [BASELINE, "other"]
    for name in (BASELINE, "other"):
        addresses = [grads for who, grads in timed if who == name]
        assert all(before.isdisjoint(after) for before, after in pairwise(addresses))


def test_two_alternate_while_nobody_else_steps() -> None:
    steps: Steps = []
    contenders = [
        recording(BASELINE, steps, principal=True),
        recording("ours", steps, principal=True, backend="cpu"),
        recording("peer", steps, principal=True),
        recording("slow", steps),
    ]
    case = BenchCase("pairs", "pairs", lambda room: [(4,)])
    (record,) = time_case(case, torch.float32, contenders, PLENTY, Pace(1.0, 2))
    untimed = 2
    heats = [
        untimed * [BASELINE]
        + untimed * ["ours"]
        + untimed * ["peer"]
        # One more round than is timed.
        + 3 * [BASELINE, "ours"]
        + 3 * [BASELINE, "peer"]
        + 3 * ["peer", "ours"],
        untimed * [BASELINE] + untimed * ["slow"] + 3 * [BASELINE, "slow"],
    ]
    assert [name for name, _ in steps] == heats[0] + heats[1]
    assert {result.contender: result.times_faster_than.keys() for result in record.results} == {
        BASELINE: {"ours", "peer", "slow"},
        "ours": {BASELINE, "peer"},
        "peer": {BASELINE, "ours"},
        "slow": {BASELINE},
    }
    assert all(result.wall_s.samples == 2 for result in record.results)


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


def test_what_others_do_is_counted_and_what_this_process_does_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # user, nice, system, idle, iowait, irq, softirq, steal: 2 seconds of work, then 5.5.
    stats = [
        "cpu 100 10 60 900 90 10 10 10 7 7\ncpu0 1",
        "cpu 300 20 80 999 99 20 30 100 9 9\ncpu0 1",
    ]
    seconds = {"perf_counter": [0.0, 4.0], "process_time": [1.0, 2.5]}
    monkeypatch.setattr(measure.Path, "read_text", lambda path: stats.pop(0))
    monkeypatch.setattr(measure.os, "sysconf", lambda name: 100)
    for clock, values in seconds.items():
        monkeypatch.setattr(measure.time, clock, lambda values=values: values.pop(0))
    assert OtherLoad().cores() == pytest.approx((3.5 - 1.5) / 4)


def test_other_load_is_unknown_where_the_system_does_not_tell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(path: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(measure.Path, "read_text", missing)
    assert OtherLoad().cores() is None


class Queue:
    """A stand-in for a GPU: launches take time in turn, behind a queue that holds 1024 of them."""

    def __init__(self) -> None:
        self.host = 0.0
        self.ends: list[float] = []

    def launch(self, seconds: float) -> float:
        self.host += 5e-6
        if len(self.ends) >= 1024:
            self.host = max(self.host, self.ends[-1024])
        start = max(self.host, self.ends[-1] if self.ends else 0.0)
        self.ends.append(start + seconds)
        return self.ends[-1]

    def wait(self) -> None:
        self.host = max(self.host, self.ends[-1] if self.ends else 0.0)

    def event(self, enable_timing: bool) -> Any:
        queue = self

        class Event:
            at = 0.0

            def record(self) -> None:
                self.at = queue.launch(0.0)

            def query(self) -> bool:
                return self.at <= queue.host

            def synchronize(self) -> None:
                queue.host = max(queue.host, self.at)

            def elapsed_time(self, other: Any) -> float:
                return (other.at - self.at) * 1e3

        return Event()


@pytest.mark.parametrize(
    ("launches", "host_seconds", "is_known"),
    [(1, 0.0, True), (1000, 0.0, True), (1100, 0.0, False), (20_000, 0.0, False), (1, 2.0, False)],
)
def test_the_devices_time_is_left_out_where_it_would_be_the_hosts(
    launches: int, host_seconds: float, is_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = Queue()
    monkeypatch.setattr(measure.time, "perf_counter", lambda: queue.host)
    monkeypatch.setattr(torch.cuda, "Event", queue.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: queue.wait())
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: queue.launch(cycles / 2e9))

    def step() -> None:
        for _ in range(launches):
            queue.launch(1e-6)
        queue.host += host_seconds

    sample = measure.time_step(step, torch.device("cuda", 0), lambda: None)
    if is_known:
        assert sample.device == pytest.approx(launches * 1e-6)
    else:
        assert sample.device is None
    assert sample.host is not None
    assert sample.wall >= sample.host
