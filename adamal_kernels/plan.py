"""From param groups to buckets: every parameter is checked before any is changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import FUSED, Backend, pick
from .backends.native import NativeBackend
from .bucket import Bucket, BucketKey, SecondMoment
from .distributed import (
    check_sharded_gradient,
    check_sharded_parameter,
    check_sharded_state,
    gradient_part,
    has_own_placements,
    is_sharded,
    local_part,
    moment_like,
    redistributed_part,
)
from .dtypes import DTYPE_PAIRS, DtypePair, compute_dtype
from .hyperparameters import StepScalars
from .layout import empty_dense_like, has_memory, is_dense, overlapping_pair, same_layout
from .options import GroupOptions
from .steady_state import Binding, bind

__all__ = ["Plan", "check_parameter", "new_state", "real_dtype"]

MOMENTS = ("exp_avg", "exp_avg_sq")
MAX_MOMENT = "max_exp_avg_sq"


class _Entry(NamedTuple):
    """A parameter with a gradient, checked and not yet touched."""

    owner: Tensor
    """Whose state is stepped."""
    param: Tensor
    """What is stepped: this process's part of a DTensor, else the parameter itself."""
    grad: Tensor
    """Its gradient, or the part of it that this process has."""
    is_misplaced: bool
    """Whether the gradient has to be redistributed before it is this part's."""
    options: GroupOptions
    bounds: tuple[float, float]
    key: BucketKey
    backend: Backend
    where: str


@dataclass(slots=True)
class _WriteBack:
    """A dense copy that a backend steps, and the tensor its values go back to."""

    source: Tensor
    dense: Tensor


class Plan:
    """Steps an optimizer's parameters: checks them, buckets them, hands them to backends.

    A step that finds everything as the last one left it is C++'s alone
    (:mod:`adamal_kernels.steady_state`), where all backends in use are native ones.
    """

    def __init__(self) -> None:
        """Make a plan with nothing bound."""
        self._workspaces: dict[tuple[str, BucketKey], dict[str, Any]] = {}
        self._steady_state: Any | None = None
        self.backends_used: tuple[str, ...] = ()
        """Names of the backends of the last step that was checked."""

    def step(
        self,
        param_groups: list[dict[str, Any]],
        state: MutableMapping[Tensor, dict[str, Any]],
        read_options: Callable[[dict[str, Any]], GroupOptions],
    ) -> None:
        """Step every parameter that has a gradient.

        Args:
            param_groups: the optimizer's.
            state: the optimizer's; entries are made for parameters seen the first time.
            read_options: checks a group and returns its options.

        Raises:
            RuntimeError, TypeError, ValueError, NotImplementedError: an option, a gradient, a
                state tensor or a backend cannot be used; nothing has been changed then.
        """
        if self._steady_state is not None:
            if self._steady_state.step(param_groups, state):
                return
            self._steady_state = None
        # Out of inference mode, so that new state is made of ordinary tensors.
        with torch.inference_mode(False), torch.no_grad():
            self._checked_step(param_groups, state, read_options)

    def _checked_step(
        self,
        param_groups: list[dict[str, Any]],
        state: MutableMapping[Tensor, dict[str, Any]],
        read_options: Callable[[dict[str, Any]], GroupOptions],
    ) -> None:
        options = [read_options(group) for group in param_groups]
        entries = [
            _check_entry(param, options[g], f"params[{i}] of group {g}")
            for g, group in enumerate(param_groups)
            for i, param in enumerate(group["params"])
            if param.grad is not None
        ]
        for entry in entries:
            if held := state.get(entry.owner):
                _check_state(entry, held)
        _check_overlaps(entries, state)
        # Collectives, in the order of the parameters: nothing before them differs in a way that
        # would keep some processes from taking part.
        entries = [
            entry._replace(grad=redistributed_part(entry.owner, entry.owner.grad))
            if entry.is_misplaced
            else entry
            for entry in entries
        ]
        staged = self._step_entries(entries, state)
        if not staged:
            self._steady_state = self._bind(param_groups, options, state, entries)

    def _step_entries(
        self, entries: Sequence[_Entry], state: MutableMapping[Tensor, dict[str, Any]]
    ) -> bool:
        """Step checked entries; return whether any tensor had to be copied to be stepped."""
        buckets: dict[tuple[str, BucketKey], tuple[Backend, Bucket]] = {}
        row_indices: dict[tuple[str, BucketKey], dict[StepScalars, int]] = {}
        write_backs: list[_WriteBack] = []
        steps = []
        staged = False
        for entry in entries:
            held = _state_of(entry, state)
            steps.append(held["step"])
            place = (entry.backend.name, entry.key)
            if place not in buckets:
                workspace = self._workspaces.setdefault(place, {})
                buckets[place] = (entry.backend, Bucket(entry.key, workspace=workspace))
                row_indices[place] = {}
            bucket = buckets[place][1]
            scalars = entry.options.scalars(int(held["step"].item()) + 1, *entry.bounds)
            indices = row_indices[place]
            if scalars not in indices:
                indices[scalars] = len(bucket.scalars)
                bucket.scalars.append(scalars)
            bucket.rows.append(indices[scalars])
            staged |= _append_tensors(bucket, entry, held, write_backs)

        for backend, bucket in buckets.values():
            backend.step(bucket)
            if backend.name in FUSED:
                # Written by address: autograd has to be told, to find what it saved changed.
                torch.autograd.graph.increment_version(bucket.params)
        if owners := [entry.owner for entry in entries if entry.owner is not entry.param]:
            torch.autograd.graph.increment_version(owners)
        for write_back in write_backs:
            write_back.source.copy_(write_back.dense)
        if steps:
            torch._foreach_add_(steps, 1)
        if buckets:
            self.backends_used = tuple(sorted({name for name, _ in buckets}))
        return staged

    @staticmethod
    def _bind(
        param_groups: list[dict[str, Any]],
        options: Sequence[GroupOptions],
        state: MutableMapping[Tensor, dict[str, Any]],
        entries: Sequence[_Entry],
    ) -> Any | None:
        """Bind what was just stepped, and parameters with state that had no gradient."""
        by_param = {entry.owner: entry for entry in entries}
        bindings = {}
        for group, group_options in zip(param_groups, options, strict=True):
            for param in group["params"]:
                if not state.get(param):
                    continue
                entry = by_param.get(param)
                key = entry.key if entry else _key_without_grad(param, group_options)
                backend = entry.backend if entry else _pick(key, group_options)
                if not isinstance(backend, NativeBackend):
                    return None
                bounds = _bounds(group_options, key.dtypes.param)
                bindings[param] = Binding(backend, key, bounds)
        tensors = [tensor for param in bindings for _, tensor in _named_tensors(param, "", state)]
        if not bindings or overlapping_pair(tensors) is not None:
            return None
        return bind(param_groups, options, state, bindings)


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of a complex type's parts; any other type as it is."""
    return dtype.to_real() if dtype.is_complex else dtype


