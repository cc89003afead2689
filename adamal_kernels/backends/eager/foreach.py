"""The formula in torch's foreach operators: eager PyTorch for any device, fewer launches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.bucket import Bucket
from ...core.buffers import SecondMoment
from ...core.rounding import rounded_sqrt
from ...core.scalars import StepScalars, derive_step_scalars
from ...core.storage import load, store_all
from ..base import EagerBackend
from .foreach_cpu import step_in_pieces
from .scalars import device_rows
from .sets import project_bucket
from .watch import record_steps

__all__ = ["ForeachBackend"]


class ForeachBackend(EagerBackend):
    """All tensors of a bucket by one foreach call an operation; on CPUs in pieces, packed.

    Only foreach operators of one rounding are used: ``_foreach_lerp_``, ``_foreach_addcdiv_`` and
    ``alpha=`` may contract two operations into one.
    """

    name = "foreach"

    def step(self, bucket: Bucket) -> None:
        """See :class:`adamal_kernels.backends.Backend`."""
        dtype = bucket.key.format.compute
        source = bucket.device_scalars
        if source is None:
            table = torch.tensor(bucket.scalars, dtype=dtype, device="cpu").tolist()
            rows = [StepScalars(*table[row]) for row in bucket.rows]
            self._watched_step(bucket, rows, rows, None)
            if bucket.key.coupled:
                numbers = torch.tensor(rows, dtype=dtype, device="cpu").to(bucket.key.device)
                project_bucket(bucket, [StepScalars(*row.unbind()) for row in numbers.unbind()])
            return
        rows, skip = device_rows(source, bucket.rows, dtype, bucket.key.device)
        known = [derive_step_scalars(1, source.options[row]) for row in bucket.rows]
        self._watched_step(bucket, rows, known, skip)
        if bucket.key.coupled:
            project_bucket(bucket, rows, skip)

    def _watched_step(
        self,
        bucket: Bucket,
        rows: Sequence[StepScalars],
        known: Sequence[StepScalars],
        skip: Tensor | None,
    ) -> None:
        """Step, unless that is skipped, and record what it came to, if that is asked for."""
        before = [tensor.clone() for tensor in bucket.divisors] if bucket.records else []
        self._step_unless(skip, bucket, rows, known)
        if bucket.records:
            compute = bucket.key.format.compute
            record_steps(bucket.records, before, bucket.divisors, rows, compute, skip)

    def _step_unless(
        self,
        skip: Tensor | None,
        bucket: Bucket,
        rows: Sequence[StepScalars],
        known: Sequence[StepScalars],
    ) -> None:
        if skip is None:
            self._step(bucket, rows, known)
            return
        changed = [*bucket.params, *(t for held in bucket.elementwise_buffers for t in held)]
        before = [tensor.clone() for tensor in changed]
        self._step(bucket, rows, known)
        for tensor, old in zip(changed, before, strict=True):
            tensor.copy_(torch.where(skip, old, tensor))

    def _step(
        self, bucket: Bucket, rows: Sequence[StepScalars], known: Sequence[StepScalars]
    ) -> None:
        """Step by ``rows``, of numbers or of tensors.

        ``known`` has numbers wherever the host knows them: it tells which terms are left out.
        """
        if self._steps_in_pieces(bucket):
            step_in_pieces(bucket)
            return
        dtype = bucket.key.format.compute
        grads, params, exp_avgs, *second_moments = (
            [load(tensor, dtype) for tensor in tensors]
            for tensors in (bucket.grads, bucket.params, *bucket.elementwise_buffers)
        )
        grads = list(torch._foreach_mul(grads, [row.grad_factor for row in rows]))
        decayed = [i for i, row in enumerate(known) if row.coupled_decay != 0]
        if decayed:
            terms = torch._foreach_mul(
                [params[i] for i in decayed], [rows[i].coupled_decay for i in decayed]
            )
            torch._foreach_add_([grads[i] for i in decayed], terms)
        params = list(torch._foreach_mul(params, [row.decay_factor for row in rows]))

        steps = torch._foreach_sub(grads, exp_avgs)
        torch._foreach_mul_(steps, [row.one_minus_beta1 for row in rows])
        torch._foreach_add_(exp_avgs, steps)

        self._update(bucket.key.second_moment, second_moments, grads, rows)
        denominators = [rounded_sqrt(v) for v in second_moments[-1]]
        # By tensors: eager CUDA divides by a number by multiplying by its reciprocal.
        divisors = [row.bias2_sqrt for row in rows]
        if bucket.device_scalars is None:
            table = torch.tensor(divisors, dtype=dtype, device="cpu").to(bucket.key.device)
            divisors = list(table.unbind())
        torch._foreach_div_(denominators, divisors)
        torch._foreach_add_(denominators, [row.eps for row in rows])

        quotients = list(torch._foreach_div(exp_avgs, denominators))
        for i, (m, d) in enumerate(zip(exp_avgs, denominators, strict=True)):
            # Gradient and moments all zero with eps=0: the parameter stays.
            quotients[i] = torch.where((m == 0) & (d == 0), 0.0, quotients[i])
        torch._foreach_mul_(quotients, [row.step_size for row in rows])
        torch._foreach_sub_(params, quotients)

        for i, row in enumerate(known):
            if _is_bounded(row):
                lower, upper = (
                    torch.as_tensor(bound, dtype=dtype, device=bucket.key.device)
                    for bound in (rows[i].lower, rows[i].upper)
                )
                p = params[i]
                params[i] = torch.where(p < lower, lower, torch.where(p > upper, upper, p))
        targets = [bucket.params, *bucket.elementwise_buffers]
        for stored, values in zip(targets, (params, exp_avgs, *second_moments), strict=True):
            store_all(stored, values)

    @staticmethod
    def _steps_in_pieces(bucket: Bucket) -> bool:
        return bucket.key.device.type == "cpu" and bucket.device_scalars is None

    @staticmethod
    def _update(
        second_moment: SecondMoment,
        held: Sequence[list[Tensor]],
        grads: Sequence[Tensor],
        rows: Sequence[StepScalars],
    ) -> None:
        """Update the second moments and, if there are any, their maxima in place."""
        exp_avg_sqs, *maxima = held
        squares = torch._foreach_mul(grads, grads)
        one_minus_beta2 = [row.one_minus_beta2 for row in rows]
        if second_moment is SecondMoment.MONOTONE:
            grown = torch._foreach_sub(squares, exp_avg_sqs)
            torch._foreach_mul_(grown, one_minus_beta2)
            torch._foreach_add_(grown, exp_avg_sqs)
            moved = [
                torch.where(g2 > v, new, v)
                for g2, v, new in zip(squares, exp_avg_sqs, grown, strict=True)
            ]
        else:
            moved = list(torch._foreach_mul(exp_avg_sqs, [row.beta2 for row in rows]))
            torch._foreach_add_(moved, torch._foreach_mul(squares, one_minus_beta2))
        torch._foreach_copy_(exp_avg_sqs, moved)
        for largest in maxima:
            larger = [torch.where(v > w, v, w) for v, w in zip(moved, largest, strict=True)]
            torch._foreach_copy_(largest, larger)


def _is_bounded(known: StepScalars) -> bool:
    # Where the learning rate is a tensor, so are the bounds: there are none if it is 0.
    if isinstance(known.lower, Tensor):
        return True
    return known.lower != -math.inf or known.upper != math.inf
