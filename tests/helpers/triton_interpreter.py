"""Checks of the Triton backend in Triton's interpreter; each runs in a process of its own.

TRITON_INTERPRET counts when Triton is imported and then for the whole process, so
test_triton_interpreter.py sends these functions to a worker that has called :func:`start`.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adamal_kernels import Adam, AdamAL
from adamal_kernels.backends.eager.reference import ReferenceBackend
from adamal_kernels.backends.triton.backend import TritonBackend
from adamal_kernels.backends.triton.tables import TensorEntry, tensor_table
from adamal_kernels.core.bucket import Bucket, BucketKey
from adamal_kernels.core.buffers import SecondMoment
from adamal_kernels.core.scalars import StepOptions, derive_step_scalars
from adamal_kernels.core.storage import Format, compute_dtype
from adamal_kernels.verify import same_bits
from helpers.strange_moments import watch_strange_moments

CPU = torch.device("cpu")
BLOCK = 1024
STREAMS = ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")

_OPTIONS: dict[str, Any] = {
    "lr": 1e-2,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "decoupled_weight_decay": False,
    "maximize": False,
    "bias_correction": True,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "coupled decay": {"weight_decay": 0.1},
    "decoupled decay": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "algorithm 1": {"bias_correction": False, "eps": 0.0},
    "box": {"lr": 0.3, "lower": -0.25, "upper": 0.5},
    "nonnegative": {"lr": 0.3, "lower": 0.0, "weight_decay": 0.1, "decoupled_weight_decay": True},
}


class Shape(NamedTuple):
    """A tensor's size, and the stream that does not start at a multiple of 16 bytes."""

    numel: int
    misaligned: str | None = None


SHAPES = (
    Shape(0),
    Shape(1),
    Shape(7),
    Shape(BLOCK - 1),
    Shape(BLOCK + 1, misaligned="param"),
    Shape(2 * BLOCK + 5),
)


def start() -> None:
    """Prepare this process: the interpreter on, its casts mended, numpy quiet about NaN."""
    os.environ["TRITON_INTERPRET"] = "1"
    _mend_bfloat16()
    np.seterr(all="ignore")
    torch.set_num_threads(1)


def _mend_bfloat16() -> None:
    """Make the interpreter cast between float32 and bfloat16 as hardware does.

    As it comes it truncates where a GPU rounds to nearest even, and loses denormals: what the
    kernel asks for is right, what the interpreter makes of it is not.
    """
    from triton import language as tl
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.cast_impl

    def cast(self: Any, source: Any, target_type: Any) -> Any:
        target = target_type.scalar
        data = np.ascontiguousarray(source.data)
        if source.dtype.scalar == tl.float32 and target == tl.bfloat16:
            rounded = torch.from_numpy(data).to(torch.bfloat16).view(torch.int16)
            return interpreter.TensorHandle(rounded.numpy().view(np.uint16), target)
        if source.dtype.scalar == tl.bfloat16 and target == tl.float32:
            widened = (data.astype(np.uint32) << np.uint32(16)).view(np.float32)
            return interpreter.TensorHandle(widened, target)
        return original(self, source, target_type)

    interpreter.InterpreterBuilder.cast_impl = cast


@dataclass
class Tensors:
    """A bucket, and the rooms its tensors lie in, whose edges nobody may touch."""

    bucket: Bucket
    rooms: list[tuple[Tensor, Tensor, int]] = field(default_factory=list)
    """``(room, what it held, where the tensor ends)``."""

    def place(self, values: Tensor, offset: int) -> Tensor:
        """Return a copy of ``values`` that starts ``offset`` elements after a 64-byte boundary."""
        room = torch.full((offset + len(values) + BLOCK,), 3.0, dtype=values.dtype)
        assert room.data_ptr() % 16 == 0
        tensor = room[offset : offset + len(values)].copy_(values)
        self.rooms.append((room, room.clone(), offset + len(values)))
        return tensor

    def check_edges(self) -> None:
        """Fail if anything was written beyond the end of a tensor."""
        for room, original, end in self.rooms:
            assert same_bits(room[end:], original[end:]), "wrote beyond the end of a tensor"


