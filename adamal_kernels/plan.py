"""From param groups to buckets: every parameter is checked before any is changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import FUSED, Backend, pick
from .backends.native import NativeBackend
from .bucket import Bucket, BucketKey, DeviceScalars, SecondMoment
from .dtypes import DTYPE_PAIRS, DtypePair, compute_dtype
from .gradient_norm import ordered_sum
from .hyperparameters import StepInputs, derive_step_scalars
from .layout import empty_dense_like, has_memory, is_dense, overlapping_pair, same_layout
from .options import GroupOptions
from .rounding import rounded_sqrt
from .steady_state import Binding, bind

__all__ = ["Plan", "check_parameter", "new_state", "prepare_state", "real_dtype"]

MOMENTS = ("exp_avg", "exp_avg_sq")
MAX_MOMENT = "max_exp_avg_sq"


class _Entry(NamedTuple):
    """A parameter with a gradient, checked and not yet touched."""

    param: Tensor
    grad: Tensor
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
        self.grad_norm: Tensor | None = None
        """Of the last step: the norm of all gradients, unscaled; None if it was not asked for."""
        self.skipped_steps: Tensor | None = None
        """How many steps were skipped, int64; None before the first that could be."""
        self.stepped_apart: set[Tensor] = set()
        """Parameters that another plan steps, unless this one finds a gradient."""

    def step(
        self,
        param_groups: list[dict[str, Any]],
        state: MutableMapping[Tensor, dict[str, Any]],
        read_options: Callable[[dict[str, Any]], GroupOptions],
        inputs: StepInputs,
        *,
        repeats: bool = True,
    ) -> None:
        """Step every parameter that has a gradient.

        Args:
            param_groups: the optimizer's.
            state: the optimizer's; entries are made for parameters seen the first time.
            read_options: checks a group and returns its options.
            inputs: what may scale, clip or skip the step. The norm is found here, if
                ``max_grad_norm`` is finite.
            repeats: whether steps of the same tensors are to be expected.

        Raises:
            RuntimeError, TypeError, ValueError, NotImplementedError: an option, a gradient, a
                state tensor or a backend cannot be used; nothing has been changed then.
        """
        self.grad_norm = None
        if repeats and self._steady_state is not None:
            inputs = inputs._replace(skipped_steps=self.skipped_steps)
            if self._steady_state.step(param_groups, state, *inputs, self._norm_of_sums):
                return
            self._steady_state = None
        options = [read_options(group) for group in param_groups]
        if any(o.differentiable for o in options):
            self._checked_step(param_groups, options, state, inputs, repeats)
            return
        # Out of inference mode, so that new state is made of ordinary tensors.
        with torch.inference_mode(False), torch.no_grad():
            self._checked_step(param_groups, options, state, inputs, repeats)

    def _checked_step(
        self,
        param_groups: list[dict[str, Any]],
        options: Sequence[GroupOptions],
        state: MutableMapping[Tensor, dict[str, Any]],
        inputs: StepInputs,
        repeats: bool,
    ) -> None:
        entries = [
            _check_entry(param, options[g], f"params[{i}] of group {g}", state, inputs)
            for g, group in enumerate(param_groups)
            for i, param in enumerate(group["params"])
            if param.grad is not None
        ]
        for entry in entries:
            if held := state.get(entry.param):
                _check_state(entry, held)
        _check_overlaps(entries, state)
        if self._step_entries(entries, state, inputs) and repeats:
            self._steady_state = self._bind(param_groups, options, state, entries)

    def _step_entries(
        self,
        entries: Sequence[_Entry],
        state: MutableMapping[Tensor, dict[str, Any]],
        inputs: StepInputs,
    ) -> bool:
        """Step checked entries; return whether all were stepped in place, without copies."""
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
        on_device = [key.device_scalars for _, key in buckets]
        if not all(on_device):
            factor, skip = inputs.factor_on_host()
            if skip and not any(on_device):
                if inputs.skipped_steps is not None:
                    inputs.skipped_steps.add_(1)
                return False

        write_backs: list[_WriteBack] = []
        steps = []
        indices: dict[int, dict[Any, int]] = {}
        for entry, bucket in zip(entries, bucket_of, strict=True):
            held = _state_of(entry, state)
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

        for backend, bucket in buckets.values():
            backend.step(bucket)
            if backend.name in FUSED:
                # Written by address: autograd has to be told, to find what it saved changed.
                torch.autograd.graph.increment_version(bucket.params)
        for write_back in write_backs:
            write_back.source.copy_(write_back.dense)
        if steps:
            torch._foreach_add_(steps, 1)
        if buckets:
            self.backends_used = tuple(sorted({name for name, _ in buckets}))
        return in_place and not write_backs

    def _complete(
        self, inputs: StepInputs, buckets: Iterable[tuple[Backend, Bucket]]
    ) -> StepInputs:
        """Add the norm to what is known of the gradients, and the counter of skipped steps."""
        buckets = list(buckets)
        if inputs.max_grad_norm < math.inf:
            # In the order of the plans that are bound later.
            ordered = sorted(buckets, key=lambda entry: repr(entry[1].key))
            sums = [backend.squared_norm(bucket) for backend, bucket in ordered]
            inputs = inputs._replace(grad_norm=self._norm_of_sums(sums, inputs.grad_scale))
        if inputs.may_skip and buckets:
            devices = [b.key.device for _, b in buckets if b.key.device_scalars]
            counts = self.skipped_steps
            if counts is None:
                counts = torch.zeros((), dtype=torch.int64, device="cpu")
            self.skipped_steps = counts.to(devices[0] if devices else "cpu")
            inputs = inputs._replace(skipped_steps=self.skipped_steps)
        return inputs

    def _norm_of_sums(self, sums: Sequence[Tensor], grad_scale: Tensor | None) -> Tensor:
        """Return the unscaled norm on the first device, from each bucket's sum of squares."""
        norm = rounded_sqrt(ordered_sum(sums))
        if grad_scale is not None:
            scale = grad_scale.detach().double().reshape(()).to(norm.device, non_blocking=True)
            norm = norm * scale.reciprocal()
        self.grad_norm = norm
        return norm

    def _bind(
        self,
        param_groups: list[dict[str, Any]],
        options: Sequence[GroupOptions],
        state: MutableMapping[Tensor, dict[str, Any]],
        entries: Sequence[_Entry],
    ) -> Any | None:
        """Bind what was just stepped, and parameters with state that had no gradient."""
        by_param = {entry.param: entry for entry in entries}
        bindings = {}
        for group, group_options in zip(param_groups, options, strict=True):
            for param in group["params"]:
                entry = by_param.get(param)
                if not state.get(param) or (entry is None and param in self.stepped_apart):
                    continue
                key = entry.key if entry else _key_without_grad(param, group_options, state[param])
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
        NotImplementedError: the parameter is a tensor subclass.
        ValueError: the projection holds no number of the parameter's type.
        RuntimeError: the named backend cannot run on the parameter's device.
    """
    _check_is_ordinary(param, where)
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


def new_state(param: Tensor, second_moment: SecondMoment, step_device: Any) -> dict[str, Any]:
    """Return the state of a parameter that has not been stepped: torch.optim.Adam's keys."""
    keys = (*MOMENTS, MAX_MOMENT) if second_moment is SecondMoment.AMSGRAD else MOMENTS
    held: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32, device=step_device)}
    for key in keys:
        held[key] = empty_dense_like(param, moment_dtype(param)).zero_()
    return held


