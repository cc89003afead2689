"""How a tensor's elements lie in memory."""

from __future__ import annotations

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
    itself. Strided views of one tensor that interleave without touching are told apart if their
    strides are equal; others whose spans overlap are taken to touch. Indices of ``read`` go on
    where those of ``written`` end.

    Example:
        >>> x = torch.zeros(8)
        >>> overlapping_pair([x[:4], x[4:], x[2:6]])
        (0, 2)
        >>> overlapping_pair([x[:4]], [x[4:], x[2:6]])
        (0, 2)
        >>> overlapping_pair([x[::2], x[1::2]]) is None
        True
    """
    tensors = [*written, *read]
    spans = []
    for index, tensor in enumerate(tensors):
        if tensor.numel() == 0 or tensor.device.type == "meta":
            continue
        if index < len(written) and not is_dense(tensor) and _may_overlap_itself(tensor):
            return index, index
        begin = tensor.data_ptr()
        spans.append((begin, begin + (_reach(tensor) + 1) * tensor.element_size(), index))
    spans.sort()
    # Of those that reach beyond where the next begins. Two that are read may share anything.
    open_written: list[tuple[int, int]] = []
    open_read: list[tuple[int, int]] = []
    for begin, end, index in spans:
        open_written = [span for span in open_written if span[0] > begin]
        open_read = [span for span in open_read if span[0] > begin]
        is_written = index < len(written)
        for _, other in (*open_written, *(open_read if is_written else ())):
            if not _interleave(tensors[other], tensors[index]):
                return min(other, index), max(other, index)
        (open_written if is_written else open_read).append((end, index))
    return None


def _reach(tensor: Tensor, below: float = float("inf")) -> int:
    """How far the last element lies from the first, along dimensions of strides ``below``."""
    if below == float("inf") and tensor.is_contiguous():
        return tensor.numel() - 1
    return sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if s < below)


def _may_overlap_itself(tensor: Tensor) -> bool:
    """Whether some stride does not step over all that the smaller ones reach."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _interleave(first: Tensor, second: Tensor) -> bool:
    """Whether two strided views of one type provably share no element, though their spans do."""
    if first.dtype != second.dtype or first.stride() != second.stride() or first.dim() == 0:
        return False
    # Such as x[:, :3] and x[:, 3:]: within one period of the largest stride they stay apart.
    large = max(first.stride())
    offset = (second.data_ptr() - first.data_ptr()) // first.element_size() % large
    return _reach(first, large) < offset and offset + _reach(second, large) < large
