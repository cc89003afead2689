"""What is timed: the shapes of models people know, and the corners of the space between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

__all__ = ["CASES", "SCALING", "BenchCase", "Room", "Shape"]

Shape = tuple[int, ...]

_HOST_BOUND = 1000
_BOTH = (torch.float32, torch.bfloat16)


class Room(NamedTuple):
    """What a case may fill."""

    device_type: str
    elements: int
    """Parameters that fit twice, with the state of two optimizers."""


@dataclass(frozen=True)
class BenchCase:
    """The tensors of one model, or of one corner.

    Example:
        >>> case = CASES["2000x16"]
        >>> len(case.shapes(Room("cpu", 10**9))), case.fresh_gradients(2000)
        (2000, True)
    """

    name: str
    title: str
    """May hold ``{tensors}``, ``{each}`` and ``{parameters}``; see :meth:`title_of`."""
    shapes: Callable[[Room], list[Shape]]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    """Types of the parameters it is timed with unless others are asked for."""
    group_each: bool = False
    """A param group for every tensor, instead of one for all."""
    saturated: bool = False
    """Timed with a saturated second moment too: for cases whose time is memory traffic."""
    series: str | None = None
    """The scaling curve it is a point of."""

    def title_of(self, shapes: Sequence[Shape]) -> str:
        """Return the title with the sizes that the case has here.

        Example:
            >>> CASES["1xhuge"].title_of([(20_000_000,)])
            '1 x 20M'
        """
        parameters = sum(map(prod, shapes))
        return self.title.format(
            tensors=len(shapes),
            each=_short(parameters // len(shapes)),
            parameters=_short(parameters),
        )

    @staticmethod
    def fresh_gradients(tensors: int) -> bool:
        """Whether every step gets new gradient tensors: where the host's work per tensor counts."""
        return tensors >= _HOST_BOUND


def _short(count: int) -> str:
    for letter, scale in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g}{letter}"
    return str(count)