def prepare_state(
    param: Tensor,
    options: GroupOptions,
    where: str,
    state: MutableMapping[Tensor, dict[str, Any]],
    inputs: StepInputs,
) -> None:
    """Make, or move and cast, a parameter's state as the next step would.

    Raises:
        RuntimeError, TypeError, ValueError, NotImplementedError: the parameter, its state or a
            backend cannot be used.
    """
    check_parameter(param, options, where)
    _check_is_writable(param, where)
    key = _key_without_grad(param, options, state.get(param), inputs)
    entry = _Entry(
        param, param, options, _bounds(options, key.dtypes.param), key, _pick(key, options), where
    )
    if held := state.get(param):
        _check_state(entry, held)
    _state_of(entry, state)


def moment_dtype(param: Tensor) -> torch.dtype:
    """Return the type of a parameter's moments: the compute type, complex for complex ones."""
    dtype = compute_dtype(real_dtype(param.dtype))
    return dtype.to_complex() if param.is_complex() else dtype


def _check_is_ordinary(tensor: Tensor, what: str) -> None:
    """Refuse subclasses that answer operators themselves: their own memory is not their value."""
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise NotImplementedError(
            f"{what} is a {type(tensor).__name__}; tensor subclasses are not supported yet"
        )


def _check_is_writable(param: Tensor, where: str) -> None:
    if param.is_inference():
        raise RuntimeError(
            f"{where} was made in inference mode and cannot be changed; clone() it outside"
        )
    if param.is_meta:
        raise RuntimeError(
            f"{where} is on meta and holds no values; give the model memory (to_empty, then load "
            "or initialise it) and the optimizer its parameters"
        )


