"""Steps by ``foreach`` that find everything as the last checked one left it.

What a check comes to depends on the options that select code, on which tensors there are and on
how each lies in memory. Reading all of that again, column by column, is much cheaper than the
checks themselves, and whatever differs is checked anew.
"""

from __future__ import annotations

import math
import operator
from bisect import bisect_left
from collections.abc import MutableMapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ..backends import Backend
from ..core.bucket import Bucket
from ..core.buffers import BUFFERS
from ..core.scalars import StepOptions, derive_step_scalars
from .entry import Entry
from .options import GroupOptions

__all__ = ["Found", "LastStep"]

# All but what the scalars of a step are derived from.
_selects_code = attrgetter(*(n for n in GroupOptions._fields if n not in StepOptions._fields))
# What a step without row sets writes of a state, which may hold anything else besides.
_KEYS = ("step", *(buffer.key for buffer in BUFFERS if buffer.shape == "parameter"))
_LAYOUT = (
    attrgetter("dtype"),
    attrgetter("shape"),
    attrgetter("requires_grad"),
    Tensor.stride,
    Tensor.storage_offset,
    Tensor.is_neg,
    Tensor.is_inference,
    lambda tensor: tensor.untyped_storage().nbytes(),
)


class Found(NamedTuple):
    """What an unchanged step works on."""

    grads: list[Tensor]
    counts: list[float]
    """Steps that each parameter has taken."""


class LastStep:
    """The last checked step: buckets to step again, and what has to be unchanged for that."""

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        options: Sequence[GroupOptions],
        entries: Sequence[Entry],
        state: MutableMapping[Tensor, dict[str, Any]],
        buckets: Sequence[tuple[Backend, Bucket]],
        bucket_of: Sequence[Bucket],
    ) -> None:
        """Keep what :meth:`is_repeatable` says can be repeated, without the gradients."""
        self._kinds = list(map(_selects_code, options))
        self._params, grads, self._group_of = _with_gradients(groups)
        self._states = [state[param] for param in self._params]
        self._held = _items(self._states)
        self._written = [*self._params, *(held for held in self._held if held is not None)]
        self._written_layout = _layout(self._written)
        self._grads_layout = _layout(grads)
        self._addresses = list(map(Tensor.data_ptr, self._written))
        spans = sorted(
            (begin, begin + tensor.numel() * tensor.element_size())
            for begin, tensor in zip(self._addresses, self._written, strict=True)
            if tensor.numel() > 0
        )
        self._begins, self._ends = map(list, zip(*spans, strict=True)) if spans else ([], [])
        self._bounds = [entry.bounds for entry in entries]
        self.steps = [held["step"] for held in self._states]
        self.buckets = [
            (backend, replace(bucket, grads=[], scalars=[], rows=[])) for backend, bucket in buckets
        ]
        index = {id(bucket): i for i, (_, bucket) in enumerate(buckets)}
        self._bucket_of = [index[id(bucket)] for bucket in bucket_of]

    @staticmethod
    def is_repeatable(entries: Sequence[Entry]) -> bool:
        """Whether ``foreach`` steps plain dense tensors on the CPU there.

        They are known to have been stepped in place, once each. ``reference``, by which the others
        are proven, keeps nothing.
        """
        return bool(entries) and all(
            entry.backend.name == "foreach"
            and entry.key.device.type == "cpu"
            and not entry.key.device_scalars
            and entry.coupled is None
            and not entry.param.is_complex()
            and type(entry.owner) in _ORDINARY
            and type(entry.grad) in _ORDINARY
            for entry in entries
        )

    def find(
        self,
        groups: Sequence[dict[str, Any]],
        options: Sequence[GroupOptions],
        state: MutableMapping[Tensor, dict[str, Any]],
    ) -> Found | None:
        """Return the gradients and counts of an unchanged step; None where anything differs."""
        if list(map(_selects_code, options)) != self._kinds:
            return None
        params, grads, group_of = _with_gradients(groups)
        if group_of != self._group_of or not _are_same(params, self._params):
            return None
        if not _are_same(list(map(state.get, params)), self._states):
            return None
        if not _are_same(_items(self._states), self._held):
            return None
        written_layout = _layout(self._written)
        if written_layout is None or written_layout != self._written_layout:
            return None
        grads_layout = _layout(grads)
        if grads_layout is None or grads_layout != self._grads_layout:
            return None
        if list(map(Tensor.data_ptr, self._written)) != self._addresses or self._touch(grads):
            return None
        counts = list(map(Tensor.item, self.steps))
        if not all(0 <= count < math.inf for count in counts):
            return None
        return Found(grads, counts)

    def bucketed(
        self, found: Found, options: Sequence[GroupOptions], factor: float | Tensor
    ) -> list[tuple[Backend, Bucket]]:
        """Return the buckets of an unchanged step, with the scalars that ``options`` give."""
        buckets = self.with_gradients(found)
        rows: dict[Any, int] = {}
        indices: list[dict[Any, int]] = [{} for _ in buckets]
        for place, group, bounds, count in zip(
            self._bucket_of, self._group_of, self._bounds, found.counts, strict=True
        ):
            bucket = buckets[place][1]
            key = (place, group, bounds, count)
            if key not in rows:
                step_options = options[group].step_options(*bounds).on_host()
                scalars = derive_step_scalars(int(count) + 1, step_options, factor)
                rows[key] = indices[place].setdefault(scalars, len(bucket.scalars))
                if rows[key] == len(bucket.scalars):
                    bucket.scalars.append(scalars)
            bucket.rows.append(rows[key])
        return buckets

    def with_gradients(self, found: Found) -> list[tuple[Backend, Bucket]]:
        """Return the buckets of an unchanged step, without scalars."""
        buckets = [
            (backend, replace(bucket, grads=[], scalars=[], rows=[]))
            for backend, bucket in self.buckets
        ]
        for place, grad in zip(self._bucket_of, found.grads, strict=True):
            buckets[place][1].grads.append(grad)
        return buckets

    def _touch(self, grads: Sequence[Tensor]) -> bool:
        """Whether a gradient lies in memory that the step writes."""
        for grad in grads:
            begin = grad.data_ptr()
            index = bisect_left(self._begins, begin + grad.numel() * grad.element_size())
            if index > 0 and self._ends[index - 1] > begin:
                return True
        return False


_ORDINARY = (Tensor, Parameter)


def _with_gradients(
    groups: Sequence[dict[str, Any]],
) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Return the parameters that have gradients, these, and the index of each one's group."""
    found = [
        (param, grad, g)
        for g, group in enumerate(groups)
        for param in group["params"]
        if (grad := param.grad) is not None
    ]
    params, grads, group_of = map(list, zip(*found, strict=True)) if found else ([], [], [])
    return params, grads, group_of


def _items(states: Sequence[dict[str, Any]]) -> list[Any]:
    """Return what the step writes of states, which may hold more; None where it is gone."""
    return [held.get(key) for held in states for key in _KEYS]


def _are_same(first: Sequence[Any], second: Sequence[Any]) -> bool:
    return len(first) == len(second) and all(map(operator.is_, first, second))


def _layout(tensors: Sequence[Tensor]) -> list[list[Any]] | None:
    """Return how tensors lie in memory, a list a property; None if any is not a plain CPU one."""
    kinds = set(map(type, tensors))
    if not kinds.issubset(_ORDINARY):
        return None
    places = {*map(attrgetter("layout"), tensors), *map(attrgetter("device"), tensors)}
    if not places.issubset((torch.strided, torch.device("cpu"))):
        return None
    return [list(map(read, tensors)) for read in _LAYOUT]
