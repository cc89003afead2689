"""Checks of Triton's device scalars, norm and captures in its interpreter.

As those of triton_interpreter.py, for a worker that has called its ``start``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from adamal_kernels import AdamAL, Box
from adamal_kernels import backends as registry
from adamal_kernels.backends.eager.reference import ReferenceBackend
from adamal_kernels.core.bucket import BucketKey, DeviceScalars
from adamal_kernels.core.buffers import SecondMoment
from adamal_kernels.core.norm import chunk_elements
from adamal_kernels.core.scalars import StepInputs, StepOptions
from adamal_kernels.core.storage import Format, compute_dtype
from adamal_kernels.verify import different_values, same_bits
from helpers.triton_interpreter import (
    BACKENDS,
    BLOCK,
    CPU,
    Shape,
    make_tensors,
    put_special,
    streams_of,
)

INPUTS: dict[str, dict[str, float]] = {
    "none": {},
    "unscaled": {"grad_scale": 3.0, "found_inf": 0.0},
    "skipped": {"grad_scale": 3.0, "found_inf": 1.0},
    "found_inf is NaN": {"found_inf": math.nan},
    "clipped": {"grad_norm": 7.0, "max_grad_norm": 0.3},
    "not clipped": {"grad_norm": 7.0, "max_grad_norm": 8.0},
    "unscaled and clipped": {"grad_scale": 1024.0, "grad_norm": 0.1, "max_grad_norm": 0.03},
    "norm is inf": {"grad_norm": math.inf, "max_grad_norm": 1.0},
    "norm is NaN": {"grad_scale": 2.0, "grad_norm": math.nan, "max_grad_norm": 1.0},
    "scale is inf": {"grad_scale": math.inf},
}
_SETS = (None, Box(-1, 1))
# Float32 counts up to 2^24; a larger one, of a checkpoint, stands still.
_COUNTS = (0, 1, 2, 9, 999, 1_000_000, 2**24 - 1, 2**25, 2**30)


def _some_options() -> list[StepOptions]:
    """Return options of every kind, numbers and tensors among them."""
    lrs = (
        1e-3,
        0.0,
        torch.tensor(0.03, dtype=torch.float64),
        torch.tensor([0.3]),
    )
    betas = (
        (0.9, 0.999),
        (0.0, torch.tensor(0.97)),
        (torch.tensor(0.8, dtype=torch.float64), 0.9999),
    )
    booleans = itertools.cycle(itertools.product((False, True), repeat=3))
    bounds = itertools.cycle(((-math.inf, math.inf), (-0.25, 0.5)))
    return [
        StepOptions(lr, *pair, eps, 0.1, *next(booleans), *next(bounds))
        for lr, pair, eps in itertools.product(lrs, betas, (1e-8, 0.0))
    ]


def _device_scalars(rows: int, step: int, given: dict[str, float]) -> DeviceScalars:
    types = {"grad_scale": torch.float32, "found_inf": torch.float32, "grad_norm": torch.float64}
    inputs: dict[str, Any] = {
        name: torch.tensor(value, dtype=types[name]) if name in types else value
        for name, value in given.items()
    }
    counts = itertools.islice(itertools.cycle(_COUNTS), step, step + rows)
    return DeviceScalars(
        _some_options(),
        [torch.tensor(float(count)) for count in counts],
        StepInputs(**inputs, skipped_steps=torch.tensor(5)),
    )


def check_derived(plan: str, dtypes: Format, given: str, tensors: int = 30) -> None:
    """Check that a step by device scalars is the reference's: values, counts, the skip counted."""
    key = BucketKey(CPU, dtypes, SecondMoment.MONOTONE, device_scalars=True)
    # Of many tensors most are empty, which costs no program and counts as well.
    shapes = tuple(Shape(i % 4 if i < 30 or i > 250 else 0) for i in range(tensors))
    ours, theirs = (make_tensors(key, shapes).bucket for _ in range(2))
    for step in range(2):
        for bucket, backend in ((ours, BACKENDS[plan]()), (theirs, ReferenceBackend())):
            generator = torch.Generator().manual_seed(step)
            bucket.grads = [
                torch.randn(shape.numel, generator=generator).to(dtypes.grad) for shape in shapes
            ]
            bucket.device_scalars = _device_scalars(tensors, step, INPUTS[given])
            options = len(bucket.device_scalars.options)
            bucket.rows = [(i + step) % options for i in range(tensors)]
            backend.step(bucket)
        for name in ("param", "exp_avg", "exp_avg_sq"):
            pairs = zip(streams_of(ours)[name], streams_of(theirs)[name], strict=True)
            assert all(same_bits(found, expected) for found, expected in pairs), name
        found, expected = ours.device_scalars, theirs.device_scalars
        assert found.steps == expected.steps
        assert found.inputs.skipped_steps == expected.inputs.skipped_steps


