"""The optimizer in backward: each parameter is stepped where its gradient is complete."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core.scalars import StepInputs
from ..step.host import Host
from ..step.options import check_capturable
from ..step.stepper import Stepper
from ..user_warning import warn_user

__all__ = ["InBackwardHandle", "StepperInBackward", "check_inputs", "step_in_backward"]


class InBackwardHandle:
    """What ``optimizer.step_in_backward()`` returns: ends it by :meth:`remove` or as a context."""

    def __init__(self, optimizer: Host, stepper: StepperInBackward) -> None:
        """Keep the optimizer alive, which the parameters' hooks do not."""
        self._optimizer = optimizer
        self._stepper = stepper

    def remove(self) -> None:
        """Leave the parameters to ``optimizer.step()`` again; nothing happens the second time."""
        self._stepper.remove()
        self._optimizer._leave_to_backward(
            [s for s in self._optimizer._in_backward if s is not self._stepper]
        )

    def __enter__(self) -> InBackwardHandle:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


class _Own(NamedTuple):
    """What the optimizer is to one parameter: its own group, and a stepper that stays bound."""

    place: tuple[int, int]
    groups: list[dict[str, Any]]
    state: defaultdict[Tensor, dict[str, Any]]
    stepper: Stepper


class StepperInBackward:
    """Steps parameters from their hooks; held by the optimizer, and weakly by the hooks.

    A parameter whose hook led back to it, through C++, would never be freed.
    """

    def __init__(self, optimizer: Host, params: Iterable[Tensor]) -> None:
        """Register a hook on each of ``params``, which are the optimizer's."""
        self._optimizer = weakref.ref(optimizer)
        places = {
            param: (g, i)
            for g, group in enumerate(optimizer.param_groups)
            for i, param in enumerate(group["params"])
        }
        self._own = {
            param: _Own(places[param], [{"params": [param]}], defaultdict(dict), Stepper())
            for param in params
        }
        self._handles = [_register(param, _Hook(self)) for param in self._own]

    @property
    def params(self) -> Iterable[Tensor]:
        """The parameters that are stepped in backward."""
        return self._own.keys()

    @property
    def backends_used(self) -> set[str]:
        """Names of the backends that they were last stepped by."""
        return {name for own in self._own.values() for name in own.stepper.backends_used}

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def step(self, param: Tensor) -> None:
        """Step one parameter, and free its gradient.

        Raises:
            RuntimeError, TypeError, ValueError, NotImplementedError: as ``optimizer.step()``; the
                parameter, its state and its gradient have not been changed then.
        """
        optimizer = self._optimizer()
        assert optimizer is not None, "the optimizer holds this"
        inputs = optimizer._inputs()
        check_inputs(inputs)
        own = self._own[param]
        group = _group_of(optimizer, param, own.place)
        if group is None or param.grad is None:
            return
        _check_group(group)
        _take_over(own.groups[0], group)
        held = optimizer.state.get(param)
        if held:
            own.state[param] = held
        else:
            own.state.pop(param, None)
        own.stepper.step(
            own.groups,
            own.state,
            optimizer._options,
            inputs,
            records=optimizer._records,
            is_captured=check_capturable(own.groups, type(optimizer).__name__),
        )
        if not held:
            optimizer.state[param] = own.state[param]
        optimizer._opt_called = True
        param.grad = None


class _Hook:
    """Called with a parameter when its gradient is accumulated."""

    def __init__(self, stepper: StepperInBackward) -> None:
        self.stepper = weakref.ref(stepper)

    def __call__(self, param: Tensor) -> None:
        stepper = self.stepper()
        if stepper is not None:
            stepper.step(param)
            return
        _remove_dead_hooks(param)
        warn_user(
            "the optimizer that stepped parameters in backward is gone, and they keep their "
            "gradients; keep a reference to it, or to what step_in_backward() returned",
            RuntimeWarning,
        )