def _check_entry(
    param: Tensor,
    options: GroupOptions,
    where: str,
    state: MutableMapping[Tensor, dict[str, Any]],
    inputs: StepInputs,
) -> _Entry:
    grad = param.grad
    assert grad is not None
    _check_is_ordinary(param, where)
    _check_is_ordinary(grad, f"the gradient of {where}")
    _check_is_writable(param, where)
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
    on_device = _derives_on_device(param, options, state.get(param), inputs)
    key = BucketKey(param.device, dtypes, options.second_moment, on_device)
    bounds = _bounds(options, dtypes.param)
    return _Entry(param, grad, options, bounds, key, _pick(key, options), where)


def _append_scalars(
    bucket: Bucket,
    entry: _Entry,
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
    bucket: Bucket, source: DeviceScalars, entry: _Entry, step: Tensor, table: dict[Any, int]
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


def _key_without_grad(
    param: Tensor,
    options: GroupOptions,
    held: Mapping[str, Any] | None = None,
    inputs: StepInputs | None = None,
) -> BucketKey:
    """Return the key of a parameter whose gradient is not there to be asked for its type."""
    dtype = real_dtype(param.dtype)
    grad_dtype = real_dtype(getattr(param, "grad_dtype", None) or param.dtype)
    on_device = _derives_on_device(param, options, held, inputs or StepInputs())
    pair = DtypePair(dtype, grad_dtype)
    return BucketKey(param.device, pair, options.second_moment, on_device)


def _derives_on_device(
    param: Tensor, options: GroupOptions, held: Mapping[str, Any] | None, inputs: StepInputs
) -> bool:
    """Whether the step's scalars are the device's to derive: where the host would have to wait."""
    if options.capturable or options.differentiable:
        return True
    if param.device.type == "cpu":
        return False
    step = (held or {}).get("step")
    return (
        inputs.grad_scale is not None
        or inputs.may_skip
        or options.has_tensor_on(param.device)
        # Once there, the count stays: to read it would be to wait for it.
        or (isinstance(step, Tensor) and step.device == param.device)
    )


def _pick(key: BucketKey, options: GroupOptions) -> Backend:
    return pick(
        key,
        backend=options.backend,
        fused=options.fused,
        foreach=options.foreach,
        differentiable=options.differentiable,
    )


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
    is_one_number = isinstance(step, Tensor) and step.numel() == 1 and not step.is_meta
    # A count on the device is not read: that would be to wait for it.
    if not is_one_number or (step.device.type == "cpu" and not 0 <= step.item() < math.inf):
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
                f"{tuple(entry.param.shape)}, got {tensor!r}"
            )
        if tensor.is_inference() or not has_memory(tensor):
            raise ValueError(
                f"state[{key!r}] of {where} was made in inference mode, or its storage has been "
                "freed; clear the parameter's state to start it anew"
            )
        if tensor.shape != entry.param.shape:
            raise ValueError(
                f"state[{key!r}] of {where} must have the parameter's shape "
                f"{tuple(entry.param.shape)}, got {tuple(tensor.shape)}"
            )
        if tensor.device != held["exp_avg"].device:
            raise ValueError(
                f"state[{key!r}] of {where} is on {tensor.device}, state['exp_avg'] on "
                f"{held['exp_avg'].device}; move both to {entry.param.device}, with the parameter"
            )
        if tensor.is_meta:
            raise ValueError(
                f"state[{key!r}] of {where} is on meta and holds no values; clear the parameter's "
                "state to start it anew"
            )
        same_kind = tensor.is_complex() == expected.is_complex
        if not same_kind or not (tensor.is_complex() or tensor.is_floating_point()):
            raise ValueError(
                f"state[{key!r}] of {where} has type {tensor.dtype}; it must be {expected}"
            )