def resnet50() -> list[Shape]:
    """Return the shapes of ResNet-50 for ImageNet.

    Example:
        >>> len(resnet50()), sum(prod(shape) for shape in resnet50())
        (161, 25557032)
    """

    def convolution(outputs: int, inputs: int, size: int) -> list[Shape]:
        return [(outputs, inputs, size, size), (outputs,), (outputs,)]

    shapes = convolution(64, 3, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        outputs = 4 * width
        for block in range(blocks):
            shapes += convolution(width, inputs, 1)
            shapes += convolution(width, width, 3)
            shapes += convolution(outputs, width, 1)
            if block == 0:
                shapes += convolution(outputs, inputs, 1)
            inputs = outputs
    return [*shapes, (1000, inputs), (1000,)]


def gpt2() -> list[Shape]:
    """Return the shapes of GPT-2 124M.

    Example:
        >>> len(gpt2()), sum(prod(shape) for shape in gpt2())
        (148, 124439808)
    """
    return [(50257, 768), (1024, 768), *12 * _transformer_block(768), (768,), (768,)]


def vit_b() -> list[Shape]:
    """Return the shapes of ViT-B/16 for ImageNet.

    Example:
        >>> len(vit_b()), sum(prod(shape) for shape in vit_b())
        (152, 86567656)
    """
    embeddings = [(1, 1, 768), (1, 197, 768), (768, 3, 16, 16), (768,)]
    head = [(768,), (768,), (1000, 768), (1000,)]
    return [*embeddings, *12 * _transformer_block(768), *head]


def _transformer_block(width: int) -> list[Shape]:
    """Norm, attention, norm and feed-forward, every matrix with a bias."""
    norm = [(width,), (width,)]
    attention = [(3 * width, width), (3 * width,), (width, width), (width,)]
    feed_forward = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [*norm, *attention, *norm, *feed_forward]


def llama3_layers(count: int) -> list[Shape]:
    """Return the shapes of ``count`` layers of Llama 3 8B.

    Example:
        >>> sum(prod(shape) for shape in llama3_layers(1))
        218112000
    """
    width, hidden, grouped = 4096, 14336, 1024
    attention = [(width, width), (grouped, width), (grouped, width), (width, width)]
    feed_forward = [(hidden, width), (hidden, width), (width, hidden)]
    return count * [*attention, *feed_forward, (width,), (width,)]


def _llama3_in(room: Room) -> list[Shape]:
    per_layer = sum(prod(shape) for shape in llama3_layers(1))
    return llama3_layers(max(1, min(32, room.elements // per_layer)))


def lora(adapters: int, rank: int, width: int) -> list[Shape]:
    """Return the two factors of each of ``adapters`` low-rank adapters.

    Example:
        >>> lora(1, 8, 1024)
        [(8, 1024), (1024, 8)]
    """
    return adapters * [(rank, width), (width, rank)]


def _between(count: int, smallest: int, largest: int) -> list[Shape]:
    """Sizes spread evenly from ``smallest`` to ``largest``, in no order, most of them ragged."""
    stride = 7919  # A prime: visits every size once.
    return [
        (smallest + (largest - smallest) * (i * stride % count) // (count - 1),)
        for i in range(count)
    ]


def _equal(count: int, elements: int) -> Callable[[Room], list[Shape]]:
    return lambda room: count * [(elements,)]


def _one_huge(room: Room) -> list[Shape]:
    return [(20_000_000 if room.device_type == "cpu" else min(10**9, room.elements),)]


def _large(room: Room) -> list[Shape]:
    if room.device_type == "cpu":
        return 300 * [(100_000,)]
    return 300 * [(min(10**6, room.elements // 300),)]


CASES: dict[str, BenchCase] = {
    case.name: case
    for case in (
        BenchCase("resnet50", "ResNet-50", lambda room: resnet50()),
        BenchCase("vit-b", "ViT-B/16", lambda room: vit_b()),
        BenchCase("gpt2-124m", "GPT-2 124M", lambda room: gpt2()),
        BenchCase("llama3-8b-stack", "Llama-3-8B stack, {parameters}", _llama3_in),
        BenchCase("lora-2000", "LoRA, 2000 factors", lambda room: lora(1000, 8, 1024)),
        BenchCase("1xhuge", "1 x {each}", _one_huge, _BOTH, saturated=True),
        BenchCase("300xlarge", "300 x {each}", _large, _BOTH, saturated=True),
        BenchCase("2000x1k-10k", "2000 x 1K-10K", lambda room: _between(2000, 1000, 10_000)),
        BenchCase("2000x2048", "2000 x 2048", _equal(2000, 2048), _BOTH),
        BenchCase("2000x16", "2000 x 16", _equal(2000, 16)),
        BenchCase("20000x16", "20000 x 16", _equal(20_000, 16)),
        BenchCase("2000-groups", "2000 groups of 1 x 16", _equal(2000, 16), group_each=True),
    )
}
"""By name: the cases of ``adamal bench``."""


def _tensor_points() -> list[BenchCase]:
    return [
        BenchCase(f"{count}x16", "{tensors} x 16", _equal(count, 16), series="scaling-tensors")
        for count in (1, 10, 100, 1000, 10_000)
    ]


def _parameter_points() -> list[BenchCase]:
    def point(elements: int) -> BenchCase:
        return BenchCase(
            f"1x{elements}",
            "1 x {each}",
            lambda room: [(elements,)],
            series="scaling-parameters",
        )

    return [point(10**power) for power in range(3, 10)]


SCALING: dict[str, list[BenchCase]] = {
    "scaling-tensors": _tensor_points(),
    "scaling-parameters": _parameter_points(),
}
"""By name: the points of a curve, over tensors of 16 elements and over elements of one tensor.

Points that do not fit into the memory there is are left out.
"""