def step_in_backward(
    optimizer: Host, model: nn.Module | Iterable[Tensor] | None
) -> InBackwardHandle:
    """Step parameters in backward from now on; see ``AdamAL.step_in_backward``."""
    check_inputs(optimizer._inputs())
    for group in optimizer.param_groups:
        _check_group(group)
    params = [p for p in _chosen(optimizer, model) if p.requires_grad or _can_be_thawed(p)]
    for param in params:
        _remove_dead_hooks(param)
        if _hooks(param):
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} is stepped in backward already; "
                "remove() what step_in_backward() returned then"
            )
    stepper = StepperInBackward(optimizer, params)
    optimizer._leave_to_backward([*optimizer._in_backward, stepper])
    return InBackwardHandle(optimizer, stepper)


def check_inputs(inputs: StepInputs) -> None:
    """Check that nothing has to be known of all gradients before the first is stepped.

    Raises:
        RuntimeError: ``max_grad_norm`` is set, or a GradScaler's ``grad_scale`` or ``found_inf``.
    """
    if inputs.max_grad_norm < float("inf"):
        raise RuntimeError(
            f"max_grad_norm={inputs.max_grad_norm} and step_in_backward(): the norm is known only "
            "after the last gradient; set max_grad_norm=None, or call step() after backward()"
        )
    if inputs.grad_scale is not None or inputs.found_inf is not None:
        raise RuntimeError(
            "GradScaler and step_in_backward(): whether to skip is known only after the last "
            "gradient; train in bfloat16 without a scaler, or call step() after backward()"
        )


def _check_group(group: dict[str, Any]) -> None:
    if group["differentiable"]:
        raise RuntimeError(
            "differentiable=True and step_in_backward(), which frees the gradients; call step() "
            "after backward()"
        )


def _chosen(optimizer: Host, model: nn.Module | Iterable[Tensor] | None) -> Sequence[Tensor]:
    """Return which of the optimizer's parameters ``model`` names."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if model is None:
        return params
    if isinstance(model, nn.Module):
        for module in model.modules():
            if isinstance(module, nn.parallel.DistributedDataParallel):
                raise ValueError(
                    "model: DistributedDataParallel averages gradients after they would be "
                    "stepped; call step() after backward(), or shard with fully_shard"
                )
        named = set(model.parameters())
        if not named.intersection(params):
            raise ValueError("model has no parameter of this optimizer; pass the optimizer's model")
        return [param for param in params if param in named]
    chosen = list(dict.fromkeys(model))
    known = set(params)
    for index, param in enumerate(chosen):
        if param not in known:
            raise ValueError(
                f"model: parameter {index} is not the optimizer's; add it by add_param_group, or "
                "leave it out"
            )
    return chosen


def _group_of(optimizer: Host, param: Tensor, place: tuple[int, int]) -> dict[str, Any] | None:
    """Return the parameter's group, which a checkpoint or the user may have replaced."""
    groups = optimizer.param_groups
    g, i = place
    if g < len(groups) and i < len(groups[g]["params"]) and groups[g]["params"][i] is param:
        return groups[g]
    return next((group for group in groups if any(p is param for p in group["params"])), None)


def _take_over(own: dict[str, Any], group: dict[str, Any]) -> None:
    params = own["params"]
    own.update(group)
    own["params"] = params


def _register(param: Tensor, hook: _Hook) -> RemovableHandle:
    # A frozen one may be thawed later, and takes a hook only while it requires a gradient.
    frozen = not param.requires_grad
    if frozen:
        param.requires_grad_(True)
    try:
        return param.register_post_accumulate_grad_hook(hook)
    finally:
        if frozen:
            param.requires_grad_(False)


def _can_be_thawed(param: Tensor) -> bool:
    return (param.is_floating_point() or param.is_complex()) and not param.is_inference()


def _hooks(param: Tensor) -> dict[int, _Hook]:
    registered = param._post_accumulate_grad_hooks or {}
    return {key: hook for key, hook in registered.items() if isinstance(hook, _Hook)}


def _remove_dead_hooks(param: Tensor) -> None:
    for key, hook in _hooks(param).items():
        if hook.stepper() is None:
            del param._post_accumulate_grad_hooks[key]