def check_parameter(param: Tensor, options: GroupOptions, where: str) -> None:
    """Check that ``param`` can be stepped under ``options``, as far as can be told without a grad.

    Raises:
        TypeError: the parameter's type is not supported.
        NotImplementedError: the parameter is a tensor subclass other than DTensor.
        ValueError: the projection holds no number of the parameter's type, or the parameter is a
            DTensor with a Partial placement.
        RuntimeError: the named backend cannot run on the parameter's device.
    """
    _check_is_ordinary(param, where)
    if is_sharded(param):
        check_sharded_parameter(param, where)
    dtype = real_dtype(param.dtype)
    if not any(dtype == pair.param for pair in DTYPE_PAIRS):
        supported = ", ".join(dict.fromkeys(str(pair.param) for pair in DTYPE_PAIRS))
        raise TypeError(
            f"{where} has type {param.dtype}; supported are {supported} and complex types of "
            "those; leave other parameters out of the optimizer or convert them"
        )
    if options.projection is not None:
        options.projection.bounds(dtype)
    _pick(_key_without_grad(param, options), options)


def new_state(param: Tensor, second_moment: SecondMoment) -> dict[str, Any]:
    """Return the state of a parameter that has not been stepped: torch.optim.Adam's keys."""
    keys = (*MOMENTS, MAX_MOMENT) if second_moment is SecondMoment.AMSGRAD else MOMENTS
    held: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32, device="cpu")}
    for key in keys:
        held[key] = moment_like(param, moment_dtype(param))
    return held


def moment_dtype(param: Tensor) -> torch.dtype:
    """Return the type of a parameter's moments: the compute type, complex for complex ones."""
    dtype = compute_dtype(real_dtype(param.dtype))
    return dtype.to_complex() if param.is_complex() else dtype


def _check_is_ordinary(tensor: Tensor, what: str) -> None:
    """Refuse subclasses that answer operators themselves: their own memory is not their value."""
    if is_sharded(tensor):
        tensor, what = local_part(tensor), f"the local tensor of {what}"
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise NotImplementedError(
            f"{what} is a {type(tensor).__name__}; tensor subclasses are not supported yet"
        )


