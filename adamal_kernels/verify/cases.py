"""The one table of cases that the command line, the tests and the benchmarks' gate share."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ..core.buffers import SecondMoment
from ..core.storage import FORMATS, Format
from ..projections import Box, L1Ball, L2Ball, NonNegative, Simplex

__all__ = ["QUICK_STEPS", "STEPS", "Case", "cases", "quick_cases"]

STEPS = 20
QUICK_STEPS = 4
"""Steps of a quick check: plain ones, and one with a NaN, an infinity and watching."""

_DENORMAL = {
    torch.float32: 1e-41,
    torch.float64: 1e-310,
    torch.bfloat16: 1e-39,
    torch.float16: 1e-7,
}

# Options by name: those of the first group, and what the second group has otherwise. Learning
# rates are large enough that twenty steps reach the bounds.
_VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({"lr": 1e-2}, {"lr": 3e-2, "betas": (0.8, 0.99)}),
    "coupled decay": ({"lr": 1e-2, "weight_decay": 0.1}, {"weight_decay": 0.0}),
    "decoupled decay": (
        {"lr": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True},
        {"decoupled_weight_decay": False},
    ),
    "maximize": ({"lr": 1e-2, "maximize": True, "weight_decay": 0.1}, {"maximize": False}),
    "algorithm 1": ({"lr": 1e-3, "eps": 0.0, "bias_correction": False}, {"betas": (0.9, 0.9)}),
    "no memory": ({"lr": 1e-2, "betas": (0.0, 0.0)}, {"betas": (0.5, 0.0)}),
    "box": ({"lr": 5e-2, "projection": Box(-0.3, 0.7)}, {"projection": Box(-0.1, float("inf"))}),
    "nonnegative, decoupled": (
        {
            "lr": 5e-2,
            "projection": NonNegative(),
            "weight_decay": 0.1,
            "decoupled_weight_decay": True,
        },
        {"projection": None},
    ),
    "capturable": (
        {"lr": 5e-2, "capturable": True, "weight_decay": 0.1, "projection": Box(-0.3, 0.7)},
        {"decoupled_weight_decay": True, "maximize": True},
    ),
    "L2 ball": (
        {"lr": 5e-2, "projection": L2Ball(3.0)},
        {"projection": L2Ball(0.4, dim=-1), "weight_decay": 0.1},
    ),
    "L1 ball": (
        {"lr": 5e-2, "projection": L1Ball(2.0, dim=0)},
        {"projection": L1Ball(40.0), "decoupled_weight_decay": True, "weight_decay": 0.1},
    ),
    "simplex, capturable": (
        {"lr": 5e-2, "projection": Simplex(2.0), "capturable": True},
        {"projection": L2Ball(0.4, dim=0), "maximize": True},
    ),
    "lr 0 does not project": ({"lr": 0.0, "projection": Box(-0.1, 0.1)}, {"lr": 1e-2}),
}


@dataclass(frozen=True)
class Case:
    """One configuration: types, options, and the tensors of two param groups.

    The parameters are ragged, tiny, empty, zero-dimensional, transposed, misaligned and longer
    than a chunk of any backend; in some variants one has gaps between its elements. Each misses
    its gradient in some steps, so that step counts differ.
    """

    variant: str
    dtypes: Format
    second_moment: SecondMoment
    special: bool = False
    """Gradients hold NaN, infinities, denormals and both zeros."""
    oracle: bool = True
    """False where the compute type's own limits show: with eps = 0, a gradient whose square is
    too small for float32 divides by zero."""
    options: dict[str, Any] = field(default_factory=dict, hash=False, compare=False)
    other_options: dict[str, Any] = field(default_factory=dict, hash=False, compare=False)

    @property
    def name(self) -> str:
        """A short name, unique in the table."""
        param, grad = (str(dtype).removeprefix("torch.") for dtype in self.dtypes[:2])
        types = param if param == grad else f"{param} with {grad} gradients"
        return f"{self.second_moment.name.lower()}, {types}, {self.variant}"

    def params(self, device: torch.device | str = "cpu") -> list[Tensor]:
        """Return the initial parameters, the same values on every call and device."""
        generator = torch.Generator().manual_seed(1)
        made = []
        shapes = (*_SHAPES, _STRIDED) if self.variant in _STRIDED_VARIANTS else _SHAPES
        for layout, shape in shapes:
            values = torch.randn(shape, generator=generator, dtype=torch.float64).mul_(0.5)
            values = values.to(self.dtypes.param).to(device)
            made.append(_laid_out(values, layout))
        for param in made:
            param.requires_grad_()
            if self.dtypes.grad != self.dtypes.param:
                param.grad_dtype = self.dtypes.grad
        return made

    def grads(self, step: int, params: list[Tensor]) -> list[Tensor | None]:
        """Return the gradients of step ``step`` (from 0), the same values on every call."""
        made: list[Tensor | None] = []
        shapes = tuple(param.shape for param in params)
        for index, (param, normal) in enumerate(
            zip(params, _normal_values(step, shapes), strict=True)
        ):
            values = normal.mul(0.1 * (1 + index % 3)).to(self.dtypes.grad)
            if self.special:
                _put_special(values, step)
            if (step + index) % 7 == 3:
                made.append(None)
            else:
                grad = torch.empty_like(param, dtype=self.dtypes.grad, requires_grad=False)
                made.append(grad.copy_(values))
        return made

    def groups(self, params: list[Tensor]) -> list[dict[str, Any]]:
        """Return ``params`` as two param groups with this case's options."""
        common = {"amsgrad": True} if self.second_moment is SecondMoment.AMSGRAD else {}
        return [
            {"params": params[::2], **common, **self.options},
            {"params": params[1::2], **common, **self.options, **self.other_options},
        ]


