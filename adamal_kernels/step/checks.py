"""The checks of a step: parameters, gradients and state, before any of them is changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.buffers import REQUIRED_KEYS, check_value, held_buffers
from ..core.layout import has_memory, overlapping_pair
from ..core.rows import coupled_rows
from ..core.scalars import StepInputs
from ..core.storage import FORMATS, real_dtype
from .entry import (
    Entry,
    bounds_of,
    coupled_set,
    key_of,
    key_without_grad,
    pick_backend,
)
from .options import GroupOptions
from .sharded import (
    check_sharded_gradient,
    check_sharded_parameter,
    check_sharded_state,
    gradient_part,
    has_own_placements,
    is_sharded,
    local_part,
)
from .state import is_count, is_shared, named_tensors, state_of

__all__ = [
    "check_entry",
    "check_overlaps",
    "check_parameter",
    "check_state",
    "prepare_state",
    "resting_entry",
]


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
    if not any(dtype == known.param for known in FORMATS):
        supported = ", ".join(dict.fromkeys(str(known.param) for known in FORMATS))
        raise TypeError(
            f"{where} has type {param.dtype}; supported are {supported} and complex types of "
            "those; leave other parameters out of the optimizer or convert them"
        )
    _check_is_real(param, options, where)
    if options.projection is not None:
        options.projection.bounds(dtype)
    _check_rows(param, options, where)
    pick_backend(key_without_grad(param, options), options)


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
    entry = _entry_without_grad(param, options, where, state, inputs)
    if held := state.get(param):
        check_state(entry, held)
    state_of(entry, state)


def _check_is_ordinary(tensor: Tensor, what: str) -> None:
    """Refuse subclasses that answer operators themselves: their own memory is not their value."""
    if is_sharded(tensor):
        tensor, what = local_part(tensor), f"the local tensor of {what}"
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise NotImplementedError(
            f"{what} is a {type(tensor).__name__}; tensor subclasses are not supported yet"
        )


def _check_is_real(param: Tensor, options: GroupOptions, where: str) -> None:
    if options.projection is not None and param.is_complex():
        raise TypeError(
            f"{where} has type {param.dtype}, and {options.projection} holds real numbers only; "
            "put complex parameters into a group with projection=None"
        )


def _check_rows(param: Tensor, options: GroupOptions, where: str) -> None:
    coupled = coupled_set(options)
    if coupled is not None:
        coupled.check_parameter(param, where)
        coupled_rows(local_part(param), coupled)


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


def check_entry(
    param: Tensor,
    options: GroupOptions,
    where: str,
    state: MutableMapping[Tensor, dict[str, Any]],
    inputs: StepInputs,
) -> Entry:
    """Check a parameter and its gradient, and find out how they are stepped.

    Raises:
        RuntimeError, TypeError, ValueError, NotImplementedError: either cannot be stepped; the
            message says which and why.
    """
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
    _check_is_writable(param, where)
    _check_is_real(param, options, where)
    _check_rows(param, options, where)
    if options.differentiable and param.is_leaf and param.requires_grad:
        raise RuntimeError(
            f"{where}: a leaf Variable that requires grad is being used in an in-place operation. "
            "With differentiable=True, step a clone() of it, which is part of the graph"
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
    key = key_of(param, grad.dtype, options, state.get(param), inputs)
    owner, param, grad = param, local_part(param), gradient_part(grad)
    for tensor, what in ((param, where), (grad, f"the gradient of {where}")):
        if not has_memory(tensor):
            raise RuntimeError(
                f"the storage of {what} holds {tensor.untyped_storage().nbytes()} bytes, too few "
                "for its elements; it has been freed or resized"
            )
    if key.format not in FORMATS or param.is_complex() != grad.is_complex():
        taken = [known.grad for known in FORMATS if known.param == key.format.param]
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
    bounds = bounds_of(options, key.format.param)
    backend = pick_backend(key, options)
    return Entry(owner, param, grad, is_misplaced, options, bounds, key, backend, where)


def resting_entry(
    param: Tensor,
    options: GroupOptions,
    where: str,
    state: MutableMapping[Tensor, dict[str, Any]],
) -> Entry | None:
    """Return the entry of a parameter with state and, in this step, without a gradient.

    Returns:
        None where it could not be stepped as it is. What is wrong is said by the step that finds
        a gradient; until then nothing is asked of it.
    """
    try:
        entry = _entry_without_grad(param, options, where, state, StepInputs())
        check_state(entry, state[param])
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return None
    device = param.device if entry.key.device_scalars else torch.device("cpu")
    return entry if is_count(state[param]["step"], device) else None


def _entry_without_grad(
    param: Tensor,
    options: GroupOptions,
    where: str,
    state: MutableMapping[Tensor, dict[str, Any]],
    inputs: StepInputs,
) -> Entry:
    check_parameter(param, options, where)
    _check_is_writable(param, where)
    key = key_without_grad(param, options, state.get(param), inputs)
    return Entry(
        owner=param,
        param=local_part(param),
        grad=param,
        is_misplaced=False,
        options=options,
        bounds=bounds_of(options, key.format.param),
        key=key,
        backend=pick_backend(key, options),
        where=where,
    )


def check_state(entry: Entry, held: Mapping[str, Any]) -> None:
    """Check state that a user or a checkpoint may have replaced."""
    where, param = entry.where, entry.owner
    for key in REQUIRED_KEYS:
        if key not in held:
            raise ValueError(
                f"state of {where} has no {key!r}; clear the parameter's state to start it anew"
            )
    _check_step(held["step"], where)
    for buffer in held_buffers(held):
        # What another set has left is replaced; nothing reads it.
        if buffer.shape == "rows" and entry.coupled is None:
            continue
        tensor, what = held[buffer.key], f"state[{buffer.key!r}] of {where}"
        is_moved = (
            isinstance(tensor, Tensor)
            and buffer.shape == "parameter"
            and tensor.device != held["exp_avg"].device
        )
        if is_moved:
            raise ValueError(
                f"{what} is on {tensor.device}, state['exp_avg'] on {held['exp_avg'].device}; "
                f"move both to {entry.param.device}, with the parameter"
            )
        anew = "delete it" if buffer.shape == "rows" else "clear the parameter's state"
        check_value(buffer, tensor, param, what, f"{anew} to start anew")
        if tensor.is_inference() or not has_memory(local_part(tensor)):
            raise ValueError(
                f"{what} was made in inference mode, or its storage has been freed; {anew} to "
                "start anew"
            )
        if buffer.shape == "rows":
            continue
        if is_sharded(param) or is_sharded(tensor):
            check_sharded_state(param, tensor, what)
        dtype = buffer.dtype(entry.key.format, is_complex=param.is_complex())
        _check_stays_shared(buffer.key, tensor, dtype, where)


def _check_step(step: Any, where: str) -> None:
    is_one_number = (
        isinstance(step, Tensor)
        and step.numel() == 1
        and not (step.is_meta or step.is_complex())
        and step.layout == torch.strided
    )
    if is_one_number and not has_memory(local_part(step)):
        raise ValueError(
            f"the storage of state['step'] of {where} has been freed; clear the parameter's state "
            "to start it anew"
        )
    # A count on the device is not read: that would be to wait for it.
    if not is_one_number or (step.device.type == "cpu" and not 0 <= step.item() < math.inf):
        raise ValueError(
            f"state['step'] of {where} must be a tensor of one element, a number finite and >= 0, "
            f"got {step!r}"
        )
    _check_stays_shared("step", step, torch.float32, where)


def _check_stays_shared(key: str, tensor: Tensor, dtype: torch.dtype, where: str) -> None:
    """Refuse what would be converted, and no longer be seen by other processes."""
    if tensor.dtype != dtype and is_shared(local_part(tensor)):
        raise ValueError(
            f"state[{key!r}] of {where} is in shared memory and has type {tensor.dtype}; to be "
            f"stepped there it must be {dtype}"
        )


def check_overlaps(entries: Sequence[Entry], state: MutableMapping[Tensor, dict[str, Any]]) -> None:
    """Tensors that share memory would be written at once, in no fixed order."""
    written = [
        named for entry in entries for named in named_tensors(entry.owner, entry.where, state)
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
