"""The step inside ``torch.compile``: one operator, whose options are read when it runs.

Dynamo traces :func:`step`, which collects tensors, and puts ``adamal_kernels::step`` into the
graph. Numbers stay out of the graph: one that changes, such as a learning rate, would be compiled
anew. The operator finds its optimizer by a handle and reads them there.

What belongs outside of the compiled function, because Dynamo sees only what is a graph's:

- ``zero_grad()``, which torch keeps from being traced;
- changes of options that are numbers, or of ``max_grad_norm``: the operator reads them after the
  graph was entered and before it is left. A Tensor option may be changed inside;
- reading ``last_grad_norm`` or ``skipped_steps``, which is an error inside.

State is made while the graph is traced. ``differentiable=True`` is refused.

Example:
    >>> import torch
    >>> from adamal_kernels import AdamAL
    >>> p = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
    >>> optimizer = AdamAL([p], lr=0.5)
    >>> step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)
    >>> p.square().sum().backward()
    >>> step()
    >>> p.detach()
    tensor([ 0.5000, -0.5000])
"""

from __future__ import annotations

import itertools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.buffers import BUFFERS, SecondMoment
from ..core.scalars import StepInputs
from ..projections import CoupledSet
from ..step.checks import prepare_state
from ..step.entry import is_frozen
from ..step.host import Host
from ..step.options import check_capturable
from ..step.sharded import is_sharded, mark_like

__all__ = ["new_handle", "step"]

_optimizers: weakref.WeakValueDictionary[str, Host] = weakref.WeakValueDictionary()
_counter = itertools.count()

# Tensor options are numbered through the groups: lr, beta1 and beta2 of the first, and so on.
_TENSOR_OPTIONS = 3


def new_handle(optimizer: Host) -> str:
    """Return a name by which compiled code finds ``optimizer``, which it does not keep alive."""
    # Here, because it imports Dynamo; so does torch's constructor, and nothing before it.
    torch.compiler.assume_constant_result(_prepare)
    # A string: Dynamo would make a variable of a number that differs from graph to graph.
    handle = f"{type(optimizer).__name__} {next(_counter)}"
    _optimizers[handle] = optimizer
    return handle


def step(optimizer: Host, closure: Callable[[], Any] | None) -> Any:
    """Put the step into the graph that Dynamo is tracing; see ``AdamAL.step``."""
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    members: list[int] = []
    params: list[Tensor] = []
    grads: list[Tensor] = []
    kinds: list[tuple[SecondMoment, bool]] = []
    index = 0
    # By that name Dynamo finds the groups as attribute, and guards every number in them.
    groups = optimizer.__dict__["param_groups"]
    for group in groups:
        for param in group["params"]:
            grad = param.grad
            if grad is not None:
                members.append(index)
                params.append(param)
                grads.append(grad)
                kinds.append(_kind(group))
            index += 1
    if not members:
        return loss
    places = _prepare(optimizer._handle, tuple(members))
    scalars = [_tensor_option(groups, place) for place in places]
    held = [optimizer.state[param] for param in params]
    buffers = [
        values[buffer.key]
        for buffer in BUFFERS
        for values, of in zip(held, kinds, strict=True)
        if buffer.exists(*of)
    ]
    grad_enabled = torch.is_grad_enabled()
    with torch.no_grad():
        torch.ops.adamal_kernels.step(
            params,
            grads,
            buffers,
            [values["step"] for values in held],
            scalars,
            getattr(optimizer, "grad_scale", None),
            getattr(optimizer, "found_inf", None),
            members,
            places,
            optimizer._handle,
            grad_enabled,
        )
    return loss


def _prepare(handle: str, members: tuple[int, ...]) -> tuple[int, ...]:
    """Make the state of parameters, while the graph is traced; return which options are Tensors.

    The state's tensors are inputs of the graph, so they have to be there before it.
    """
    optimizer = _optimizers[handle]
    _check_traceable(optimizer)
    inputs = optimizer._inputs()
    wanted = set(members)
    index = 0
    with torch.inference_mode(False), torch.no_grad():
        for g, group in enumerate(optimizer.param_groups):
            options = optimizer._options(group)
            for i, param in enumerate(group["params"]):
                if index in wanted:
                    where = f"params[{i}] of group {g}"
                    prepare_state(param, options, where, optimizer.state, inputs)
                index += 1
    count = _TENSOR_OPTIONS * len(optimizer.param_groups)
    return tuple(
        place
        for place in range(count)
        if isinstance(_tensor_option(optimizer.param_groups, place), Tensor)
    )