_SHAPES: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("contiguous", ()),
    ("contiguous", (0,)),
    ("contiguous", (1,)),
    ("contiguous", (7,)),
    ("contiguous", (3, 5)),
    ("transposed", (12, 9)),
    ("channels_last", (2, 3, 4, 5)),
    ("misaligned", (129,)),
    ("contiguous", (2048,)),
    ("contiguous", (2049,)),
    ("contiguous", (16390,)),
)

# A step that has to copy a parameter cannot be repeated without Python: most variants leave it out.
_STRIDED = ("strided", (6, 11))
_COUPLED_VARIANTS = ("L2 ball", "L1 ball", "simplex, capturable")
_STRIDED_VARIANTS = ("maximize", "nonnegative, decoupled", "box, special gradients")


# All cases of a layout take the same gradients, and drawing them costs as much as a step.
@functools.lru_cache(maxsize=3 * STEPS)
def _normal_values(step: int, shapes: tuple[torch.Size, ...]) -> list[Tensor]:
    """Return standard normal values on the CPU, which the caller leaves as they are."""
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _laid_out(values: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return values.t().contiguous().t()
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "misaligned":
        room = torch.empty(values.numel() + 1, dtype=values.dtype, device=values.device)
        return room[1:].copy_(values)
    if layout == "strided":
        room = torch.empty(
            *values.shape[:-1], 2 * values.shape[-1], dtype=values.dtype, device=values.device
        )
        return room[..., ::2].copy_(values)
    return values


def _put_special(values: Tensor, step: int) -> None:
    """Overwrite some elements; which ones differs from step to step, and most stay finite."""
    flat = values.view(-1)
    if flat.numel() < 7:
        return
    denormal = _DENORMAL[values.dtype]
    specials = (0.0, -0.0, denormal, -denormal)
    flat[: len(specials)] = torch.tensor(specials, dtype=torch.float64).to(values.dtype)
    if step % 4 == 1:
        flat[4], flat[5], flat[6] = float("nan"), float("inf"), float("-inf")


def _is_first(dtypes: Format, second_moment: SecondMoment) -> bool:
    """Whether one of the two is the table's first: a few of all combinations, where cases cost."""
    return dtypes == FORMATS[0] or second_moment is SecondMoment.MONOTONE


def cases() -> Iterator[Case]:
    """Yield the whole table: every pair of types, second moment and variant of options.

    The sets that couple elements are taken with every pair and with every second moment, not with
    every combination.
    """
    for dtypes in FORMATS:
        for second_moment in SecondMoment:
            for variant, (options, other_options) in _VARIANTS.items():
                if variant in _COUPLED_VARIANTS and not _is_first(dtypes, second_moment):
                    continue
                yield Case(
                    variant,
                    dtypes,
                    second_moment,
                    options=options,
                    other_options=other_options,
                )
            for variant in ("default", "box", "algorithm 1"):
                options, other_options = _VARIANTS[variant]
                yield Case(
                    f"{variant}, special gradients",
                    dtypes,
                    second_moment,
                    special=True,
                    oracle=variant != "algorithm 1",
                    options=options,
                    other_options=other_options,
                )


def quick_cases() -> Iterator[Case]:
    """Yield a case for every pair of types and second moment, and for every variant, too.

    Example:
        >>> sorted({case.variant for case in quick_cases()} ^ {case.variant for case in cases()})
        []
    """
    taken: Counter[str] = Counter()
    for _, group in groupby(cases(), key=lambda case: (case.dtypes, case.second_moment)):
        case = min(group, key=lambda case: taken[case.variant])
        taken[case.variant] += 1
        yield case
