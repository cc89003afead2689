"""From param groups to buckets: every parameter is checked before any is changed."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends import FUSED, Backend
from ..backends.native import NativeBackend
from ..backends.planned import PlannedBackend
from ..core.bucket import Bucket, BucketKey, DeviceScalars
from ..core.buffers import buffers_of
from ..core.layout import empty_dense_like, is_dense, overlapping_pair, same_layout
from ..core.norm import ordered_sum
from ..core.rounding import rounded_sqrt
from ..core.rows import coupled_rows
from ..core.scalars import StepInputs, derive_step_scalars, move_scalar
from ..core.stats import WatchRecords
from .checks import check_entry, check_overlaps, check_state, resting_entry
from .entry import Entry
from .fast_path import Binding, bind, bound_places
from .options import GroupOptions
from .sharded import (
    FLAT_SHARD,
    is_only_process,
    is_sharded,
    local_part,
    mesh_and_placements,
    redistributed_part,
    reduce_found_inf,
    reduce_squared_norms,
)
from .sharded_rows import Stepped, project_split_rows
from .state import named_tensors, state_of
from .unchanged import LastStep

__all__ = ["Stepper"]


@dataclass(slots=True)
class _WriteBack:
    """A dense copy that a backend steps, and the tensor its values go back to."""

    source: Tensor
    dense: Tensor


class Stepper:
    """Steps an optimizer's parameters: checks them, buckets them, hands them to backends.

    A step that finds everything as the last one left it is C++'s alone
    (:mod:`adamal_kernels.step.fast_path`), where the plans of all backends in use are.
    """

    def __init__(self) -> None:
        """Make a stepper with nothing bound."""
        self._workspaces: dict[tuple[str, BucketKey], dict[str, Any]] = {}
        self._steady_state: Any | None = None
        self._last_step: LastStep | None = None
        self._bound_spreads: list[Any] = []
        self._spreads: list[Any] = []  # of all parameters, whether or not they have gradients
        self._captured: list[Any] = []
        self._records: WatchRecords | None = None
        self.backends_used: tuple[str, ...] = ()
        """Names of the backends of the last step that was checked."""
        self.grad_norm: Tensor | None = None
        """Of the last step: the norm of all gradients, unscaled; None if it was not asked for."""
        self.skipped_steps: Tensor | None = None
        """How many steps were skipped, int64; None before the first that could be."""
        self.stepped_apart: set[Tensor] = set()
        """Parameters that another stepper steps, unless this one finds a gradient."""
        self.max_grad_norm: float | None = None
        """The optimizer's. Here, because wrappers hand this object on, and not what is set."""
        self.grad_norm_group: Any | None = None
        """The process group over which plain parameters are partitioned; None: they are whole."""
        self.lacks_group = False
        """Whether this is a copy, to which no process group goes, of what had one."""

    def take_over(self, other: Stepper) -> None:
        """Take over what was set and counted on the stepper that this one replaces."""
        self.skipped_steps = other.skipped_steps
        self.stepped_apart = other.stepped_apart
        self.max_grad_norm = other.max_grad_norm
        self.grad_norm_group = other.grad_norm_group
        self.lacks_group = other.lacks_group

    def step(
        self,
        param_groups: list[dict[str, Any]],
        state: MutableMapping[Tensor, dict[str, Any]],
        read_options: Callable[[dict[str, Any]], GroupOptions],
        inputs: StepInputs,
        *,
        records: WatchRecords | None = None,
        repeats: bool = True,
        is_captured: bool = False,
    ) -> None:
        """Step every parameter that has a gradient.

        Args:
            param_groups: the optimizer's.
            state: the optimizer's; entries are made for parameters seen the first time.
            read_options: checks a group and returns its options.
            inputs: what may scale, clip or skip the step. The norm is found here, if
                ``max_grad_norm`` is finite.
            records: where the step's statistics are kept; None: it is not watched.
            repeats: whether steps of the same tensors are to be expected.
            is_captured: whether the step is being captured in a CUDA graph. What the graph has
                the addresses of is kept as long as this lives.

        Raises:
            RuntimeError, TypeError, ValueError, NotImplementedError: an option, a gradient, a
                state tensor or a backend cannot be used; nothing has been changed then.
        """
        self.grad_norm = None
        if repeats and records is not self._records:
            self._steady_state = None
        self._records = records
        if inputs.found_inf is not None:
            # A collective: before anything that may differ between processes.
            params = (param for group in param_groups for param in group["params"])
            inputs = inputs._replace(found_inf=reduce_found_inf(inputs.found_inf, params))
        if repeats and self._steady_state is not None:
            if self.skipped_steps is not None:
                inputs = inputs._replace(skipped_steps=self.skipped_steps)
            if self._steady_state.step(param_groups, state, *inputs, self._norm_of_bound):
                if is_captured:
                    self._keep_for_graph(self._steady_state)
                return
            self._steady_state = None
        options = [read_options(group) for group in param_groups]
        if any(o.differentiable for o in options):
            # As torch has it, also in a loop that calls step() under no_grad.
            with torch.enable_grad():
                self._checked_step(param_groups, options, state, inputs, repeats, is_captured)
            return
        # Out of inference mode, so that new state is made of ordinary tensors.
        with torch.inference_mode(False), torch.no_grad():
            self._checked_step(param_groups, options, state, inputs, repeats, is_captured)

    def _keep_for_graph(self, *read_or_written: Any) -> None:
        # A later change of the optimizer makes others of them.
        self._captured.append((*read_or_written, self.grad_norm, self.skipped_steps, self._records))

    def _checked_step(
        self,
        param_groups: list[dict[str, Any]],
        options: Sequence[GroupOptions],
        state: MutableMapping[Tensor, dict[str, Any]],
        inputs: StepInputs,
        repeats: bool,
        is_captured: bool,
    ) -> None:
        self._spreads = list(
            dict.fromkeys(mesh_and_placements(p) for group in param_groups for p in group["params"])
        )
        if repeats and self._step_unchanged(param_groups, options, state, inputs):
            return
        entries = [
            check_entry(param, options[g], f"params[{i}] of group {g}", state, inputs)
            for g, group in enumerate(param_groups)
            for i, param in enumerate(group["params"])
            if param.grad is not None
        ]
        for entry in entries:
            if is_captured:
                _check_can_be_captured(entry)
            if held := state.get(entry.owner):
                check_state(entry, held)
        rounds = _rounds(entries)
        for of_round in rounds:
            check_overlaps(of_round, state)
        # Collectives, in the order of the parameters: nothing before them differs in a way that
        # would keep some processes from taking part.
        rounds = [[_with_own_gradient(entry) for entry in of_round] for of_round in rounds]
        stepped = [self._step_entries(of_round, state, inputs) for of_round in rounds]
        if is_captured:
            self._keep_for_graph([state[entry.owner]["step"] for entry in entries])
        elif repeats and len(stepped) == 1 and stepped[0] is not None:
            self._steady_state = self._bind(param_groups, options, state, rounds[0], stepped[0])

    def _step_unchanged(
        self,
        param_groups: list[dict[str, Any]],
        options: Sequence[GroupOptions],
        state: MutableMapping[Tensor, dict[str, Any]],
        inputs: StepInputs,
    ) -> bool:
        """Step again what the last checked step stepped, if that is unchanged."""
        last, self._last_step = self._last_step, None
        if last is None or self._records is not None:
            return False
        found = last.find(param_groups, options, state)
        if found is None:
            return False
        self._last_step = last
        inputs = self._complete(inputs, last.with_gradients(found))
        factor, skip = inputs.factor_on_host()
        if skip:
            if inputs.skipped_steps is not None:
                inputs.skipped_steps.add_(1)
            return True
        for backend, bucket in last.bucketed(found, options, factor):
            backend.step(bucket)
        _count(last.steps)
        return True

    def _step_entries(
        self,
        entries: Sequence[Entry],
        state: MutableMapping[Tensor, dict[str, Any]],
        inputs: StepInputs,
    ) -> tuple[list[tuple[Backend, Bucket]], list[Bucket]] | None:
        """Step checked entries.

        Returns:
            The buckets and that of each entry, if all were stepped in place, without copies.
        """
        buckets: dict[tuple[str, BucketKey], tuple[Backend, Bucket]] = {}
        bucket_of = []
        in_place = True
        for entry in entries:
            place = (entry.backend.name, entry.key)
            if place not in buckets:
                workspace = self._workspaces.setdefault(place, {})
                buckets[place] = (entry.backend, Bucket(entry.key, workspace=workspace))
            bucket = buckets[place][1]
            bucket_of.append(bucket)
            in_place &= _append_gradient(bucket, entry)

        inputs = self._complete(inputs, buckets.values())
        factor: float | Tensor = 1.0
        if not buckets or not all(key.device_scalars for _, key in buckets):
            factor, skip = inputs.factor_on_host()
            if skip:
                if inputs.skipped_steps is not None:
                    inputs.skipped_steps.add_(1)
                return None

        write_backs: list[_WriteBack] = []
        steps = []
        split_rows: list[Stepped] = []
        indices: dict[int, dict[Any, int]] = {}
        for entry, bucket in zip(entries, bucket_of, strict=True):
            held = state_of(entry, state)
            table = indices.setdefault(id(bucket), {})
            if bucket.key.device_scalars:
                if bucket.device_scalars is None:
                    bucket.device_scalars = DeviceScalars(inputs=inputs.to(bucket.key.device))
                    # The first bucket counts a skipped step, once for all.
                    inputs = inputs._replace(skipped_steps=None)
                _append_options(bucket, bucket.device_scalars, entry, held["step"], table)
            else:
                _append_scalars(bucket, entry, held["step"], factor, table)
                steps.append(held["step"])
            _append_tensors(bucket, entry, held, write_backs)
            if entry.coupled is not None and not bucket.key.coupled:
                index = len(bucket.params) - 1
                split_rows.append(Stepped(entry, bucket, index, held))

        if self._records is not None:
            self._append_records(entries, bucket_of)
        for backend, bucket in buckets.values():
            backend.step(bucket)
        for split in split_rows:
            project_split_rows(split)
        for backend, bucket in buckets.values():
            if backend.name in FUSED:
                # Written by address: autograd has to be told, to find what it saved changed.
                torch.autograd.graph.increment_version(bucket.params)
        if owners := [entry.owner for entry in entries if entry.owner is not entry.param]:
            torch.autograd.graph.increment_version(owners)
        for write_back in write_backs:
            write_back.source.copy_(write_back.dense)
        _count(steps)
        if buckets:
            self.backends_used = tuple(sorted({name for name, _ in buckets}))
        return (list(buckets.values()), bucket_of) if in_place and not write_backs else None

    def _append_records(self, entries: Sequence[Entry], bucket_of: Sequence[Bucket]) -> None:
        """Append the records of each entry to its bucket."""
        assert self._records is not None
        members: dict[int, list[Entry]] = {}
        for entry, bucket in zip(entries, bucket_of, strict=True):
            members.setdefault(id(bucket), []).append(entry)
        for bucket in {id(bucket): bucket for bucket in bucket_of}.values():
            of_bucket = members[id(bucket)]
            bucket.records = self._records.of_bucket(
                [entry.owner for entry in of_bucket],
                [param.numel() for param in bucket.params],
                of_bucket[0].backend,
                bucket.key,
            )

    def _complete(
        self, inputs: StepInputs, buckets: Iterable[tuple[Backend, Bucket]]
    ) -> StepInputs:
        """Add the norm to what is known of the gradients, and the counter of skipped steps."""
        buckets = list(buckets)
        if inputs.max_grad_norm < math.inf:
            # In the order of the plans that are bound later.
            ordered = sorted(buckets, key=lambda entry: repr((entry[0].name, entry[1].key)))
            sums = [backend.squared_norm(bucket) for backend, bucket in ordered]
            spreads = [bucket.key.spread for _, bucket in ordered]
            inputs = inputs._replace(grad_norm=self._norm_of(spreads, sums, inputs.grad_scale))
        # A process without a gradient counts what all those of its group skip.
        if inputs.may_skip and (buckets or self.grad_norm_group is not None):
            devices = [b.key.device for _, b in buckets if b.key.device_scalars]
            counts = self.skipped_steps
            if counts is None:
                counts = torch.zeros((), dtype=torch.int64, device="cpu")
            self.skipped_steps = counts.to(devices[0] if devices else "cpu")
            inputs = inputs._replace(skipped_steps=self.skipped_steps)
        return inputs

    def _norm_of_bound(self, sums: Sequence[Tensor], grad_scale: Tensor | None) -> Tensor:
        """Return the norm from the sum of squares of each plan of the steady state."""
        return self._norm_of(self._bound_spreads, sums, grad_scale)

    def _norm_of(
        self, spreads: Sequence[Any], sums: Sequence[Tensor], grad_scale: Tensor | None
    ) -> Tensor:
        """Return the unscaled norm on the first device, from each bucket's sum of squares.

        Raises:
            RuntimeError: only a process group that is not named would tell of all gradients.
        """
        total = ordered_sum(sums)
        group = self.grad_norm_group
        if group is None:
            self._check_sums_are_whole()
        if group is not None or any(spread is not None for spread in self._spreads):
            # Every process takes part in every sum, whichever gradients it has.
            parts = dict.fromkeys(self._spreads, torch.zeros_like(total))
            for spread, value in zip(spreads, sums, strict=True):
                parts[spread] = parts[spread] + move_scalar(value, total.device)
            total = reduce_squared_norms(parts, group)
        norm = rounded_sqrt(total)
        if grad_scale is not None:
            scale = move_scalar(grad_scale.detach().double().reshape(()), norm.device)
            norm = norm * scale.reciprocal()
        self.grad_norm = norm.detach()
        return norm

    def _check_sums_are_whole(self) -> None:
        """Raise where this process's sums of squares are parts, and those of whom is not known."""
        if self.lacks_group:
            raise RuntimeError(
                "max_grad_norm: this optimizer is a copy, or was pickled, and process groups are "
                "not copied; set optimizer.grad_norm_group to the one over which its parameters "
                "are partitioned, or to None where every process has them whole"
            )
        if FLAT_SHARD in self._spreads and not is_only_process():
            raise RuntimeError(
                "max_grad_norm: parameters are FSDP1's shards, which do not tell of their process "
                "group; set optimizer.grad_norm_group to the one over which FSDP shards them, such "
                "as torch.distributed.group.WORLD, or max_grad_norm to None and call "
                "model.clip_grad_norm_() before the step"
            )

    def _bind(
        self,
        param_groups: list[dict[str, Any]],
        options: Sequence[GroupOptions],
        state: MutableMapping[Tensor, dict[str, Any]],
        entries: Sequence[Entry],
        buckets: tuple[list[tuple[Backend, Bucket]], list[Bucket]],
    ) -> Any | None:
        """Bind what was just stepped, and parameters with state that had no gradient.

        What ``foreach`` stepped is kept in Python instead.

        The step has been taken, and is right, whether or not it can be repeated.
        """
        try:
            if self._records is None and LastStep.is_repeatable(entries):
                self._last_step = LastStep(param_groups, options, entries, state, *buckets)
                return None
            bindings = self._bindings(param_groups, options, state, entries)
            if not bindings:
                return None
            # Parameters at rest are left out if they are in the way: their next gradients are seen,
            # and checked. What was stepped together does not share memory.
            stepped = {entry.owner: bindings[entry.owner] for entry in entries}
            tensors = [t for param in bindings for _, t in named_tensors(param, "", state)]
            attempts = [stepped] if overlapping_pair(tensors) else [bindings, stepped]
            for attempt in attempts:
                self._bound_spreads = [key.spread for _, key in bound_places(attempt)]
                bound = bind(param_groups, options, state, attempt, self._records)
                if bound is not None or len(stepped) == len(attempt):
                    return bound
            return None
        except Exception as error:
            warnings.warn(
                "adamal_kernels: the step was taken, but cannot be repeated without its checks, "
                f"which would be faster: {error!r}",
                RuntimeWarning,
                stacklevel=2,
            )
            return None

    def _bindings(
        self,
        param_groups: list[dict[str, Any]],
        options: Sequence[GroupOptions],
        state: MutableMapping[Tensor, dict[str, Any]],
        entries: Sequence[Entry],
    ) -> dict[Tensor, Binding]:
        """Return how parameters are stepped by address; nothing where one with a gradient is not.

        One without a gradient is left out where it could not be stepped as it is.
        """
        by_param = {entry.owner: entry for entry in entries}
        bindings = {}
        for g, group in enumerate(param_groups):
            for i, param in enumerate(group["params"]):
                entry = by_param.get(param)
                if not state.get(param) or (entry is None and param in self.stepped_apart):
                    continue
                resting = entry is None
                if entry is None:
                    entry = resting_entry(param, options[g], f"params[{i}] of group {g}", state)
                    if entry is None:
                        continue
                if (
                    (is_sharded(param) and entry.coupled is not None)
                    or not isinstance(entry.backend, PlannedBackend)
                    or not entry.backend.has_native_plans
                ):
                    if resting:
                        continue
                    return {}
                rows = None if entry.coupled is None else coupled_rows(param, entry.coupled)
                bindings[param] = Binding(entry.backend, entry.key, entry.bounds, rows)
        return bindings