def _tensor_option(groups: Sequence[dict[str, Any]], place: int) -> Any:
    group = groups[place // _TENSOR_OPTIONS]
    which = place % _TENSOR_OPTIONS
    return group["lr"] if which == 0 else group["betas"][which - 1]


def _check_traceable(optimizer: Host) -> None:
    if optimizer._in_backward:
        raise RuntimeError(
            f"{type(optimizer).__name__} steps in backward, which is not the compiled function's; "
            "remove() what step_in_backward() returned"
        )
    for index, group in enumerate(optimizer.param_groups):
        if group["differentiable"]:
            raise RuntimeError(
                f"group {index} of {type(optimizer).__name__} has differentiable=True, which "
                "torch.compile cannot see through; step outside of the compiled function"
            )
        if any(is_sharded(p) and not is_frozen(p) for p in group["params"]):
            raise NotImplementedError(
                f"group {index} of {type(optimizer).__name__} has DTensors, whose step is not "
                "compiled yet; step outside of the compiled function"
            )


torch.library.define(
    "adamal_kernels::step",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] buffers, Tensor(c!)[] steps, "
    "Tensor[] scalars, Tensor? grad_scale, Tensor? found_inf, int[] members, int[] places, "
    "str handle, bool grad_enabled) -> ()",
    # Its options are read on the host, so that a graph replayed without it would repeat old ones.
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe),
)


@torch.library.register_fake("adamal_kernels::step")
def _fake_step(*args: Any) -> None:
    """Return what the operator returns, and compute nothing."""


@torch.library.impl("adamal_kernels::step", "default")
def _step(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    steps: list[Tensor],
    scalars: list[Tensor],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    members: list[int],
    places: list[int],
    handle: str,
    grad_enabled: bool,
) -> None:
    """Step the tensors given, under the options that the optimizer has now.

    Args:
        params: those that have a gradient, in the groups' order.
        grads: their gradients.
        buffers: their state, buffer by buffer, of those that have it.
        steps: how many each has taken.
        scalars: values of the options that are Tensors.
        grad_scale: what the loss was multiplied by.
        found_inf: not 0 where a gradient was not finite.
        members: which of the optimizer's parameters they are, numbered through the groups.
        places: which options are Tensors: lr, beta1, beta2, numbered through the groups.
        handle: names the optimizer.
        grad_enabled: the mode outside of the step.

    Raises:
        RuntimeError, TypeError, ValueError, NotImplementedError: the optimizer is gone, or an
            option or a tensor cannot be used; nothing has been changed then.
    """
    try:
        optimizer = _live(handle)
        inputs = optimizer._inputs()._replace(grad_scale=grad_scale, found_inf=found_inf)
        states = [{"step": step} for step in steps]
        given = dict(zip(members, map(_Given, params, grads, states), strict=True))
        _add_buffers(optimizer, given, buffers)
        with _options_as_given(optimizer.param_groups, dict(zip(places, scalars, strict=True))):
            _step_given(optimizer, given, inputs)
    except Exception:
        # The graph switched it off, and does not get to where it switches it on again.
        torch.set_grad_enabled(grad_enabled)
        raise


class _Given(NamedTuple):
    """What the graph hands over of one parameter."""

    param: Tensor
    grad: Tensor
    state: dict[str, Tensor]


def _live(handle: str) -> Host:
    optimizer = _optimizers.get(handle)
    if optimizer is None:
        raise RuntimeError(
            f"the optimizer that a compiled step was made for ({handle}) is gone; keep a "
            "reference to it, or compile the function that steps another"
        )
    return optimizer


def _kind(group: dict[str, Any]) -> tuple[SecondMoment, bool]:
    """Return what says which buffers a group's parameters have."""
    second_moment = SecondMoment.AMSGRAD if group["amsgrad"] else SecondMoment.PLAIN
    return second_moment, isinstance(group["projection"], CoupledSet)