def make_tensors(key: BucketKey, shapes: tuple[Shape, ...]) -> Tensors:
    """Return a bucket with moments as if of earlier steps; the same values on every call."""
    made = Tensors(Bucket(key))
    generator = torch.Generator().manual_seed(0)
    dtype = key.format.compute
    for shape in shapes:
        values = [torch.randn(shape.numel, generator=generator, dtype=dtype) for _ in range(4)]
        param, exp_avg, exp_avg_sq, maximum = values
        streams = {
            "param": param.to(key.format.param),
            "exp_avg": exp_avg * 0.1,
            "exp_avg_sq": exp_avg_sq.square(),
            "max_exp_avg_sq": maximum.square(),
        }
        if key.second_moment is not SecondMoment.AMSGRAD:
            del streams["max_exp_avg_sq"]
        for name, stream in streams.items():
            offset = int(name == shape.misaligned)
            streams_of(made.bucket)[name].append(made.place(stream, offset))
    return made


def streams_of(bucket: Bucket) -> dict[str, list[Tensor]]:
    """Return the tensors of every stream, by its name."""
    return {"param": bucket.params, "grad": bucket.grads, **bucket.buffers}


def set_step(
    made: Tensors, shapes: tuple[Shape, ...], step: int, variants: tuple[str, ...], special: bool
) -> None:
    """Give the bucket new gradients and the scalars of step ``step``; variants take turns."""
    bucket = made.bucket
    generator = torch.Generator().manual_seed(step)
    bucket.grads = []
    for shape in shapes:
        grad = torch.randn(shape.numel, generator=generator).to(bucket.key.format.grad)
        if special:
            put_special(grad)
        bucket.grads.append(made.place(grad, int(shape.misaligned == "grad")))
    bucket.scalars = [
        derive_step_scalars(step, StepOptions(**{**_OPTIONS, **VARIANTS[name]}))
        for name in variants
    ]
    bucket.rows = [(i + step) % len(variants) for i in range(len(shapes))]


def put_special(grad: Tensor) -> None:
    """Put what arithmetic trips over at the start of ``grad``, and some of it at its end."""
    denormal = 1e-7 if grad.dtype == torch.float16 else 1e-40
    special = [math.nan, 0.0, -0.0, denormal, -denormal, math.inf, -math.inf, 1e30, 1e-30]
    values = torch.tensor(special, dtype=torch.float64).to(grad.dtype)
    count = min(len(grad), len(values))
    grad[:count] = values[:count]
    grad[-2:] = values[:2][-len(grad) :] if len(grad) else grad


def check_steps(
    dtypes: Format,
    second_moment: SecondMoment,
    variants: tuple[str, ...],
    shapes: tuple[Shape, ...] = SHAPES,
    steps: int = 2,
) -> None:
    """Check that every bit is the reference's after each step; the first one is special."""
    key = BucketKey(CPU, dtypes, second_moment)
    ours, theirs = make_tensors(key, shapes), make_tensors(key, shapes)
    triton = TritonBackend()
    assert triton.unavailable(CPU) is None
    assert triton.unsupported(key) is None
    for step in range(1, steps + 1):
        for made, backend in ((ours, triton), (theirs, ReferenceBackend())):
            set_step(made, shapes, step, variants, special=step == 1)
            backend.step(made.bucket)
        for name in STREAMS:
            pairs = zip(streams_of(ours.bucket)[name], streams_of(theirs.bucket)[name], strict=True)
            for shape, (found, expected) in zip(shapes, pairs, strict=False):
                assert same_bits(found, expected), f"{name} of {shape} after step {step}"
    ours.check_edges()


def check_zero_by_zero(dtypes: Format, second_moment: SecondMoment) -> None:
    """Check that a parameter stays where gradient and moments are zero and so is eps."""
    shapes = (Shape(9),)
    made = make_tensors(BucketKey(CPU, dtypes, second_moment), shapes)
    set_step(made, shapes, 1, ("algorithm 1",), special=False)
    bucket = made.bucket
    for stream in (bucket.grads, *bucket.elementwise_buffers):
        torch._foreach_zero_(stream)
    before = bucket.params[0].clone()
    TritonBackend().step(bucket)
    assert same_bits(bucket.params[0], before)