def _check_can_be_captured(entry: Entry) -> None:
    """Check that a graph would not read what was there for one step only.

    Raises:
        RuntimeError: the backend has tables of the tensors, and they were not bound before.
    """
    if isinstance(entry.backend, NativeBackend):
        raise RuntimeError(
            f"step() is being captured in a CUDA graph, and {entry.where}, or another parameter or "
            "option, is not as the last step left it; take a step outside of the graph, with the "
            "gradients and options to be captured, and then capture. Strided parameters, which "
            "are stepped as copies, can be captured with backend='foreach'"
        )


def _count(steps: Sequence[Tensor]) -> None:
    """Add 1 to each count, all on the CPU."""
    if steps:
        # A tensor: of a number each operator makes one.
        torch._foreach_add_(steps, [torch.ones((), device="cpu")] * len(steps))


def _rounds(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Return the entries in one round: in more, where a parameter is listed more than once.

    torch, which warns of such a list, steps the parameter as often, one step after another.
    """
    rounds: list[list[Entry]] = [[]]
    times: Counter[Tensor] = Counter()
    for entry in entries:
        if times[entry.owner] == len(rounds):
            rounds.append([])
        rounds[times[entry.owner]].append(entry)
        times[entry.owner] += 1
    return rounds


def _with_own_gradient(entry: Entry) -> Entry:
    if not entry.is_misplaced:
        return entry
    return entry._replace(grad=redistributed_part(entry.owner, entry.owner.grad))


def _append_scalars(
    bucket: Bucket,
    entry: Entry,
    step: Tensor,
    factor: float | Tensor,
    table: dict[Any, int],
) -> None:
    """Append an entry's row of scalars, or the index of an equal one."""
    options = entry.options.step_options(*entry.bounds).on_host()
    scalars = derive_step_scalars(int(step.item()) + 1, options, factor)
    if scalars not in table:
        table[scalars] = len(bucket.scalars)
        bucket.scalars.append(scalars)
    bucket.rows.append(table[scalars])


def _append_options(
    bucket: Bucket, source: DeviceScalars, entry: Entry, step: Tensor, table: dict[Any, int]
) -> None:
    """Append what an entry's scalars are derived from on the device, or the index of its equal."""
    # Tensors by identity: their values are the device's to compare.
    key = (entry.bounds, *map(_identity, entry.options))
    if key not in table:
        table[key] = len(source.options)
        options = entry.options.step_options(*entry.bounds)
        source.options.append(options.on_device(bucket.key.device))
    bucket.rows.append(table[key])
    source.steps.append(step)


def _identity(value: Any) -> Any:
    return id(value) if isinstance(value, Tensor) else value


def _append_gradient(bucket: Bucket, entry: Entry) -> bool:
    """Append the gradient in the parameter's memory order; return whether it was not copied."""
    grad = _attached(entry.grad, entry)
    dense = _with_layout(grad, _pattern(entry))
    bucket.grads.append(_as_real(dense))
    return dense is grad


def _append_tensors(
    bucket: Bucket, entry: Entry, held: dict[str, Any], write_backs: list[_WriteBack]
) -> None:
    """Append what the step changes, dense, in one memory order, complex ones as pairs of reals."""
    pattern = _pattern(entry)
    written = [(_attached(entry.param, entry), bucket.params)]
    for buffer in buffers_of(bucket.key.second_moment, bucket.key.coupled):
        tensor, destination = local_part(held[buffer.key]), bucket.buffers[buffer.key]
        if buffer.shape == "rows":
            destination.append(tensor)
        else:
            written.append((tensor, destination))
    if bucket.key.coupled and entry.coupled is not None:
        bucket.sets.append(coupled_rows(pattern, entry.coupled))
    for tensor, destination in written:
        dense = _with_layout(tensor, pattern)
        if dense is not tensor:
            write_backs.append(_WriteBack(tensor, dense))
        destination.append(_as_real(dense))


def _attached(tensor: Tensor, entry: Entry) -> Tensor:
    """Return the tensor for a backend: part of the autograd graph only where that is asked for."""
    return tensor if entry.options.differentiable else tensor.detach()


def _pattern(entry: Entry) -> Tensor:
    """Return a dense tensor whose layout is the step's."""
    param = entry.param.detach()
    return param if is_dense(param) else empty_dense_like(param, param.dtype)


def _with_layout(tensor: Tensor, pattern: Tensor) -> Tensor:
    """Return ``tensor`` itself if its elements lie as ``pattern``'s do, else a copy that does."""
    if same_layout(tensor, pattern) and not tensor.is_conj() and not tensor.is_neg():
        return tensor
    return torch.empty_strided(
        pattern.size(), pattern.stride(), dtype=tensor.dtype, device=tensor.device
    ).copy_(tensor)


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