def _add_buffers(optimizer: Host, given: Mapping[int, _Given], tensors: Iterable[Tensor]) -> None:
    """Add the buffers to the state of the parameters that have them, in the order of `step`."""
    kinds = [_kind(group) for group in optimizer.param_groups for _ in group["params"]]
    places = [
        (of_param.state, buffer.key)
        for buffer in BUFFERS
        for member, of_param in given.items()
        if buffer.exists(*kinds[member])
    ]
    for (held, key), tensor in zip(places, tensors, strict=True):
        held[key] = tensor


def _step_given(optimizer: Host, given: Mapping[int, _Given], inputs: StepInputs) -> None:
    _check_traceable(optimizer)
    is_captured = check_capturable(optimizer.param_groups, type(optimizer).__name__)
    optimizer._opt_called = True
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if not all(_is_own(optimizer, params[member], of) for member, of in given.items()):
        _step_copies(optimizer, given, inputs, is_captured)
        return
    with _gradients_as_given(params, given):
        optimizer._stepper.step(
            optimizer.param_groups,
            optimizer.state,
            optimizer._options,
            inputs,
            records=optimizer._records,
            is_captured=is_captured,
        )


def _is_own(optimizer: Host, param: Tensor, given: _Given) -> bool:
    """Whether the tensors given are those of the optimizer, and not copies."""
    held = optimizer.state.get(param, {})
    return _is_same(param, given.param) and all(
        key in held and _is_same(held[key], tensor) for key, tensor in given.state.items()
    )


def _is_same(first: Tensor, second: Tensor) -> bool:
    return first is second or (
        first.data_ptr() == second.data_ptr()
        and first.dtype == second.dtype
        and first.shape == second.shape
        and first.stride() == second.stride()
    )


def _step_copies(
    optimizer: Host, given: Mapping[int, _Given], inputs: StepInputs, is_captured: bool
) -> None:
    """Step copies of the optimizer's tensors, which the graph copies back."""
    groups = []
    state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
    owners: dict[Tensor, Tensor] = {}
    member = itertools.count()
    for group in optimizer.param_groups:
        params = []
        for own in group["params"]:
            of_param = given.get(next(member))
            param = (own if of_param is None else of_param.param).detach()
            params.append(param)
            if of_param is None:
                continue
            mark_like(param, own)
            if of_param.grad.dtype != param.dtype:
                param.grad_dtype = of_param.grad.dtype
            param.grad = of_param.grad
            state[param] = dict(of_param.state)
            owners[param] = own
        groups.append({**group, "params": params})
    records = None if optimizer._records is None else optimizer._records.of_copies(owners)
    optimizer._stepper.step(
        groups,
        state,
        optimizer._options,
        inputs,
        records=records,
        repeats=False,
        is_captured=is_captured,
    )
    for of_param, held in zip(given.values(), state.values(), strict=True):
        for name, tensor in of_param.state.items():
            if held[name] is not tensor:
                tensor.copy_(held[name])


@contextmanager
def _options_as_given(
    groups: Sequence[dict[str, Any]], values: Mapping[int, Tensor]
) -> Iterator[None]:
    """Put the graph's values of Tensor options into the groups: the graph may have changed them."""
    replaced = []
    try:
        for place, value in values.items():
            if _tensor_option(groups, place) is not value:
                group = groups[place // _TENSOR_OPTIONS]
                which = place % _TENSOR_OPTIONS
                replaced.append((group, group["lr"], group["betas"]))
                if which == 0:
                    group["lr"] = value
                else:
                    betas = list(group["betas"])
                    betas[which - 1] = value
                    group["betas"] = tuple(betas)
        yield
    finally:
        for group, lr, betas in reversed(replaced):
            group["lr"], group["betas"] = lr, betas


@contextmanager
def _gradients_as_given(params: Sequence[Tensor], given: Mapping[int, _Given]) -> Iterator[None]:
    """Give parameters the graph's gradients, and those that have none there None."""
    replaced = []
    try:
        for member, param in enumerate(params):
            grad = given[member].grad if member in given else None
            if param.grad is not grad:
                replaced.append((param, param.grad))
                param.grad = grad
        yield
    finally:
        for param, grad in replaced:
            param.grad = grad
