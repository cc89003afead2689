"""What the optimizer asks of a backend, and what the eager ones answer alike."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..core.bucket import Bucket, BucketKey
from ..core.norm import squared_norm
from ..core.storage import FORMATS

__all__ = ["Backend", "EagerBackend"]


class Backend(Protocol):
    """What the optimizer asks of a backend."""

    name: str
    device_types: tuple[str, ...] | None
    """Types of the devices it is made for; None for any."""

    def unavailable(self, device: torch.device) -> str | None:
        """Why nothing on ``device`` can be stepped here, with the remedy; None if it can."""

    def unsupported(self, key: BucketKey) -> str | None:
        """Why this kind of bucket cannot be stepped, with the remedy; None if it can."""

    def squared_norm(self, bucket: Bucket) -> Tensor:
        """Return the sum of squares of the bucket's gradients, of which alone it has any yet.

        A float64 scalar on the bucket's device, added in the order of
        :mod:`adamal_kernels.core.norm`.
        """

    def watched_elements(self, key: BucketKey) -> int | None:
        """Return how many elements a watched step keeps a record of; None: all of a tensor."""

    def step(self, bucket: Bucket) -> None:
        """Step the bucket's parameters and moments in place, and its records if it has any."""


class EagerBackend:
    """A backend made of torch's operators, for any device."""

    device_types = None

    def unavailable(self, device: torch.device) -> str | None:
        """See :class:`adamal_kernels.backends.Backend`."""
        return None

    def unsupported(self, key: BucketKey) -> str | None:
        """See :class:`adamal_kernels.backends.Backend`."""
        return None if key.format in FORMATS else f"{key.format} is not in FORMATS"

    def squared_norm(self, bucket: Bucket) -> Tensor:
        """See :class:`adamal_kernels.backends.Backend`."""
        return squared_norm(bucket.grads, bucket.key.format.compute)

    def watched_elements(self, key: BucketKey) -> int | None:
        """See :class:`adamal_kernels.backends.Backend`."""
        return None
