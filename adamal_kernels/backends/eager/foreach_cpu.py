"""The formula on a CPU by eager operators, in pieces whose temporaries stay in the cache.

An operator costs a microsecond or more whatever it works on, and reads and writes main memory
where its tensors are larger than the cache. So small tensors are packed, many to a piece, and
large ones stepped where they lie, a slice at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ...core.bucket import Bucket
from ...core.buffers import SecondMoment
from ...core.scalars import StepScalars
from ...core.storage import store_all

__all__ = ["step_in_pieces"]

# Elements of a piece for each thread. Fewer, and the operators' own cost shows; more, and an
# operator no longer finds in the cache what the last one wrote.
_PER_THREAD = 1 << 16
# From here on a copy there and back costs more than operators on a tensor of its own.
_LARGE = 1 << 14
_THRESHOLD_BACKWARD = torch.ops.aten.threshold_backward.grad_input

# Rows of the scratch memory. Those of a bucket's columns are for what is packed or cast.
_FIRST, _SECOND, _PARAM, _GRAD = range(4)
_ROWS = 7


def step_in_pieces(bucket: Bucket) -> None:
    """Step a bucket on a CPU whose scalars are numbers.

    Beyond the tensors it needs seven pieces of memory, which the bucket's workspace keeps; a piece
    has 65 536 elements a thread.
    """
    dtype = bucket.key.format.compute
    table = torch.tensor(bucket.scalars, dtype=dtype, device="cpu")
    known = [StepScalars(*row) for row in table.tolist()]
    size = _PER_THREAD * torch.get_num_threads()
    scratch = bucket.workspace.get("scratch")
    if scratch is None or scratch.shape[1] != size:
        scratch = torch.empty((_ROWS, size), dtype=dtype, device="cpu")
        bucket.workspace["scratch"] = scratch
    with np.errstate(invalid="ignore"):
        for row, columns in _pieces(bucket, size):
            numels = [part.numel() for part in columns[0]]
            memory = scratch[:, : sum(numels)].unbind()
            values = [
                _packed(parts, into) for parts, into in zip(columns, memory[_PARAM:], strict=False)
            ]
            scalars = StepScalars(*table[row].unbind())
            _step(values, scalars, known[row], bucket.key.second_moment, memory)
            for index, (parts, value) in enumerate(zip(columns, values, strict=True)):
                if value is not parts[0] and _PARAM + index != _GRAD:
                    store_all(parts, value.split(numels))


def _pieces(bucket: Bucket, size: int) -> Iterator[tuple[int, list[list[Tensor]]]]:
    """Yield the index of a piece's scalars and its columns: parts of parameters, gradients, ...

    Every part is flat, in memory order.
    """
    columns = [bucket.params, bucket.grads, *bucket.elementwise_buffers]
    packs: dict[int, list[list[Tensor]]] = {}
    packed: dict[int, int] = {}
    for row, *tensors in zip(bucket.rows, *columns, strict=True):
        numel = tensors[0].numel()
        flat = [t if t.dim() == 1 else t.as_strided((numel,), (1,)) for t in tensors]
        if numel >= _LARGE:
            count = -(-numel // size)
            parts = zip(*(t.split(-(-numel // count)) for t in flat), strict=True)
            yield from ((row, [[part] for part in slices]) for slices in parts)
            continue
        if packed.get(row, 0) + numel > size:
            yield row, packs.pop(row)
            packed[row] = 0
        pack = packs.setdefault(row, [[] for _ in columns])
        for parts_of_column, tensor in zip(pack, flat, strict=True):
            parts_of_column.append(tensor)
        packed[row] = packed.get(row, 0) + numel
    yield from packs.items()


def _packed(parts: Sequence[Tensor], into: Tensor) -> Tensor:
    """Return the parts as one tensor of the compute type: itself, where it is one already."""
    if len(parts) > 1:
        return torch.cat(parts, out=into)
    return parts[0] if parts[0].dtype == into.dtype else into.copy_(parts[0])


def _step(
    values: Sequence[Tensor],
    s: StepScalars,
    known: StepScalars,
    second_moment: SecondMoment,
    memory: Sequence[Tensor],
) -> None:
    """Step a piece in place, all but its gradient.

    Only operators of one rounding are used, or of more that no compiler can contract to one. What
    changes nothing, such as a product with 1, is left out: ``known`` tells, in numbers.

    Args:
        values: parameter, gradient and moments, flat and of the compute type.
        s: 0-dimensional tensors: operators take them faster than numbers.
        known: the same as numbers.
        second_moment: how the second moment moves.
        memory: rows of scratch memory, of the piece's size.
    """
    p, g, m, v, *maximum = values
    a, b = memory[_FIRST], memory[_SECOND]
    if known.grad_factor != 1:
        g = torch.mul(g, s.grad_factor, out=memory[_GRAD])
    if known.coupled_decay != 0:
        g = torch.add(g, torch.mul(p, s.coupled_decay, out=a), out=memory[_GRAD])
    if known.decay_factor != 1:
        p.mul_(s.decay_factor)

    m.add_(torch.sub(g, m, out=a).mul_(s.one_minus_beta1))

    g2 = torch.mul(g, g, out=a)
    if second_moment is SecondMoment.MONOTONE:
        # Growth, negated: where there is none 0 is subtracted, which leaves a v of -0 as it is.
        fall = torch.sub(v, g2, out=b).mul_(s.one_minus_beta2)
        v.sub_(_keep_where(torch.gt(g2, v, out=a), fall))
    else:
        v.mul_(s.beta2).add_(g2.mul_(s.one_minus_beta2))
    for largest in maximum:
        _replace_where(torch.gt(v, largest, out=a), largest, v, b)
        v = largest

    np.sqrt(v.numpy(), out=a.numpy())  # Torch's own does not round to nearest.
    d = a if known.bias2_sqrt == 1 else a.div_(s.bias2_sqrt)
    d.add_(s.eps)
    quotient = torch.div(m, d, out=b)
    if known.eps == 0:
        # Gradient and moments all zero: the parameter stays.
        quotient.masked_fill_((m == 0) & (d == 0), 0.0)
    p.sub_(quotient.mul_(s.step_size))

    if known.lower > -np.inf:
        _replace_where(torch.gt(s.lower, p, out=a), p, s.lower, b)
    if known.upper < np.inf:
        _replace_where(torch.gt(p, s.upper, out=a), p, s.upper, b)


def _keep_where(condition: Tensor, values: Tensor) -> Tensor:
    """Set ``values`` to 0 where ``condition`` is 0; leave their bits where it is 1.

    ``torch.where`` does so too, but on CPUs an element at a time, and mispredicts.
    """
    return _THRESHOLD_BACKWARD(values, condition, 0, grad_input=values)


def _replace_where(condition: Tensor, target: Tensor, value: Tensor, memory: Tensor) -> None:
    """Set ``target`` to ``value`` where ``condition`` is 1.0 and not 0.0, bit by bit."""
    change = torch.sub(_bits(value), _bits(target), out=_bits(memory))
    _bits(target).add_(_keep_where(_bits(condition), change))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int64)
