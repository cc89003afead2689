"""What the backends share that step by address, through a plan."""

from __future__ import annotations

import functools
from array import array
from typing import Any

from .. import build_info
from ..bucket import Bucket, BucketKey

__all__ = ["PlannedBackend", "why_not_importable"]

# Asked for every parameter that is checked, and the same for as long as the process lives.
why_not_importable = functools.cache(build_info.why_not_importable)


class PlannedBackend:
    """A backend whose plan (``csrc/plan.h``) binds the tensors' addresses and launches."""

    has_native_plans = True
    """Whether :meth:`new_plan` makes plans of the C++ extension, which can repeat their steps."""

    def step(self, bucket: Bucket) -> None:
        """See :class:`adamal_kernels.backends.Backend`."""
        plan = bucket.workspace.get("plan")
        if plan is None:
            plan = bucket.workspace["plan"] = self.new_plan(bucket.key)
        scalars = array("d")
        for row in bucket.scalars:
            scalars.extend(row)
        plan.step(
            bucket.params,
            bucket.grads,
            bucket.exp_avgs,
            bucket.exp_avg_sqs,
            bucket.max_exp_avg_sqs,
            scalars,
            bucket.rows,
        )

    def new_plan(self, key: BucketKey) -> Any:
        """Return an empty plan for buckets of kind ``key``."""
        raise NotImplementedError
