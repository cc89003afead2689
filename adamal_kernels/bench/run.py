"""The run: parity first, then contenders two by two, a step each in turn, case after case."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType

import torch
from torch import Tensor

from ..core.buffers import SecondMoment
from ..core.storage import Format, compute_dtype
from ..verify import different_values, outside_tolerance, run_case, run_oracle
from ..verify.cases import cases
from .cases import BenchCase, Room, Shape
from .contenders import BASELINE, Contender, Entrant, first_line
from .measure import OtherLoad, Sample, Spread, sectors_changed, snapshot, time_step

__all__ = [
    "Gate",
    "Pace",
    "Record",
    "Result",
    "Venue",
    "case_room",
    "dtype_name",
    "gradients",
    "time_case",
    "why_no_room",
]

_GATE_VARIANTS = ("default", "decoupled decay", "box, special gradients")
_FEWEST_ROUNDS = 3
_FEWEST_PRINCIPAL_ROUNDS = 5
_MOST_ROUNDS = 300
# Whoever takes longer is left out. A first step, which makes the state, may take a few times that,
# and so may an expectation, which may come from a busy moment.
_LONGEST_STEP_SECONDS = 1.2
_FIRST_STEP_FACTOR = 4
_RANDOM_BLOCK = 1 << 20

Report = Callable[[str], None]


@dataclass(frozen=True)
class Venue:
    """Where it is timed."""

    device: torch.device
    memory: int
    """Bytes that a case may take."""


@dataclass(frozen=True)
class Pace:
    """How long it is timed."""

    seconds: float
    """For one case; divided among its pairs, so that slow ones step in fewer rounds."""
    rounds: int | None = None
    """Timed steps of every contender, instead of as many as there is time for."""

    def is_too_slow(self, contender: Contender, step_seconds: float) -> bool:
        """Whether a step takes so long that the contender is left out."""
        if self.rounds is not None or contender.principal:
            return False
        return step_seconds > _LONGEST_STEP_SECONDS

    def rounds_of(self, contender: Contender, round_seconds: float, seconds: float) -> int:
        """Return how many rounds to time in ``seconds``, at about ``round_seconds`` each."""
        if self.rounds is not None:
            return self.rounds
        fewest = _FEWEST_PRINCIPAL_ROUNDS if contender.principal else _FEWEST_ROUNDS
        return max(fewest, min(_MOST_ROUNDS, int(seconds / round_seconds)))


@dataclass
class Result:
    """What was measured of one contender in one case."""

    contender: str
    ours: bool
    wall_s: Spread
    """From the call of ``step()`` until its work is done."""
    host_s: Spread | None
    """Until the call returns; None where that is the same."""
    device_s: Spread | None
    """The device's own time; None without a GPU, and where no sample has it."""
    microseconds_a_tensor: float
    """Of wall time."""
    bytes_a_parameter: float | None
    """Read and written; None where elements are read or written more than once."""
    bytes_a_second: float | None
    v_sectors_written: float | None
    """The fraction of the 32-byte sectors of v that one step changed; known of ours if fused."""
    times_faster_than: dict[str, float] = field(default_factory=dict)
    """By contender it alternated with: that one's median over this one's there, of wall time."""
    times_faster_on_device: dict[str, float] = field(default_factory=dict)


@dataclass
class Record:
    """What came of one case, for one type of parameters and one age of v."""

    case: str
    title: str
    series: str | None
    dtype: str
    v: str
    """``cold``: young, every gradient still makes it grow; ``saturated``: nothing does."""
    tensors: int
    parameters: int
    gradients: str
    """``fresh``: new tensors for every timed step; ``kept``: the same ones."""
    results: list[Result] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """By contender: why there is no memory or time for it."""
    failed: dict[str, str] = field(default_factory=dict)
    """By contender: what it raised when it was built or stepped."""
    other_cores: float | None = None
    """Cores that other processes kept busy meanwhile, on average; None where unknown."""
    error: str | None = None
    """What ended the case early."""