def _named_tensors(
    param: Tensor, where: str, state: MutableMapping[Tensor, dict[str, Any]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield what a step writes: the parameter and its state."""
    yield where, param
    for key, value in (state.get(param) or {}).items():
        if key in ("step", *MOMENTS, MAX_MOMENT):
            yield f"state[{key!r}] of {where}", value


def _check_overlaps(
    entries: Sequence[_Entry], state: MutableMapping[Tensor, dict[str, Any]]
) -> None:
    """Tensors that share memory would be written at once, in no fixed order."""
    written = [
        named for entry in entries for named in _named_tensors(entry.param, entry.where, state)
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
    param = entry.param
    held = state[param]
    step_device = param.device if entry.key.device_scalars else torch.device("cpu")
    if not held:
        held.update(new_state(param, entry.key.second_moment, step_device))
        return held
    if entry.key.second_moment is SecondMoment.AMSGRAD and MAX_MOMENT not in held:
        # amsgrad was switched on in a running group: the largest v known so far is this one.
        held[MAX_MOMENT] = held["exp_avg_sq"].clone(memory_format=torch.preserve_format)
    for key in (*MOMENTS, MAX_MOMENT):
        if key in held:
            held[key] = held[key].to(device=param.device, dtype=moment_dtype(param))
    step = held["step"]
    if step.device != step_device or step.dtype != torch.float32 or step.dim() != 0:
        held["step"] = step.to(device=step_device, dtype=torch.float32).reshape(())
    return held


def _append_gradient(bucket: Bucket, entry: _Entry) -> bool:
    """Append the gradient in the parameter's memory order; return whether it was not copied."""
    grad = _attached(entry.grad, entry)
    dense = _with_layout(grad, _pattern(entry))
    bucket.grads.append(_as_real(dense))
    return dense is grad


def _append_tensors(
    bucket: Bucket, entry: _Entry, held: dict[str, Any], write_backs: list[_WriteBack]
) -> None:
    """Append what the step changes, dense, in one memory order, complex ones as pairs of reals."""
    written = [
        (_attached(entry.param, entry), bucket.params),
        (held["exp_avg"], bucket.exp_avgs),
        (held["exp_avg_sq"], bucket.exp_avg_sqs),
    ]
    if bucket.key.second_moment is SecondMoment.AMSGRAD:
        written.append((held[MAX_MOMENT], bucket.max_exp_avg_sqs))
    pattern = _pattern(entry)
    for tensor, destination in written:
        dense = _with_layout(tensor, pattern)
        if dense is not tensor:
            write_backs.append(_WriteBack(tensor, dense))
        destination.append(_as_real(dense))


def _attached(tensor: Tensor, entry: _Entry) -> Tensor:
    """Return the tensor for a backend: part of the autograd graph only where that is asked for."""
    return tensor if entry.options.differentiable else tensor.detach()


def _pattern(entry: _Entry) -> Tensor:
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
