"""What watched steps keep of each parameter until it is read.

A record is the words of :class:`Record`, one after another in an int64 tensor; some of them are
the bits of a float64, which holds values of the compute type as they are. A backend keeps one for
each of a tensor's work items, the elements that it steps together. Counts, least and largest
values are the same in whatever order they are found, and so is what all records come to.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .bucket import BucketKey

__all__ = ["COUNTS", "WORDS", "Record", "Recorder", "WatchRecords", "unpacked"]


class Record(NamedTuple):
    """Statistics of some elements of one parameter; the twin of ``ItemRecord`` in C++."""

    steps: Any = 0
    """Steps watched so far. All that follows is of the last one."""
    steps_since_growth: Any = -1
    """Watched steps since an element's ``v`` grew; -1: none has yet."""
    grown: Any = 0
    """How many elements' ``v`` grew: the one that the denominator is made of."""
    smallest_denominator: Any = math.nan
    """Of ``d``; NaN if any of them is."""
    largest_denominator: Any = math.nan
    least_budget_change: Any = math.nan
    """Least change of ``d / step_size``, or that of another item if less; infinite where no
    element's is a number; NaN where there is none."""
    step_size: Any = math.nan
    budget_scale: Any = math.nan
    """``1 / (bias2_sqrt * step_size)``; NaN for a step with a learning rate of 0."""
    budget_offset: Any = math.nan
    """``eps / step_size``."""


WORDS = len(Record._fields)
COUNTS = 3
"""Words that are integers; the others are float64."""


class Recorder(Protocol):
    """What is asked of a backend to make room for its records."""

    name: str

    def watched_elements(self, key: BucketKey) -> int | None:
        """See :class:`adamal_kernels.backends.Backend`."""


class WatchRecords:
    """The records of all of an optimizer's parameters, made where a step first asks for them."""

    def __init__(self) -> None:
        """Begin without any."""
        self._kept: dict[Tensor, tuple[Any, Tensor]] = {}
        self._owners: Mapping[Tensor, Tensor] = {}

    def of_copies(self, owners: Mapping[Tensor, Tensor]) -> WatchRecords:
        """Return these records for a step of copies; ``owners`` has whose copy each is."""
        shared = WatchRecords()
        shared._kept = self._kept
        shared._owners = owners
        return shared

    def of_bucket(
        self, owners: Iterable[Tensor], numels: Sequence[int], backend: Recorder, key: BucketKey
    ) -> list[Tensor]:
        """Return the records of parameters that ``backend`` steps in a bucket of kind ``key``.

        Those of a parameter begin anew where its backend, type, device or size is another.

        Args:
            owners: the parameters.
            numels: how many real elements of each are stepped here.
            backend: whose work items they are of.
            key: the bucket's.

        Returns:
            For each an int64 tensor ``[item, word]`` on the bucket's device.
        """
        owners = [self._owners.get(owner, owner) for owner in owners]
        kinds = [_kind_of(backend, key, numel) for numel in numels]
        found = [self._kept.get(owner, (None, None)) for owner in owners]
        new = [i for i, kind in enumerate(kinds) if found[i][0] != kind]
        if new:
            item = backend.watched_elements(key)
            counts = [-(-numels[i] // (item or max(numels[i], 1))) for i in new]
            # Neighbours in memory, as the steps that write them are in time.
            slab = _new_records(sum(counts), key.device)
            for i, records in zip(new, slab.split(counts), strict=True):
                self._kept[owners[i]] = (kinds[i], records)
        return [self._kept[owner][1] for owner in owners]

    def would_forget(
        self, owners: Sequence[Tensor], numels: Sequence[int], backend: Recorder, key: BucketKey
    ) -> bool:
        """Whether :meth:`of_bucket` of the same would begin some parameter's statistics anew."""
        for owner, numel in zip(owners, numels, strict=True):
            kind = self._kept.get(self._owners.get(owner, owner), (None, None))[0]
            if kind is not None and kind != _kind_of(backend, key, numel):
                return True
        return False

    def find(self, param: Tensor) -> Tensor | None:
        """Return a parameter's records; None before its first watched step."""
        return self._kept.get(param, (None, None))[1]

    def clear(self) -> None:
        """Begin anew."""
        self._kept.clear()


def _kind_of(backend: Recorder, key: BucketKey, numel: int) -> tuple[Any, ...]:
    return backend.name, key.device, key.format.param, numel


def _new_records(count: int, device: torch.device) -> Tensor:
    record = torch.tensor(Record(), dtype=torch.float64, device="cpu")
    words = torch.cat([record[:COUNTS].to(torch.int64), record[COUNTS:].view(torch.int64)])
    return words.repeat(count, 1).to(device)


def unpacked(records: Tensor) -> Record:
    """Return the columns of records as tensors of the words' own types."""
    counts, values = records[:, :COUNTS], records[:, COUNTS:]
    return Record(*counts.unbind(1), *values.view(torch.float64).unbind(1))