def _check_entry(param: Tensor, options: GroupOptions, where: str) -> _Entry:
    grad = param.grad
    assert grad is not None
    _check_is_ordinary(param, where)
    if not is_sharded(grad):
        _check_is_ordinary(grad, f"the gradient of {where}")
    is_misplaced = False
    if is_sharded(param) or is_sharded(grad):
        check_sharded_gradient(param, grad, where)
        check_sharded_parameter(param, where)
        is_misplaced = not has_own_placements(param, grad)
    if param.is_inference():
        raise RuntimeError(
            f"{where} was made in inference mode and cannot be changed; clone() it outside"
        )
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"the gradient of {where} is sparse ({grad.layout}), which is not supported; use "
            "sparse=False in the embedding, grad.to_dense(), or torch.optim.SparseAdam"
        )
    if grad.shape != param.shape:
        raise RuntimeError(
            f"the gradient of {where} has shape {tuple(grad.shape)}, the parameter "
            f"{tuple(param.shape)}; they must be the same"
        )
    if grad.device != param.device:
        raise RuntimeError(
            f"the gradient of {where} is on {grad.device}, the parameter on {param.device}; "
            "move one of them"
        )
    owner, param, grad = param, local_part(param), gradient_part(grad)
    for tensor, what in ((param, where), (grad, f"the gradient of {where}")):
        if not has_memory(tensor):
            raise RuntimeError(
                f"the storage of {what} holds {tensor.untyped_storage().nbytes()} bytes, too few "
                "for its elements; it has been freed or resized"
            )
    dtypes = DtypePair(real_dtype(param.dtype), real_dtype(grad.dtype))
    if dtypes not in DTYPE_PAIRS or param.is_complex() != grad.is_complex():
        taken = [pair.grad for pair in DTYPE_PAIRS if pair.param == dtypes.param]
        if param.is_complex():
            taken = [param.dtype]
        remedy = (
            f"it may be {', '.join(map(str, taken))}"
            if taken
            else "such parameters are not supported"
        )
        raise TypeError(
            f"the gradient of {where} has type {grad.dtype} for a parameter of {param.dtype}; "
            f"{remedy}"
        )
    key = BucketKey(param.device, dtypes, options.second_moment)
    bounds = _bounds(options, dtypes.param)
    backend = _pick(key, options)
    return _Entry(owner, param, grad, is_misplaced, options, bounds, key, backend, where)


def _key_without_grad(param: Tensor, options: GroupOptions) -> BucketKey:
    """Return the key of a parameter whose gradient is not there to be asked for its type."""
    dtype = real_dtype(param.dtype)
    grad_dtype = real_dtype(getattr(param, "grad_dtype", None) or param.dtype)
    device = local_part(param).device
    return BucketKey(device, DtypePair(dtype, grad_dtype), options.second_moment)


def _pick(key: BucketKey, options: GroupOptions) -> Backend:
    return pick(key, backend=options.backend, fused=options.fused, foreach=options.foreach)


def _bounds(options: GroupOptions, dtype: torch.dtype) -> tuple[float, float]:
    if options.projection is None:
        return -math.inf, math.inf
    return options.projection.bounds(dtype)


def _check_state(entry: _Entry, held: Mapping[str, Any]) -> None:
    """Check state that a user or a checkpoint may have replaced."""
    where = entry.where
    for key in ("step", *MOMENTS):
        if key not in held:
            raise ValueError(
                f"state of {where} has no {key!r}; clear the parameter's state to start it anew"
            )
    step = held["step"]
    if not isinstance(step, Tensor) or step.numel() != 1 or not 0 <= step.item() < math.inf:
        raise ValueError(
            f"state['step'] of {where} must be a tensor of one element, a number finite and >= 0, "
            f"got {step!r}"
        )
    expected = moment_dtype(entry.param)
    for key in (*MOMENTS, MAX_MOMENT):
        if key not in held:
            continue
        tensor = held[key]
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise ValueError(
                f"state[{key!r}] of {where} must be a dense tensor of the parameter's shape "
                f"{tuple(entry.owner.shape)}, got {tensor!r}"
            )
        if tensor.is_inference() or not has_memory(local_part(tensor)):
            raise ValueError(
                f"state[{key!r}] of {where} was made in inference mode, or its storage has been "
                "freed; clear the parameter's state to start it anew"
            )
        if tensor.shape != entry.owner.shape:
            raise ValueError(
                f"state[{key!r}] of {where} must have the parameter's shape "
                f"{tuple(entry.owner.shape)}, got {tuple(tensor.shape)}"
            )
        if is_sharded(entry.owner) or is_sharded(tensor):
            check_sharded_state(entry.owner, tensor, f"state[{key!r}] of {where}")
        same_kind = tensor.is_complex() == expected.is_complex
        if not same_kind or not (tensor.is_complex() or tensor.is_floating_point()):
            raise ValueError(
                f"state[{key!r}] of {where} has type {tensor.dtype}; it must be {expected}"
            )