def check_far_block(dtypes: Format) -> None:
    """Check a block beyond 2^31 elements: its tensors' bases are set back by as much."""
    from adamal_kernels.backends.triton import element

    key = BucketKey(CPU, dtypes, SecondMoment.MONOTONE)
    shapes = (Shape(BLOCK), Shape(37))
    ours, theirs = make_tensors(key, shapes), make_tensors(key, shapes)
    for made in (ours, theirs):
        set_step(made, shapes, 1, ("default",), special=False)
    ReferenceBackend().step(theirs.bucket)

    chunk = 2**31 // BLOCK + 1
    bucket = ours.bucket

    def base(tensor: Tensor) -> int:
        return tensor.data_ptr() - chunk * BLOCK * tensor.element_size()

    entries = [
        TensorEntry(base(p), chunk * BLOCK + p.numel(), (base(m), base(v), base(v), 0))
        for p, m, v in zip(bucket.params, *bucket.elementwise_buffers, strict=True)
    ]
    element.step_kernel[(len(shapes),)](
        tensor_table(entries),
        torch.tensor([(i, chunk) for i in range(len(shapes))], dtype=torch.int32),
        torch.tensor([(base(grad), 0) for grad in bucket.grads]),
        torch.tensor(bucket.scalars, dtype=compute_dtype(dtypes.param)),
        **element.constants(key, None, aligned=True),
    )
    for name in ("param", "exp_avg", "exp_avg_sq"):
        found_stream, expected_stream = (streams_of(m.bucket)[name] for m in (ours, theirs))
        for found, expected in zip(found_stream, expected_stream, strict=True):
            assert same_bits(found, expected), name
    ours.check_edges()