class Gate:
    """Checks a backend's parity once for each type, before anything of it is timed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.mismatches: dict[tuple[str, str], list[str]] = {}
        """By backend and type, those that were checked."""

    @property
    def is_red(self) -> bool:
        """Whether a backend has been caught."""
        return any(self.mismatches.values())

    def check(self, backend: str, dtype: torch.dtype) -> list[str]:
        """Return what differs from ``reference``, bit for bit, or is far from the oracle."""
        place = (backend, dtype_name(dtype))
        if place not in self.mismatches:
            self.mismatches[place] = list(self._differences(backend, dtype))
        return self.mismatches[place]

    def _differences(self, backend: str, dtype: torch.dtype) -> Iterator[str]:
        for case in cases():
            if (
                case.dtypes == Format(dtype, dtype)
                and case.second_moment is SecondMoment.MONOTONE
                and case.variant in _GATE_VARIANTS
            ):
                found = run_case(case, backend, self._device)
                expected = run_case(case, "reference", self._device)
                for value in different_values(found, expected):
                    yield f"{case.name}: {value} differs from reference"
                for value in outside_tolerance(found, run_oracle(case)):
                    yield f"{case.name}: {value} is far from the oracle"


def gradients(shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return random gradients; large ones repeat a block of a million values."""
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(_RANDOM_BLOCK, generator=generator).to(dtype).to(device)
    made = []
    start = 0
    for shape in shapes:
        count = prod(shape)
        grad = torch.empty(count, dtype=dtype, device=device)
        if count <= _RANDOM_BLOCK:
            start = start if start + count <= _RANDOM_BLOCK else 0
            grad.copy_(block[start : start + count])
            start += count
        else:
            for part in grad.split(_RANDOM_BLOCK):
                part.copy_(block[: len(part)])
        made.append(grad.view(shape))
    return made


def time_case(
    case: BenchCase,
    dtype: torch.dtype,
    contenders: Sequence[Contender],
    venue: Venue,
    pace: Pace,
    rates: Mapping[str, float] = MappingProxyType({}),
    report: Report = lambda text: None,
) -> list[Record]:
    """Time ``contenders`` in one case, two by two, in heats that fit into memory.

    Args:
        case: whose tensors.
        dtype: of parameters and gradients.
        contenders: the baseline first, if it is among them.
        venue: where.
        pace: how long.
        rates: by contender, the seconds that a step is known to take for each parameter. Whoever
            would take too long is left out, unless the rounds are given.
        report: is told what is being timed, between timed steps.

    Returns:
        A record for each age of v. What went wrong is in it: running out of memory ends the case.
    """
    shapes = case.shapes(case_room(dtype, contenders, venue))
    ages = ("cold", "saturated") if case.saturated else ("cold",)
    title = case.title_of(shapes)
    fresh = case.fresh_gradients(len(shapes))
    records = {
        age: Record(
            case.name,
            title,
            case.series,
            dtype_name(dtype),
            age,
            len(shapes),
            sum(map(prod, shapes)),
            "fresh" if fresh else "kept",
        )
        for age in ages
    }
    load = OtherLoad()
    try:
        expected = {c: rates.get(c.name, 0.0) * records["cold"].parameters for c in contenders}
        slow = {
            contender.name: f"a step would take {seconds:.1f} s"
            for contender, seconds in expected.items()
            if pace.is_too_slow(contender, seconds / _FIRST_STEP_FACTOR)
        }
        able = [contender for contender in contenders if contender.name not in slow]
        heats, left_out = _heats(shapes, dtype, able, venue)
        records["cold"].left_out |= slow | left_out
        grads = gradients(shapes, dtype, venue.device)
        entries = sum(map(len, heats))
        for heat in heats:
            seconds = pace.seconds * len(heat) / entries
            with _collected(venue.device):
                _time_heat(heat, case, shapes, grads, venue, pace, seconds, records, report)
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        for record in records.values():
            record.error = f"out of memory: {first_line(error)}"
    for record in records.values():
        record.other_cores = load.cores()
    return list(records.values())


