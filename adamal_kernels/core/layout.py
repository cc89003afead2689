"""How a tensor's elements lie in memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["empty_dense_like", "has_memory", "is_dense", "overlapping_pair", "same_layout"]


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory, in some order of the dimensions.

    Example:
        >>> x = torch.empty(4, 6)
        >>> is_dense(x.t()), is_dense(x[:, ::2]), is_dense(torch.empty(1).expand(3))
        (True, False, False)
    """
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def same_layout(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one shape store their elements in the same order and spacing.

    Example:
        >>> same_layout(torch.empty(2, 3), torch.empty(3, 2).t())
        False
    """
    if first.stride() == second.stride() or first.numel() == 0:
        return True
    return all(
        size == 1 or a == b
        for size, a, b in zip(first.shape, first.stride(), second.stride(), strict=True)
    )


def empty_dense_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an uninitialised dense tensor of ``dtype``, in ``tensor``'s order where it is dense.

    Example:
        >>> empty_dense_like(torch.empty(3, 2).t(), torch.float64).stride()
        (1, 2)
    """
    if is_dense(tensor):
        return torch.empty_strided(
            tensor.size(), tensor.stride(), dtype=dtype, device=tensor.device
        )
    return torch.empty(tensor.shape, dtype=dtype, device=tensor.device)


def has_memory(tensor: Tensor) -> bool:
    """Whether the tensor's storage is large enough to hold all its elements.

    Example:
        >>> x = torch.empty(4)
        >>> x.untyped_storage().resize_(0).nbytes(), has_memory(x)
        (0, False)
    """
    if tensor.numel() == 0:
        return True
    needed = (tensor.storage_offset() + _reach(tensor) + 1) * tensor.element_size()
    return tensor.untyped_storage().nbytes() >= needed


def overlapping_pair(
    written: Sequence[Tensor], read: Sequence[Tensor] = ()
) -> tuple[int, int] | None:
    """Return the indices of two tensors with a common element, at least one of them written.

    A written tensor whose own elements overlap (an expanded one) is returned as a pair with
    itself. Strided views that interleave without touching (columns, every other element, the real
    and the imaginary parts) are told apart exactly, whatever their strides; only where that takes
    too long are they taken to touch. Indices of ``read`` go on where those of ``written`` end.

    Example:
        >>> x = torch.zeros(8)
        >>> overlapping_pair([x[:4], x[4:], x[2:6]])
        (0, 2)
        >>> overlapping_pair([x[:4]], [x[4:], x[2:6]])
        (0, 2)
        >>> overlapping_pair([x[::2], x[1::4], x[3::4]]) is None
        True
    """
    tensors = [*written, *read]
    spans: list[_Span] = []
    for index, tensor in enumerate(tensors):
        if tensor.numel() == 0 or tensor.device.type == "meta":
            continue
        has_holes = not is_dense(tensor)
        if has_holes and index < len(written) and _meets_itself(_steps(tensor)):
            return index, index
        spans.append((tensor.data_ptr(), _last_byte(tensor), index, has_holes))
    spans.sort()
    # Thousands of views of one tensor have few layouts, and few distances between them.
    numbers: dict[_Steps, int] = {}
    layout_of = functools.cache(
        lambda index: numbers.setdefault(_steps(tensors[index]), len(numbers))
    )
    known: dict[tuple[int, int, int], bool] = {}

    def meet(first: _Span, second: _Span) -> bool:
        if not (first[3] or second[3]):
            return True
        layouts = layout_of(first[2]), layout_of(second[2])
        key = (*layouts, second[0] - first[0])
        if key not in known:
            steps = list(numbers)
            known[key] = _meet(steps[layouts[0]], steps[layouts[1]], key[2])
        return known[key]

    # Of those that reach to where the next begins. Two that are read may share anything.
    open_written: list[_Span] = []
    open_read: list[_Span] = []
    for span in spans:
        begin, _, index, _ = span
        open_written = [other for other in open_written if other[1] >= begin]
        open_read = [other for other in open_read if other[1] >= begin]
        is_written = index < len(written)
        for other in (*open_written, *(open_read if is_written else ())):
            if meet(other, span):
                return min(other[2], index), max(other[2], index)
        (open_written if is_written else open_read).append(span)
    return None


_Span = tuple[int, int, int, bool]
"""Addresses of the first byte and the last, the tensor's index, and whether bytes between are not
the tensor's."""

_Steps = tuple[tuple[int, int], ...]
"""Of each dimension, and last of an element's bytes: a step in bytes, and how many can be taken."""

# Of the search for a common byte; nested strides take a few a dimension.
_MOST_VISITS = 2000


def _reach(tensor: Tensor) -> int:
    """How far the last element lies from the first."""
    if tensor.is_contiguous():
        return tensor.numel() - 1
    return sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def _last_byte(tensor: Tensor) -> int:
    return tensor.data_ptr() + (_reach(tensor) + 1) * tensor.element_size() - 1


def _steps(tensor: Tensor) -> _Steps:
    size = tensor.element_size()
    dims = zip(tensor.stride(), tensor.shape, strict=True)
    return (*((stride * size, n - 1) for stride, n in dims if n > 1), (1, size - 1))


def _meets_itself(steps: _Steps) -> bool:
    """Whether two elements of a tensor are the same, or it takes too long to find out."""
    dims = [(step, -count, count) for step, count in steps[:-1]]
    # Of two elements that differ in a dimension, one comes later along it.
    return any(
        _has_solution(-step, _ranges([*dims[:i], (step, 0, count - 1), *dims[i + 1 :]]))
        for i, (step, _, count) in enumerate(dims)
    )


@functools.lru_cache(maxsize=1 << 16)
def _meet(first: _Steps, second: _Steps, distance: int) -> bool:
    """Whether tensors that begin ``distance`` bytes apart share a byte, or it takes too long."""
    size = first[-1][1] + 1
    if first[-1] == second[-1] and distance % size == 0:
        # Then they share whole elements, which the steps' common divisor may rule out.
        first, second = first[:-1], second[:-1]
    terms = [(step, 0, count) for step, count in first]
    return _has_solution(distance, _ranges(terms + [(step, -n, 0) for step, n in second]))


def _ranges(terms: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Return ``(step, least, most)`` from the largest step down, equal ones added up."""
    merged: dict[int, tuple[int, int]] = {}
    for step, least, most in terms:
        low, high = merged.get(step, (0, 0))
        merged[step] = (low + least, high + most)
    return [(step, *merged[step]) for step in sorted(merged, reverse=True) if step]


def _has_solution(total: int, ranges: list[tuple[int, int, int]]) -> bool:
    """Whether ``sum(step * x) == total`` for integers ``least <= x <= most``; True if unknown.

    Depth first from the largest step: those below it reach only so far, which leaves few ``x``.
    """
    # What the ranges from each one on can add up to, and what divides all that they can.
    reaches = [(0, 0, 0)]
    for step, least, most in reversed(ranges):
        low, high, divisor = reaches[-1]
        reaches.append((low + step * least, high + step * most, math.gcd(divisor, step)))
    reaches.reverse()
    pending = [(0, total)]
    for _ in range(_MOST_VISITS):
        if not pending:
            return False
        level, left = pending.pop()
        low, high, divisor = reaches[level]
        if not low <= left <= high or (divisor and left % divisor):
            continue
        if level == len(ranges):
            return True
        step, least, most = ranges[level]
        low, high, _ = reaches[level + 1]
        first, last = max(least, -((high - left) // step)), min(most, (left - low) // step)
        if last - first >= _MOST_VISITS:
            return True
        pending.extend((level + 1, left - step * x) for x in range(first, last + 1))
    return True