def check_norm(dtypes: Format, numels: tuple[int, ...], special: bool = False) -> None:
    """Check that the sum of squares is the reference's, of aligned and misaligned gradients."""
    key = BucketKey(CPU, dtypes, SecondMoment.MONOTONE)
    shapes = tuple(Shape(numel, "grad" if i % 2 else None) for i, numel in enumerate(numels))
    made = make_tensors(key, tuple(Shape(0) for _ in shapes))
    generator = torch.Generator().manual_seed(1)
    for shape in shapes:
        grad = torch.randn(shape.numel, generator=generator).to(dtypes.grad)
        if special:
            put_special(grad)
        made.bucket.grads.append(made.place(grad, int(shape.misaligned == "grad")))
    found = BACKENDS["C++"]().squared_norm(made.bucket)
    expected = ReferenceBackend().squared_norm(made.bucket)
    assert found.dtype == torch.float64
    assert found.shape == ()
    assert same_bits(found, expected)


def norm_sizes(dtypes: Format) -> tuple[int, ...]:
    """Return sizes about the ends of blocks and chunks, of more tensors than are added at once."""
    chunk = chunk_elements(compute_dtype(dtypes.param))
    return (3, BLOCK, BLOCK + 1, chunk - 1, 2 * chunk + BLOCK + 7, 0, *range(30))


def _gradients(params: list[Tensor], step: int, *, missing: bool) -> None:
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(params):
        values = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = values.to(p.dtype)
        if missing and i % 3 == step % 3:
            p.grad = None


def _tensors(*numbers: float) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(number) for number in numbers)


def _new_optimizer(
    backend: str, sets: tuple[Any, Any] = _SETS, **options: Any
) -> tuple[list[Tensor], AdamAL]:
    generator = torch.Generator().manual_seed(0)
    sizes = (3, 2049, 0, 17, 1, 40)
    params = [torch.randn(n, generator=generator).requires_grad_() for n in sizes]
    groups = [
        {
            "params": params[:3],
            "lr": torch.tensor(0.05, dtype=torch.float64),
            "projection": sets[0],
        },
        {"params": params[3:], "betas": _tensors(0.8, 0.99), "projection": sets[1]},
    ]
    return params, AdamAL(groups, backend=backend, **options)


def _values(params: list[Tensor], optimizer: AdamAL) -> list[dict[str, Tensor]]:
    return [{"param": p.detach(), **optimizer.state[p]} for p in params]


@contextmanager
def planned_by(plan: str) -> Iterator[None]:
    """Have the optimizer's steps planned by C++, or by Python."""
    original = registry.BACKENDS["triton"]
    registry.BACKENDS["triton"] = BACKENDS[plan]()
    try:
        yield
    finally:
        registry.BACKENDS["triton"] = original


def check_optimizer(plan: str, capturable: bool, max_grad_norm: float | None) -> None:
    """Check scaled, clipped and skipped steps, the first one checked, the others repeated."""
    with planned_by(plan):
        runs = [
            _new_optimizer(backend, capturable=capturable, max_grad_norm=max_grad_norm)
            for backend in ("triton", "reference")
        ]
        for step in range(5):
            before = _copied(_values(*runs[0]))
            for params, optimizer in runs:
                _gradients(params, step, missing=step > 2)
                spoiled = step == 1 and max_grad_norm is not None
                if spoiled:
                    params[1].grad[5] = math.nan
                optimizer.param_groups[0]["lr"].mul_(0.9)
                optimizer.grad_scale = torch.tensor(0.25 if step % 2 else 8.0)
                optimizer.found_inf = torch.tensor(float(step == 3))
                optimizer.step()
            (params, optimizer), (_, reference) = runs
            assert different_values(_values(*runs[0]), _values(*runs[1])) == []
            if spoiled or step == 3:
                assert different_values(_values(params, optimizer), before) == []
            assert optimizer.skipped_steps == reference.skipped_steps
            if max_grad_norm is not None:
                assert same_bits(optimizer.last_grad_norm, reference.last_grad_norm)
            steady = optimizer._stepper._steady_state is not None
            assert steady == (plan == "C++")