def _time_heat(
    heat: Sequence[Contender],
    case: BenchCase,
    shapes: Sequence[Shape],
    grads: Sequence[Tensor],
    venue: Venue,
    pace: Pace,
    seconds: float,
    records: dict[str, Record],
    report: Report,
) -> None:
    """Time the contenders of ``heat``, and add what was found to the records."""
    fresh = case.fresh_gradients(len(shapes))
    entrants: list[Entrant] = []
    expected: dict[str, float] = {}
    for contender in heat:
        report(f"{records['cold'].title}: warming up {contender.name}")
        try:
            entrant = Entrant(contender, shapes, grads[0].dtype, venue.device, case.group_each)
            step_seconds = _untimed_step(entrant, grads, fresh, venue.device)
            if not pace.is_too_slow(contender, step_seconds / _FIRST_STEP_FACTOR):
                step_seconds = _untimed_step(entrant, grads, fresh, venue.device)
        except Exception as error:
            if _is_out_of_memory(error):
                raise
            records["cold"].failed[contender.name] = first_line(error)
            continue
        if pace.is_too_slow(contender, step_seconds):
            records["cold"].left_out[contender.name] = f"a step takes {step_seconds:.1f} s"
            continue
        entrants.append(entrant)
        expected[contender.name] = step_seconds

    for age, record in records.items():
        steppers = entrants if age == "cold" else [e for e in entrants if e.contender.principal]
        if age == "saturated":
            known = {result.contender for result in record.results}
            if known.issuperset(entrant.contender.name for entrant in steppers):
                continue
            for entrant in steppers:
                entrant.saturate()
        written = {
            entrant.contender.name: _v_written(entrant, grads, fresh)
            for entrant in steppers
            if entrant.contender.backend is not None and entrant.contender.fused
        }
        pairs = _pairs(steppers)
        share = seconds / max(1, len(pairs)) / len(records)
        for pair in pairs:
            turn = sum(expected[entrant.contender.name] for entrant in pair)
            rounds = min(pace.rounds_of(entrant.contender, turn, share) for entrant in pair)
            samples = _alternate(pair, rounds, grads, fresh, venue.device, report, record.title)
            _add_results(record, pair, samples, written)


def _pairs(entrants: Sequence[Entrant]) -> list[list[Entrant]]:
    """Return who alternates with whom: everyone with the baseline, ours with principal peers too.

    Two at a time, as a user compares them: more contenders between two steps would drive from the
    caches, for both sides, what is still there when the other one alone has stepped.
    """
    baseline = [entrant for entrant in entrants if entrant.contender.name == BASELINE]
    others = [entrant for entrant in entrants if entrant not in baseline]
    principal = [entrant for entrant in others if entrant.contender.principal]
    ours = [entrant for entrant in principal if entrant.contender.backend is not None]
    peers = [entrant for entrant in principal if entrant.contender.backend is None]
    pairs = [[*baseline, other] for other in others]
    pairs += [[peer, our] for peer in peers for our in ours]
    return pairs or [[entrant] for entrant in baseline]


def _untimed_step(
    entrant: Entrant, grads: Sequence[Tensor], fresh: bool, device: torch.device
) -> float:
    """Take a step that does not count; return about how many seconds a timed one will take."""
    start = time.perf_counter()
    time_step(entrant.optimizer.step, device, lambda: entrant.take_gradients(grads, fresh=fresh))
    return time.perf_counter() - start


def _v_written(entrant: Entrant, grads: Sequence[Tensor], fresh: bool) -> float:
    entrant.take_gradients(grads, fresh=fresh)
    before = snapshot(entrant.second_moments())
    entrant.optimizer.step()
    return sectors_changed(before, entrant.second_moments())


def _alternate(
    pair: Sequence[Entrant],
    rounds: int,
    grads: Sequence[Tensor],
    fresh: bool,
    device: torch.device,
    report: Report,
    title: str,
) -> dict[str, list[Sample]]:
    """Let every entrant step once a round, after one that does not count.

    That one finds in the caches what stepped before.
    """
    samples: dict[str, list[Sample]] = {entrant.contender.name: [] for entrant in pair}
    for number in range(rounds + 1):
        for entrant in pair:
            name = entrant.contender.name
            report(f"{title}: round {number} of {rounds}, {name}")

            def prepare(entrant: Entrant = entrant) -> None:
                entrant.take_gradients(grads, fresh=fresh)

            sample = time_step(entrant.optimizer.step, device, prepare)
            if number > 0:
                samples[name].append(sample)
    return samples


