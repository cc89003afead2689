"""Formats that round what they store: no option asks for one yet, eager backends step them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.device_kernels import OPTIONS
from helpers.support import same_bits
from torch import Tensor

from adamal_kernels.backends.eager.foreach import ForeachBackend
from adamal_kernels.backends.eager.reference import ReferenceBackend
from adamal_kernels.core.bucket import Bucket, BucketKey
from adamal_kernels.core.buffers import SecondMoment
from adamal_kernels.core.rounding import rounded_sqrt
from adamal_kernels.core.scalars import derive_step_scalars
from adamal_kernels.core.stats import WatchRecords, unpacked
from adamal_kernels.core.storage import Format

CPU = torch.device("cpu")
WIDE = Format(torch.float32, torch.float32)
ROUNDING = Format(torch.float32, torch.float32, torch.bfloat16, torch.float16)
STEPS = 4
# One that the CPU's pieces take by itself, and some that they pack.
SIZES = (40_000, 3, 17)


class ByLists(ForeachBackend):
    """As on devices other than CPUs."""

    @staticmethod
    def _steps_in_pieces(bucket: Bucket) -> bool:
        return False


def new_bucket(format: Format, second_moment: SecondMoment) -> Bucket:
    """Return parameters with moments of zeros, and records."""
    generator = torch.Generator().manual_seed(1)
    bucket = Bucket(BucketKey(CPU, format, second_moment))
    bucket.params = [torch.randn(size, generator=generator) for size in SIZES]
    for key, dtype in (("exp_avg", format.exp_avg), ("exp_avg_sq", format.exp_avg_sq)):
        bucket.buffers[key] = [torch.zeros(size, dtype=dtype) for size in SIZES]
    if second_moment is SecondMoment.AMSGRAD:
        bucket.buffers["max_exp_avg_sq"] = [
            torch.zeros(size, dtype=format.exp_avg_sq) for size in SIZES
        ]
    bucket.rows = [0] * len(SIZES)
    return bucket


def prepare(bucket: Bucket, step: int) -> None:
    """Give the bucket the gradients and scalars of a step."""
    generator = torch.Generator().manual_seed(10 + step)
    bucket.grads = [torch.randn(size, generator=generator) / step for size in SIZES]
    bucket.scalars = [derive_step_scalars(step, OPTIONS)]


def stored(bucket: Bucket) -> list[Tensor]:
    """Return all that a step writes, but for records."""
    return [*bucket.params, *(tensor for held in bucket.elementwise_buffers for tensor in held)]


def in_place_of(wide: Bucket, narrow: Bucket) -> None:
    """Store a bucket's tensors into those of another format, or load them."""
    for target, source in zip(stored(wide), stored(narrow), strict=True):
        target.copy_(source)


@pytest.mark.parametrize("second_moment", SecondMoment, ids=lambda kind: kind.name.lower())
@pytest.mark.parametrize("backend", [ReferenceBackend, ForeachBackend, ByLists])
def test_steps_compute_wide_and_store_narrow(
    backend: Callable[[], ReferenceBackend | ForeachBackend], second_moment: SecondMoment
) -> None:
    """Each step is that of the wide format, from what was stored, whose result is then rounded."""
    narrow, wide = (new_bucket(format, second_moment) for format in (ROUNDING, WIDE))
    for step in range(1, STEPS + 1):
        in_place_of(wide, narrow)
        for bucket in (narrow, wide):
            prepare(bucket, step)
        ReferenceBackend().step(wide)
        backend().step(narrow)
        for found, expected in zip(stored(narrow), stored(wide), strict=True):
            assert same_bits(found, expected.to(found.dtype))
    rounded = zip(stored(narrow), stored(wide), strict=True)
    assert any((found != expected).any() for found, expected in rounded)


@pytest.mark.parametrize("second_moment", SecondMoment, ids=lambda kind: kind.name.lower())
@pytest.mark.parametrize("backend", [ReferenceBackend, ForeachBackend, ByLists])
def test_records_are_of_what_is_stored(
    backend: Callable[[], ReferenceBackend | ForeachBackend], second_moment: SecondMoment
) -> None:
    """A second moment that grew by less than it is rounded by has not grown."""
    bucket = new_bucket(ROUNDING, second_moment)
    owner = backend()
    bucket.records = WatchRecords().of_bucket(bucket.params, SIZES, owner, bucket.key)
    for step in range(1, STEPS + 1):
        prepare(bucket, step)
        before = [tensor.clone() for tensor in bucket.divisors]
        owner.step(bucket)
        scalars = torch.tensor(bucket.scalars[0], dtype=torch.float32)
        bias2_sqrt, eps = scalars[4], scalars[5]
        for record, old, new in zip(bucket.records, before, bucket.divisors, strict=True):
            found = unpacked(record)
            assert found.grown.item() == (new > old).sum()
            largest = rounded_sqrt(new.max().float()) / bias2_sqrt + eps
            assert found.largest_denominator.item() == largest.item()
