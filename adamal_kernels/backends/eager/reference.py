"""The formula in eager PyTorch, one tensor at a time: what every other backend must equal."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.bucket import Bucket
from ...core.buffers import SecondMoment
from ...core.rounding import rounded_sqrt
from ...core.scalars import StepScalars
from ...core.storage import load, store
from ..base import EagerBackend
from .scalars import device_rows
from .sets import project_bucket
from .watch import record_steps

__all__ = ["ReferenceBackend"]


class ReferenceBackend(EagerBackend):
    """Eager PyTorch, readable, any device; the arithmetic every backend is held to."""

    name = "reference"

    def step(self, bucket: Bucket) -> None:
        """See :class:`adamal_kernels.backends.Backend`."""
        dtype = bucket.key.format.compute
        if bucket.device_scalars is not None:
            rows, skip = device_rows(bucket.device_scalars, bucket.rows, dtype, bucket.key.device)
        else:
            # Tensors: eager CUDA divides by a number by multiplying by its reciprocal.
            table = torch.tensor(bucket.scalars, dtype=dtype, device="cpu").to(bucket.key.device)
            table_rows = [StepScalars(*row.unbind()) for row in table.unbind()]
            rows, skip = [table_rows[row] for row in bucket.rows], None
        before = [tensor.detach().clone() for tensor in bucket.divisors] if bucket.records else []
        for grad, row, *stored in zip(
            bucket.grads, rows, bucket.params, *bucket.elementwise_buffers, strict=True
        ):
            # Autograd keeps what the formula reads, and does without what is changed since.
            read = [t.clone() for t in stored] if torch.is_grad_enabled() else stored
            values = _step_tensor(
                load(grad, dtype),
                *(load(tensor, dtype) for tensor in read),
                s=row,
                second_moment=bucket.key.second_moment,
            )
            for target, value in zip(stored, values, strict=True):
                store(target, value if skip is None else torch.where(skip, target, value))
        if bucket.records:
            record_steps(bucket.records, before, bucket.divisors, rows, dtype, skip)
        if bucket.key.coupled:
            project_bucket(bucket, rows, skip)


def _step_tensor(
    grad: Tensor,
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None = None,
    *,
    s: StepScalars,
    second_moment: SecondMoment,
) -> list[Tensor]:
    """Return the new parameter, moments and, if there is one, maximum.

    All tensors are of the compute type, ``s`` too.
    """
    g, p = grad * s.grad_factor, param
    # Left out rather than added as 0 * p: that would be NaN where p is infinite.
    g = torch.where(s.coupled_decay != 0, g + s.coupled_decay * p, g)
    p = p * s.decay_factor

    m = exp_avg + s.one_minus_beta1 * (g - exp_avg)
    g2 = g * g
    if second_moment is SecondMoment.MONOTONE:
        # As a difference: exactly monotone, which the sum of two products is not.
        v = exp_avg_sq + s.one_minus_beta2 * (g2 - exp_avg_sq)
        v = torch.where(g2 > exp_avg_sq, v, exp_avg_sq)
    else:
        # As a sum: accurate where v falls far, which the difference is not if beta2 is small.
        v = s.beta2 * exp_avg_sq + s.one_minus_beta2 * g2
    second_moments = [v]
    if max_exp_avg_sq is not None:
        second_moments.append(torch.where(v > max_exp_avg_sq, v, max_exp_avg_sq))

    d = rounded_sqrt(second_moments[-1]) / s.bias2_sqrt + s.eps
    # Gradient and moments all zero with eps=0: the paper divides 0 by 0, the parameter stays.
    quotient = torch.where((m == 0) & (d == 0), 0.0, m / d)
    p = p - s.step_size * quotient
    p = torch.where(p < s.lower, s.lower, torch.where(p > s.upper, s.upper, p))
    return [p, m, *second_moments]