def _add_results(
    record: Record,
    pair: Sequence[Entrant],
    samples: dict[str, list[Sample]],
    written: dict[str, float],
) -> None:
    """Append a result for every entrant that the record has none of yet, and add its ratios."""
    wall = {name: Spread.of([s.wall for s in taken]) for name, taken in samples.items()}
    host = _spreads({name: [s.host for s in taken] for name, taken in samples.items()})
    device = _spreads({name: [s.device for s in taken] for name, taken in samples.items()})
    known = {result.contender: result for result in record.results}
    for entrant in pair:
        name = entrant.contender.name
        if name in known:
            for other, ratio in _ratios(name, wall).items():
                known[name].times_faster_than.setdefault(other, ratio)
            for other, ratio in _ratios(name, device).items():
                known[name].times_faster_on_device.setdefault(other, ratio)
            continue
        changed = written.get(name)
        stores = changed if changed is not None and entrant.contender.stores_v_where_grown else 1.0
        moved = entrant.bytes_per_parameter(stores)
        seconds = device.get(name, wall[name]).median
        record.results.append(
            Result(
                name,
                ours=entrant.contender.backend is not None,
                wall_s=wall[name],
                host_s=host.get(name),
                device_s=device.get(name),
                microseconds_a_tensor=wall[name].median / record.tensors * 1e6,
                bytes_a_parameter=moved,
                bytes_a_second=moved * record.parameters / seconds if moved else None,
                v_sectors_written=changed,
                times_faster_than=_ratios(name, wall),
                times_faster_on_device=_ratios(name, device),
            )
        )


def _spreads(samples: dict[str, list[float | None]]) -> dict[str, Spread]:
    known = {
        name: [value for value in values if value is not None] for name, values in samples.items()
    }
    return {name: Spread.of(values) for name, values in known.items() if values}


def _ratios(name: str, spreads: dict[str, Spread]) -> dict[str, float]:
    if name not in spreads:
        return {}
    return {
        other: spread.median / spreads[name].median
        for other, spread in spreads.items()
        if other != name
    }


def case_room(dtype: torch.dtype, contenders: Sequence[Contender], venue: Venue) -> Room:
    """Return the room for parameters when the two principal contenders that need most share it."""
    one = [(1,)]
    needs = sorted((c.bytes_held(one, dtype) for c in contenders if c.principal), reverse=True)
    # Nobody needs more than four tensors of the parameters' size, in the compute type.
    per_element = dtype.itemsize + sum(needs[:2] or [4 * compute_dtype(dtype).itemsize])
    return Room(venue.device.type, venue.memory // per_element)


def why_no_room(
    heat: Sequence[Contender], shapes: Sequence[Shape], dtype: torch.dtype, venue: Venue
) -> str | None:
    """Why the contenders do not fit into memory at once, with their gradients; None if they do."""
    # Fresh gradients are made while the last ones and the pattern still live.
    sets = 3 if BenchCase.fresh_gradients(len(shapes)) else 1
    needed = sum(map(prod, shapes)) * dtype.itemsize * sets
    needed += sum(contender.bytes_held(shapes, dtype) for contender in heat)
    needed += max(contender.scratch_bytes(shapes, dtype) for contender in heat)
    if needed <= venue.memory:
        return None
    beside = f" beside {BASELINE}" if len(heat) > 1 else ""
    return f"needs {needed / 2**30:.1f} GiB{beside}, of {venue.memory / 2**30:.1f} GiB"


def _heats(
    shapes: Sequence[Shape], dtype: torch.dtype, contenders: Sequence[Contender], venue: Venue
) -> tuple[list[list[Contender]], dict[str, str]]:
    """Divide contenders into heats that fit into memory, each with the baseline.

    Principal ones share heats, as they alternate with one another.

    Returns:
        The heats, and why each contender is left out that does not fit beside the baseline.

    Raises:
        MemoryError: the baseline does not fit even alone; without one, nobody does.
    """
    always = [contender for contender in contenders if contender.name == BASELINE]
    heats: list[list[Contender]] = []
    left_out = {}
    for principal in (True, False):
        heat = list(always)
        for contender in contenders:
            if contender in always or contender.principal is not principal:
                continue
            if reason := why_no_room([*always, contender], shapes, dtype, venue):
                left_out[contender.name] = reason
                continue
            if why_no_room([*heat, contender], shapes, dtype, venue):
                heats.append(heat)
                heat = list(always)
            heat.append(contender)
        if len(heat) > len(always):
            heats.append(heat)
    if not heats and contenders:
        first = contenders[:1]
        if reason := why_no_room(first, shapes, dtype, venue):
            raise MemoryError(f"{first[0].name} {reason}")
        heats.append(first)
    return heats, left_out


@contextmanager
def _collected(device: torch.device) -> Iterator[None]:
    """Keep the garbage collector out of timed steps, and give memory back afterwards."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # torch's CPU allocator raises a plain RuntimeError.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def dtype_name(dtype: torch.dtype) -> str:
    """Return a type's name as ``--dtype`` has it."""
    return str(dtype).removeprefix("torch.")
