"""The formula in eager PyTorch, one tensor at a time: what every other backend must equal."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..bucket import Bucket, BucketKey, SecondMoment
from ..dtypes import DTYPE_PAIRS, compute_dtype
from ..hyperparameters import StepScalars

__all__ = ["ReferenceBackend", "rounded_sqrt"]


def rounded_sqrt(value: Tensor) -> Tensor:
    """Return the correctly rounded square root of a float32 or float64 tensor.

    ``torch.sqrt`` on x86 CPUs is one unit in the last place off for up to a fifth of all values;
    numpy's is the processor's own, which rounds to nearest.

    Example:
        >>> rounded_sqrt(torch.tensor([2.0, 0.0, float("inf")]))
        tensor([1.4142, 0.0000,    inf])
    """
    if value.device.type != "cpu":
        return torch.sqrt(value)
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.asarray(np.sqrt(value.contiguous().numpy())))


class ReferenceBackend:
    """Eager PyTorch, readable, any device; the arithmetic every backend is held to."""

    name = "reference"
    device_types = None

    def unavailable(self, device: torch.device) -> str | None:
        """See :class:`adamal_kernels.backends.Backend`."""
        return None

    def unsupported(self, key: BucketKey) -> str | None:
        """See :class:`adamal_kernels.backends.Backend`."""
        return None if key.dtypes in DTYPE_PAIRS else f"{key.dtypes} is not in DTYPE_PAIRS"

    def step(self, bucket: Bucket) -> None:
        """See :class:`adamal_kernels.backends.Backend`."""
        maxima = bucket.max_exp_avg_sqs or [None] * len(bucket.params)
        for param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, row in zip(
            bucket.params,
            bucket.grads,
            bucket.exp_avgs,
            bucket.exp_avg_sqs,
            maxima,
            bucket.rows,
            strict=True,
        ):
            _step_tensor(
                param,
                grad,
                exp_avg,
                exp_avg_sq,
                max_exp_avg_sq,
                bucket.scalars[row],
                bucket.key.second_moment,
            )


def _step_tensor(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    scalars: StepScalars,
    second_moment: SecondMoment,
) -> None:
    dtype = compute_dtype(param.dtype)
    # Tensors, not Python numbers: eager CUDA divides by a number by multiplying by its reciprocal.
    s = StepScalars(*torch.tensor(scalars, dtype=dtype, device="cpu").to(param.device).unbind())

    g = grad.to(dtype) * s.grad_sign
    p = param.to(dtype)
    if s.coupled_decay != 0:
        g = g + s.coupled_decay * p
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
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    if max_exp_avg_sq is not None:
        v = torch.where(v > max_exp_avg_sq, v, max_exp_avg_sq)
        max_exp_avg_sq.copy_(v)

    d = rounded_sqrt(v) / s.bias2_sqrt + s.eps
    # Gradient and moments all zero with eps=0: the paper divides 0 by 0, the parameter stays.
    quotient = torch.where((m == 0) & (d == 0), 0.0, m / d)
    p = p - s.step_size * quotient
    p = torch.where(p < s.lower, s.lower, torch.where(p > s.upper, s.upper, p))
    param.copy_(p)