def _copied(values: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{name: tensor.clone() for name, tensor in held.items()} for held in values]


class Capture:
    """Launchers that, while ``capturing``, run nothing and leave it to :meth:`replay`.

    A graph would copy the same host memory to the same device memory, and launch the same kernels.
    """

    def __init__(self) -> None:
        self.capturing = False
        self.uploads = 0

    @contextmanager
    def installed(self) -> Iterator[None]:
        from adamal_kernels.backends.triton.launcher import Launcher

        originals = (Launcher._is_capturing, Launcher._prepare, Launcher._upload)
        _, prepare, upload = originals

        def paused(launcher: Launcher, *args: Any) -> Callable[[int], None]:
            launch = prepare(launcher, *args)
            return lambda stream: None if self.capturing else launch(stream)

        def counted(launcher: Launcher, host: Tensor) -> Tensor:
            self.uploads += 1
            # What a capture copies is there from the first replay on.
            return torch.full_like(host, -1) if self.capturing else upload(launcher, host).clone()

        Launcher._is_capturing = lambda launcher: self.capturing
        Launcher._prepare, Launcher._upload = paused, counted
        try:
            yield
        finally:
            Launcher._is_capturing, Launcher._prepare, Launcher._upload = originals

    @staticmethod
    def replay() -> None:
        from adamal_kernels.backends.triton.launcher import _captured

        packed, host_tables, _, tables, staged = _captured[-1]
        entries, aligned, others, projection, records = host_tables
        tables.entries.copy_(entries)
        hosts = [items for items in (aligned, others) if len(items)]
        for (_, items), host in zip(tables.items, hosts, strict=True):
            items.copy_(host)
        if projection is not None:
            for table, host in zip(tables.projection, projection, strict=True):
                for made, original in zip(table, host, strict=True):
                    made.copy_(original)
        if records is not None:
            tables.records.copy_(records)
        staged.buffer[: len(packed)].copy_(packed)
        for launch in staged.launches:
            launch(0)


def check_capture(steps_before: int, sets: tuple[Any, Any] = _SETS) -> None:
    """Check that replays step by what they were captured with, and disturb no other step."""
    capture = Capture()
    with capture.installed():
        runs = [_new_optimizer(name, sets, capturable=True) for name in ("triton", "reference")]
        (ours, optimizer), (theirs, reference) = runs
        found_inf = torch.tensor(0.0)
        for _, stepped in runs:
            stepped.found_inf = found_inf

        def both_step(step: int) -> None:
            for params, stepped in runs:
                _gradients(params, step, missing=False)
                stepped.step()
            assert different_values(_values(*runs[0]), _values(*runs[1])) == [], f"step {step}"

        for step in range(steps_before):
            both_step(step)
        _gradients(ours, 70, missing=False)
        static = [p.grad for p in ours]
        uploads, before = capture.uploads, _copied(_values(ours, optimizer))
        capture.capturing = True
        optimizer.step()
        capture.capturing = False
        assert different_values(_values(ours, optimizer), before) == []
        # One step was checked, and is none of the plan that repeats it: that has no tables yet.
        assert (capture.uploads > uploads) == (steps_before == 1)
        both_step(71)
        for step in (72, 73, 74):
            _gradients(theirs, step, missing=False)
            for grad, p in zip(static, theirs, strict=True):
                grad.copy_(p.grad)
            found_inf.fill_(step == 73)
            capture.replay()
            reference.step()
            assert different_values(_values(*runs[0]), _values(*runs[1])) == [], f"replay {step}"
            assert optimizer.skipped_steps == reference.skipped_steps
        found_inf.zero_()
        both_step(75)