def _named_tensors(
    param: Tensor, where: str, state: MutableMapping[Tensor, dict[str, Any]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield what a step writes: the parameter and its state, or this process's parts of them."""
    yield where, local_part(param)
    for key, value in (state.get(param) or {}).items():
        if key in ("step", *MOMENTS, MAX_MOMENT):
            yield f"state[{key!r}] of {where}", local_part(value)


def _check_overlaps(
    entries: Sequence[_Entry], state: MutableMapping[Tensor, dict[str, Any]]
) -> None:
    """Tensors that share memory would be written at once, in no fixed order."""
    written = [
        named for entry in entries for named in _named_tensors(entry.owner, entry.where, state)
    ]
    read = [(f"the gradient of {entry.where}", entry.grad) for entry in entries]
    names = [name for name, _ in (*written, *read)]
    pair = overlapping_pair([t for _, t in written], [t for _, t in read])
    if pair is None:
        return
    first, second = (names[i] for i in pair)
    if first == second:
        raise ValueError(
            f"{first} has elements that share memory (strides "
            f"{written[pair[0]][1].stride()}); replace it by its clone()"
        )
    raise ValueError(
        f"{first} and {second} share memory, or their strides do not rule it out; tie weights by "
        "listing one Parameter once, or replace one tensor by its clone()"
    )


def _state_of(entry: _Entry, state: MutableMapping[Tensor, dict[str, Any]]) -> dict[str, Any]:
    """Return the parameter's state, made if missing, moved with the parameter if that moved."""
    param = entry.owner
    held = state[param]
    if not held:
        held.update(new_state(param, entry.key.second_moment))
        return held
    if entry.key.second_moment is SecondMoment.AMSGRAD and MAX_MOMENT not in held:
        # amsgrad was switched on in a running group: the largest v known so far is this one.
        held[MAX_MOMENT] = held["exp_avg_sq"].clone(memory_format=torch.preserve_format)
    for key in (*MOMENTS, MAX_MOMENT):
        if key in held:
            held[key] = held[key].to(device=param.device, dtype=moment_dtype(param))
    step = held["step"]
    if step.device.type != "cpu" or step.dtype != torch.float32 or step.dim() != 0:
        held["step"] = step.to(device="cpu", dtype=torch.float32).reshape(())
    return held


def _append_tensors(
    bucket: Bucket, entry: _Entry, held: dict[str, Any], write_backs: list[_WriteBack]
) -> bool:
    """Append an entry's tensors, dense, in one memory order, complex ones as pairs of reals.

    Returns whether any of them had to be copied for that.
    """
    copies_before = len(write_backs)
    param = entry.param.detach()
    written = [(param, bucket.params), (local_part(held["exp_avg"]), bucket.exp_avgs)]
    written.append((local_part(held["exp_avg_sq"]), bucket.exp_avg_sqs))
    if bucket.key.second_moment is SecondMoment.AMSGRAD:
        written.append((local_part(held[MAX_MOMENT]), bucket.max_exp_avg_sqs))

    pattern = param if is_dense(param) else empty_dense_like(param, param.dtype)
    for tensor, destination in written:
        dense = _with_layout(tensor, pattern)
        if dense is not tensor:
            write_backs.append(_WriteBack(tensor, dense))
        destination.append(_as_real(dense))
    grad = entry.grad.detach()
    dense_grad = _with_layout(grad, pattern)
    bucket.grads.append(_as_real(dense_grad))
    return dense_grad is not grad or len(write_backs) > copies_before


def _with_layout(tensor: Tensor, pattern: Tensor) -> Tensor:
    """Return ``tensor`` itself if its elements lie as ``pattern``'s do, else a copy that does."""
    if same_layout(tensor, pattern) and not tensor.is_conj() and not tensor.is_neg():
        return tensor
    return torch.empty_strided(
        pattern.size(), pattern.stride(), dtype=tensor.dtype, device=tensor.device
    ).copy_(tensor)


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