class Launch(NamedTuple):
    """What a launch was given: the promise of alignment, the work, and where the table lies."""

    aligned: bool
    items: list[list[int]]
    table: int


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Record the launches of plans that are made meanwhile."""
    from adamal_kernels.backends.triton import element

    kernel, launches = element.step_kernel, []

    class Recorder:
        def __getitem__(self, grid: tuple[int, int, int]) -> Any:
            def launch(tensors: Tensor, items: Tensor, *args: Any, **kwargs: Any) -> None:
                launches.append(Launch(kwargs["ALIGNED"], items.tolist(), tensors.data_ptr()))
                assert grid == (len(items), 1, 1)
                kernel[grid](tensors, items, *args, **kwargs)

            return launch

    element.step_kernel = Recorder()
    try:
        yield launches
    finally:
        element.step_kernel = kernel


class PythonPlanned(TritonBackend):
    """The backend as it is where the C++ extension was not built."""

    has_native_plans = False


BACKENDS = {"C++": TritonBackend, "Python": PythonPlanned}
"""By what plans the steps."""


def check_launches(plan: str, dtypes: Format) -> None:
    """Check the work of each launch: all of it once, alignment promised only where it holds."""
    shapes = (
        Shape(40),
        *(Shape(40, misaligned=stream) for stream in STREAMS),
        Shape(0),
        Shape(2 * BLOCK),
        Shape(BLOCK + 8),
    )
    made = make_tensors(BucketKey(CPU, dtypes, SecondMoment.AMSGRAD), shapes)
    set_step(made, shapes, 1, ("default",), special=False)
    with recorded() as launches:
        BACKENDS[plan]().step(made.bucket)
    assert {launch.aligned: launch.items for launch in launches} == {
        True: [[0, 0], [7, 0], [7, 1], [8, 0], [8, 1]],
        False: [[1, 0], [2, 0], [3, 0], [4, 0], [5, 0]],
    }


def check_no_work(plan: str, dtypes: Format) -> None:
    """Check that a bucket of empty tensors, or of none, launches nothing."""
    for shapes in ((), (Shape(0), Shape(0))):
        made = make_tensors(BucketKey(CPU, dtypes, SecondMoment.MONOTONE), shapes)
        set_step(made, shapes, 1, ("default",), special=False)
        with recorded() as launches:
            BACKENDS[plan]().step(made.bucket)
        assert launches == []


def check_tables(plan: str, dtypes: Format) -> None:
    """Check that tables live as long as they are true: no longer, and no shorter."""
    shapes = (Shape(40), Shape(9))
    made = make_tensors(BucketKey(CPU, dtypes, SecondMoment.MONOTONE), shapes)
    tables = []

    def step(number: int, variants: tuple[str, ...] = ("default",)) -> None:
        set_step(made, shapes, number, variants, special=False)
        expected = make_tensors(made.bucket.key, shapes)
        set_step(expected, shapes, number, variants, special=False)
        for name in STREAMS:
            for copy, tensor in zip(
                streams_of(expected.bucket)[name], streams_of(made.bucket)[name], strict=True
            ):
                copy.resize_as_(tensor).copy_(tensor)
        BACKENDS[plan]().step(made.bucket)
        ReferenceBackend().step(expected.bucket)
        for found, wanted in zip(made.bucket.params, expected.bucket.params, strict=True):
            assert same_bits(found, wanted), f"step {number}"
        tables.append(launches[-1].table)
        assert len(launches) == number, "one launch a step"

    with recorded() as launches:
        step(1)
        step(2, ("box", "coupled decay"))
        assert tables[1] == tables[0], "new gradients, rows and scalars are no reason to bind anew"
        made.bucket.params[1] = made.place(torch.ones(9, dtype=dtypes.param), 0)
        step(3)
        assert tables[2] != tables[1], "a parameter moved"


def check_streams(plan: str, dtypes: Format) -> None:
    """Check that a step on another stream takes tables of its own, and stays right."""
    from adamal_kernels.backends.triton.launcher import Launcher

    shapes = (Shape(40), Shape(9, misaligned="param"))
    ours, theirs = (
        make_tensors(BucketKey(CPU, dtypes, SecondMoment.MONOTONE), shapes) for _ in range(2)
    )
    streams = iter((0, 0, 7, 7, 0))
    uploads = []
    current_stream, upload = Launcher._current_stream, Launcher._upload

    def recording(self: Launcher, host: Tensor) -> Tensor:
        uploads.append(host)
        return upload(self, host).clone()

    Launcher._current_stream = lambda self: next(streams)
    Launcher._upload = recording
    try:
        counts = []
        for step in range(1, 6):
            for made, backend in ((ours, BACKENDS[plan]()), (theirs, ReferenceBackend())):
                set_step(made, shapes, step, ("box",), special=False)
                backend.step(made.bucket)
            counts.append(len(uploads))
    finally:
        Launcher._current_stream, Launcher._upload = current_stream, upload
    assert counts == [3, 3, 6, 6, 9], "entries and the items of two launches"
    for found, expected in zip(ours.bucket.params, theirs.bucket.params, strict=True):
        assert same_bits(found, expected)


def check_more_rows_than_before(plan: str, dtypes: Format) -> None:
    """Check that scalars which have become more, or fewer, still reach their tensors."""
    shapes = tuple(Shape(5 + i) for i in range(len(VARIANTS)))
    ours, theirs = (
        make_tensors(BucketKey(CPU, dtypes, SecondMoment.MONOTONE), shapes) for _ in range(2)
    )
    names = tuple(VARIANTS)
    for step, count in enumerate((1, 2, 5, 3, len(names)), start=1):
        for made, backend in ((ours, BACKENDS[plan]()), (theirs, ReferenceBackend())):
            set_step(made, shapes, step, names[:count], special=False)
            backend.step(made.bucket)
        for found, expected in zip(ours.bucket.params, theirs.bucket.params, strict=True):
            assert same_bits(found, expected), f"{count} rows"


def check_failed_tables_are_handed_over_again(plan: str, dtypes: Format) -> None:
    """Check that a step after one that ran out of memory takes the tables that one could not."""
    from adamal_kernels.backends.triton.launcher import Launcher

    shapes = (Shape(40), Shape(9))
    made, expected = (
        make_tensors(BucketKey(CPU, dtypes, SecondMoment.MONOTONE), shapes) for _ in range(2)
    )
    for tensors in (made, expected):
        set_step(tensors, shapes, 1, ("default",), special=False)
    bind, upload, reserve = Launcher.bind, Launcher._upload, Launcher._reserve

    def fail(*args: Any) -> None:
        raise MemoryError("none left")

    for name, original in (("bind", bind), ("_upload", upload), ("_reserve", reserve)):
        setattr(Launcher, name, fail)
        try:
            BACKENDS[plan]().step(made.bucket)
        except MemoryError:
            pass
        else:
            raise AssertionError(f"a failure of {name} is passed on")
        finally:
            setattr(Launcher, name, original)
    for tensors, backend in ((made, BACKENDS[plan]()), (expected, ReferenceBackend())):
        backend.step(tensors.bucket)
    for found, wanted in zip(made.bucket.params, expected.bucket.params, strict=True):
        assert same_bits(found, wanted)


def check_alignment_in_the_steady_state() -> None:
    """Check that a gradient is stepped without the promise while it is misaligned."""
    params = [torch.ones(numel, requires_grad=True) for numel in (40, 9, 2 * BLOCK)]
    optimizer = AdamAL(params, backend="triton")

    def step(*offsets: int | None) -> dict[bool, list[list[int]]]:
        """Step with gradients so many elements off a boundary, None for no gradient."""
        launches.clear()
        for p, offset in zip(params, offsets, strict=True):
            p.grad = None if offset is None else torch.ones(offset + p.numel())[offset:]
        optimizer.step()
        return {launch.aligned: launch.items for launch in launches}

    everything = [[0, 0], [1, 0], [2, 0], [2, 1]]
    with recorded() as launches:
        step(0, 0, 0)
        assert step(0, 4, 0) == {True: everything}
        steady = optimizer._stepper._steady_state
        assert step(0, 1, 0) == {True: [[0, 0], [2, 0], [2, 1]], False: [[1, 0]]}
        assert step(2, 2, 3) == {False: everything}
        table, before = launches[-1].table, params[2].detach().clone()
        assert step(1, 1, None) == {False: everything}
        assert launches[-1].table == table, "a gradient that is gone is no reason to bind anew"
        assert same_bits(params[2], before)
        assert step(0, 0, 0) == {True: everything}
        assert optimizer._stepper._steady_state is steady is not None


def check_python_work(groups: int) -> None:
    """Check that a bucket is one launch a step, and the calls made as many as for one tensor."""
    from adamal_kernels.backends.triton import element

    kernel, grids = element.step_kernel, []

    class Counter:
        def __getitem__(self, grid: tuple[int, int, int]) -> Any:
            return lambda *args, **kwargs: grids.append(grid)

    def calls_of_a_step(count: int) -> list[str]:
        params = [torch.ones(4, requires_grad=True) for _ in range(count)]
        optimizer = AdamAL([{"params": [p], "lr": 0.1} for p in params], backend="triton")
        calls: list[str] = []

        def record(frame: Any, event: str, argument: Any) -> None:
            if event == "call":
                calls.append(frame.f_code.co_name)
            elif event == "c_call":
                calls.append(argument.__name__)

        for _ in range(4):
            for p in params:
                p.grad = torch.ones(4)
            calls.clear()
            grids.clear()
            sys.setprofile(record)
            try:
                optimizer.step()
            finally:
                sys.setprofile(None)
            assert grids == [(count, 1, 1)]
        return calls

    element.step_kernel = Counter()
    try:
        many, one = calls_of_a_step(groups), calls_of_a_step(1)
    finally:
        element.step_kernel = kernel
    assert many == one
    assert "launch" in one


def check_watched_moments() -> None:
    """Check what is watched of moments that no step makes."""
    for cls, options in ((AdamAL, {}), (Adam, {}), (Adam, {"amsgrad": True})):
        found, expected = (
            watch_strange_moments(backend, CPU, cls, **options)
            for backend in ("triton", "reference")
        )
        assert all(map(same_bits, found, expected))


def check_scalars_are_rounded_once(plan: str) -> None:
    """Check that a float64 scalar reaches a float32 kernel rounded to nearest."""
    key = BucketKey(CPU, Format(torch.float32, torch.float32), SecondMoment.PLAIN)
    made = make_tensors(key, (Shape(4),))
    set_step(made, (Shape(4),), 1, ("default",), special=False)
    just_above_half = 1.0 + 2.0**-24 + 2.0**-50
    idle = derive_step_scalars(1, StepOptions(**{**_OPTIONS, "lr": 0.0}))
    made.bucket.scalars = [idle._replace(decay_factor=just_above_half)]
    made.bucket.params[0].fill_(1.0)
    BACKENDS[plan]().step(made.bucket)
    assert made.bucket.params[0].tolist() == [1.0 + 2.0**-23] * 4


def check_availability() -> None:
    """Check what the backend says of devices while the interpreter is on."""
    backend = TritonBackend()
    assert backend.unavailable(CPU) is None
    reason = backend.unavailable(torch.device("cuda", 0))
    assert reason is not None
    assert "unset TRITON_INTERPRET" in reason
