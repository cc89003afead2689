"""The norm of gradients: one order of float64 sums for every backend, and so the same bits.

A tensor's squares, in memory order, are cut into chunks of :func:`chunk_elements`, each summed by
a binary tree of neighbours: ``(s[0] + s[1]) + (s[2] + s[3])`` and so on, zeros to its end. Of the
chunks' sums, each of :data:`LANES` lanes adds every :data:`LANES`-th in turn, and the same tree
adds the lanes. Tensors' sums are then added one after another, so that one without a gradient
changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .scalars import move_scalar

__all__ = ["LANES", "chunk_elements", "ordered_sum", "row_sums", "squared_norm"]

LANES = 256
"""Twin of ``kNormLanes`` in ``csrc/formula/norm.h``."""


def chunk_elements(compute_dtype: torch.dtype) -> int:
    """Return how many elements the innermost tree adds: 8 KB of them in the compute type.

    Example:
        >>> chunk_elements(torch.float32), chunk_elements(torch.float64)
        (2048, 1024)
    """
    return 8192 // compute_dtype.itemsize


def squared_norm(grads: Sequence[Tensor], compute_dtype: torch.dtype) -> Tensor:
    """Return the sum of squares of all gradients: a float64 scalar on their device.

    Args:
        grads: dense real tensors of any floating type, on one device.
        compute_dtype: what a step computes in: it fixes the chunks.

    Example:
        >>> squared_norm([torch.tensor([3.0, 4.0]), torch.ones(2, 2)], torch.float32).item()
        29.0
    """
    chunk = chunk_elements(compute_dtype)
    return ordered_sum([_squared_norm(grad, chunk) for grad in grads])


def ordered_sum(values: Sequence[Tensor]) -> Tensor:
    """Return the sum of float64 scalars, added one after another on the first one's device.

    Example:
        >>> ordered_sum([torch.tensor(float(i), dtype=torch.float64) for i in range(4)]).item()
        6.0
    """
    device = values[0].device if values else torch.device("cpu")
    total = torch.zeros((), dtype=torch.float64, device=device)
    for value in values:
        total = total + move_scalar(value, device)
    return total


def row_sums(values: Tensor, chunk: int) -> Tensor:
    """Return the sum of each row, in the order of this module.

    Args:
        values: float64 ``[rows, length]``.
        chunk: how many elements the innermost tree adds, :func:`chunk_elements`.

    Example:
        >>> row_sums(torch.ones(2, 5, dtype=torch.float64), 2048)
        tensor([5., 5.], dtype=torch.float64)
    """
    length = values.shape[1]
    if length == 0:
        return values.new_zeros(values.shape[0])
    # A short row's tree needs no more zeros than to a power of two.
    chunks = _tree(_padded(values, min(chunk, 1 << (length - 1).bit_length())))
    lanes, *more = _padded(chunks, LANES).unbind(dim=1)
    for added in more:
        lanes = lanes + added
    return _tree(lanes)


def _squared_norm(grad: Tensor, chunk: int) -> Tensor:
    flat = grad.as_strided((1, grad.numel()), (1, 1)).double()
    return row_sums(flat * flat, chunk)[0]


def _padded(values: Tensor, width: int) -> Tensor:
    """Return ``[rows, length]`` as ``[rows, parts, width]``, with zeros at the end."""
    padding = -values.shape[1] % width
    return torch.nn.functional.pad(values, (0, padding)).unflatten(1, (-1, width))


def _tree(values: Tensor) -> Tensor:
    """Add the last dimension, a power of two, pair by pair."""
    while values.shape[-1] > 1:
        values = values[..., 0::2] + values[..., 1::2]
    return values[..., 0]
