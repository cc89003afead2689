"""Checks of Triton's projections onto sets that couple elements, in its interpreter.

As those of triton_interpreter.py, for a worker that has called its ``start``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from adamal_kernels import Adam, AdamAL, L1Ball, L2Ball, Simplex
from adamal_kernels.core.bucket import BucketKey
from adamal_kernels.core.buffers import SecondMoment
from adamal_kernels.core.norm import LANES, row_sums
from adamal_kernels.core.rounding import rounded_sqrt
from adamal_kernels.core.rows import coupled_rows
from adamal_kernels.core.scalars import StepOptions, derive_step_scalars
from adamal_kernels.core.storage import Format
from adamal_kernels.projections import CoupledSet
from adamal_kernels.verify import different_values, same_bits
from helpers.triton_device_scalars import planned_by
from helpers.triton_interpreter import CPU


class Row(NamedTuple):
    """A parameter: its shape, the order of its dimensions in memory, its set."""

    shape: tuple[int, ...]
    order: tuple[int, ...]
    projection: CoupledSet


LAYOUTS = (
    Row((), (), L1Ball(0.3)),
    Row((6, 7), (0, 1), L2Ball(0.7)),
    Row((6, 7), (0, 1), L1Ball(0.7, dim=1)),
    Row((6, 7), (0, 1), Simplex(dim=0)),
    Row((6, 7), (1, 0), L2Ball(0.7, dim=-1)),
    Row((40, 3), (0, 1), Simplex(dim=1)),  # more rows than a program takes
    Row((3, 4, 5), (0, 1, 2), L1Ball(0.7, dim=(0, 2))),
    Row((3, 4, 2, 5), (0, 2, 3, 1), L2Ball(0.7, dim=1)),
    Row((3, 4, 2, 5), (2, 0, 3, 1), Simplex(dim=(0, 1))),
    Row((2, 100), (0, 1), L1Ball(0.7, dim=1)),
    Row((0, 5), (0, 1), L2Ball(1.0, dim=1)),
    Row((6, 7), (0, 1), L2Ball(100.0, dim=1)),  # never active
    Row((32,), (0,), L1Ball(100.0)),
)
ACTIVE = [row.projection.size < 100 and math.prod(row.shape) > 0 for row in LAYOUTS]
WIDE = (
    Row((2, 257), (0, 1), L2Ball(0.7, dim=1)),
    Row((2, 1024), (0, 1), Simplex(dim=1)),
    Row((3000, 2), (0, 1), L1Ball(20.0, dim=0)),
)
LONG = (
    Row((2, 4100), (0, 1), L2Ball(0.7, dim=1)),
    Row((1500, 2), (0, 1), Simplex(dim=0)),
    Row((2000,), (0,), L1Ball(1.5)),
    Row((2000,), (0,), L2Ball(1e6)),
    Row((6, 7), (0, 1), L2Ball(0.7, dim=1)),
)


class Run:
    """An optimizer over ``rows``, each a group of its own."""

    def __init__(
        self,
        backend: str,
        rows: tuple[Row, ...],
        dtypes: Format,
        moment: SecondMoment,
        **options: Any,
    ) -> None:
        """Make parameters, the same for every backend."""
        self.rows, self.dtypes = rows, dtypes
        self.params = [
            self._values(i, 0).to(dtypes.param).requires_grad_() for i in range(len(rows))
        ]
        groups = [
            {"params": [param], "projection": row.projection}
            for param, row in zip(self.params, rows, strict=True)
        ]
        cls = AdamAL if moment is SecondMoment.MONOTONE else Adam
        if cls is Adam:
            options["amsgrad"] = moment is SecondMoment.AMSGRAD
        self.optimizer = cls(groups, lr=0.05, backend=backend, **options)

    def _values(self, i: int, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(100 * i + step)
        shape, order, _ = self.rows[i]
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        inverse = [order.index(dim) for dim in range(len(order))]
        return values.permute(order).contiguous().permute(inverse)

    def step(self, number: int, *, without: int | None = None, special: bool = False) -> None:
        """Take a step; one parameter may be without a gradient, some gradients be special."""
        for i, param in enumerate(self.params):
            grad = self._values(i, number).to(self.dtypes.grad)
            if special and grad.numel() > 2:
                flat = grad.permute(self.rows[i].order).flatten()
                flat[0], flat[-1] = (math.nan, math.inf)[i % 2], 0.0
                inverse = [self.rows[i].order.index(d) for d in range(grad.dim())]
                shape = [grad.shape[d] for d in self.rows[i].order]
                grad = flat.view(shape).permute(inverse)
            # A gradient of another type is accepted where the parameter says so.
            if self.dtypes.grad != self.dtypes.param:
                param.grad_dtype = self.dtypes.grad
            param.grad = None if i == without else grad
        self.optimizer.step()

    def values(self) -> list[dict[str, Tensor]]:
        """Return what the step has changed."""
        return [{"param": p.detach(), **self.optimizer.state.get(p, {})} for p in self.params]

    def copied(self) -> list[dict[str, Tensor]]:
        """Return copies of it."""
        return [{name: value.clone() for name, value in held.items()} for held in self.values()]


def _both(
    rows: tuple[Row, ...], dtypes: Format, moment: SecondMoment, **options: Any
) -> tuple[Run, Run]:
    ours, theirs = (Run(name, rows, dtypes, moment, **options) for name in ("triton", "reference"))
    return ours, theirs


def _check_same(ours: Run, theirs: Run, what: str) -> None:
    assert different_values(ours.values(), theirs.values()) == [], what


def check_layouts(plan: str, dtypes: Format, moment: SecondMoment, steps: int = 3) -> None:
    """Check the bits of sets, kinds and layouts that share a bucket, the last step special."""
    with planned_by(plan):
        ours, theirs = _both(LAYOUTS, dtypes, moment)
        active = [False] * len(LAYOUTS)
        for step in range(1, steps + 1):
            for run in (ours, theirs):
                run.step(step, without=step, special=step == steps)
            _check_same(ours, theirs, f"step {step}")
            for i, held in enumerate(ours.values()):
                active[i] |= "multiplier" in held and bool((held["multiplier"] != 0).any())
        assert active == ACTIVE


def check_wide(dtypes: Format) -> None:
    """Check rows of one and of several parts that a program takes."""
    ours, theirs = _both(WIDE, dtypes, SecondMoment.MONOTONE)
    for run in (ours, theirs):
        run.step(1)
    _check_same(ours, theirs, "wide")


@contextmanager
def _long_from(length: int, evaluations: int) -> Iterator[Counter[str]]:
    """Have rows longer than ``length`` projected by launches, so often; count the launches."""
    from adamal_kernels.backends.triton import launcher as triton_launcher
    from adamal_kernels.backends.triton import projection as triton_projection
    from adamal_kernels.backends.triton import rows as triton_rows

    tiles = {most: tile for most, tile in triton_rows.TILES.items() if most < length}
    tiles[length] = triton_rows.TILES[max(triton_rows.TILES)]
    launches: Counter[str] = Counter()
    prepare = triton_launcher.Launcher._prepare

    def counted(launcher: Any, kernel: Any, *args: Any) -> Any:
        launch = prepare(launcher, kernel, *args)

        def counting(stream: int) -> None:
            launches[kernel.fn.__name__] += 1
            launch(stream)

        return counting

    with ExitStack() as patches:
        for target, name, value in (
            (triton_rows, "TILES", tiles),
            (triton_projection, "EVALUATIONS", evaluations),
            (triton_launcher.Launcher, "_prepare", counted),
        ):
            patches.enter_context(mock.patch.object(target, name, value))
        yield launches


def check_long(plan: str, dtypes: Format, evaluations: int) -> None:
    """Check rows that launches project, by enough evaluations and by too few."""
    with planned_by(plan), _long_from(1024, evaluations) as launches:
        ours, theirs = _both(LONG, dtypes, SecondMoment.MONOTONE)
        for step in (1, 2):
            launches.clear()
            for run in (ours, theirs):
                run.step(step, without=2 if step == 2 else None)
            _check_same(ours, theirs, f"step {step}")
            assert launches == {
                "step_kernel": 1,
                "project_kernel": 1,
                "size_kernel": 1,
                "begin_kernel": 1,
                **(
                    {"evaluate_kernel": evaluations, "continue_kernel": evaluations}
                    if evaluations
                    else {}
                ),
                "finish_kernel": 1,
                "apply_kernel": 1,
            }


def check_more_chunks_than_lanes() -> None:
    """Check the two sums of a row of more chunks than lanes: as launches and as a program do it."""
    from adamal_kernels.backends.triton import long_rows as triton_long_rows
    from adamal_kernels.backends.triton import rows as triton_rows
    from adamal_kernels.backends.triton.tables import TensorEntry, set_table, tensor_table

    float64 = Format(torch.float64, torch.float64)
    key = BucketKey(CPU, float64, SecondMoment.MONOTONE, coupled=True)
    chunk = 32
    constants = {**triton_long_rows.constants(key), "CHUNK": chunk}
    generator = torch.Generator().manual_seed(0)
    length = (LANES + 3) * chunk + 5
    y, v = (torch.rand(length, generator=generator, dtype=torch.float64) for _ in range(2))
    rows, size = coupled_rows(y, L1Ball(100.0)), torch.tensor([100.0], dtype=torch.float64)
    multiplier, eps = torch.tensor([0.125], dtype=torch.float64), 0.5
    v += 1.0

    entry = TensorEntry(y.data_ptr(), length, (0, v.data_ptr(), 0, multiplier.data_ptr()))
    options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.9, "eps": eps, "weight_decay": 0.0}
    flags = {"decoupled_weight_decay": False, "maximize": False, "bias_correction": False}
    stepped = (
        tensor_table([entry]),
        set_table([rows]),
        torch.tensor([[16, 0]]),
        torch.tensor([derive_step_scalars(1, StepOptions(**options, **flags))]).double(),
        torch.tensor([[0, 0, 0]]),
    )
    scale = torch.ones(1, dtype=torch.float64)

    # The last evaluation there may be, after which the scale tells of the first sum.
    states = torch.tensor([[triton_rows.SEARCHING.value, 99]], dtype=torch.int32)
    triton_long_rows.finish_kernel[(1,)](*stepped, states, scale, **constants)
    moved = y - 0.125 / (rounded_sqrt(v) + eps)
    first = row_sums(torch.where(moved <= 0, 0.0, moved).unsqueeze(0), chunk)
    assert states.tolist() == [[triton_rows.FOUND.value, 99]]
    assert multiplier.item() == 0.125
    assert same_bits(scale, size / first)

    firsts, seconds = (torch.rand(LANES + 4, generator=generator).double() + 1 for _ in range(2))
    firsts *= math.pi
    seconds *= math.e
    states = torch.tensor([[triton_rows.SEARCHING.value, 0]], dtype=torch.int32)
    triton_long_rows.continue_kernel[(1,)](*stepped, states, scale, firsts, seconds, **constants)
    first, second = (row_sums(sums.unsqueeze(0), 1) for sums in (firsts, seconds))
    assert states.tolist() == [[triton_rows.SEARCHING.value, 1]]
    assert same_bits(multiplier, 0.125 + (first - size) / second)


def check_not_projected(plan: str, capturable: bool, long: bool) -> None:
    """Check that nothing is projected at a learning rate of 0, and in a step that is skipped."""
    rows = (LONG if long else LAYOUTS)[1:3]
    float32 = Format(torch.float32, torch.float32)
    with planned_by(plan), _long_from(1024, 2):
        ours, theirs = _both(rows, float32, SecondMoment.MONOTONE, capturable=capturable)
        for step in (1, 2, 3):
            before = ours.copied()
            for run in (ours, theirs):
                for group in run.optimizer.param_groups:
                    group["lr"] = 0.0 if step == 1 else 0.05
                run.optimizer.found_inf = torch.tensor(float(step == 3))
                run.step(step)
            _check_same(ours, theirs, f"step {step}")
            held = ours.values()
            if step == 1:
                outside = [param["param"] for param in before]
                assert all(torch.equal(a["param"], b) for a, b in zip(held, outside, strict=True))
                assert all((values["multiplier"] == 0).all() for values in held)
            else:
                assert any((values["multiplier"] != 0).any() for values in held)
            assert (different_values(held, before) == []) == (step == 3)
        assert ours.optimizer.skipped_steps == 1
