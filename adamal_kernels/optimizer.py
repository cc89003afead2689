"""The optimizers: groups, state, closures and checkpoints; they know no kernel."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import _profiler_enabled
from torch.compiler import is_compiling
from torch.optim.optimizer import (
    Optimizer,
    ParamsT,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

from .backends import BackendName
from .checkpoints.foreign import as_torch_adam
from .checkpoints.merge import feed_back_maxima, merge_groups, merge_state, packed
from .modes import compiled, in_backward
from .modes.in_backward import InBackwardHandle
from .projections import Projection
from .step.checks import check_parameter
from .step.entry import is_frozen
from .step.host import Host
from .step.options import (
    check_betas_of_one_kind,
    check_capturable,
    check_max_grad_norm,
    check_options,
    pair_of_betas,
)
from .step.sharded import check_process_group, is_flat_shard, zero_redundancy_optimizer
from .step.stepper import Stepper
from .watch import Watch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Adam", "AdamAL", "AdamALW", "AdamW"]

_Step = TypeVar("_Step", bound=Callable[..., Any])


def _hooked(step: _Step) -> _Step:
    """Run step hooks and the profiler's record only where there are any.

    torch wraps every optimizer's ``step`` in both; the record alone takes as long as stepping
    some hundred tensors.
    """
    recorded = Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def hooked_step(self: _AdamBase, *args: Any, **kwargs: Any) -> Any:
        # A subclass's step is hooked too, and has run them where it calls super().step().
        if self._runs_hooks or not (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or (not is_compiling() and _profiler_enabled())
        ):
            return step(self, *args, **kwargs)
        self._runs_hooks = True
        try:
            return recorded(self, *args, **kwargs)
        finally:
            self._runs_hooks = False

    # torch asks before it wraps.
    hooked_step.hooked = True  # type: ignore[attr-defined]
    return cast(_Step, hooked_step)


def _check_is_eager(name: str) -> None:
    """The step sets such attributes when it runs, not when torch.compile traces it."""
    if is_compiling():
        raise RuntimeError(f"{name} cannot be compiled; read it outside of the compiled function")


class _AdamBase(Host):
    """Everything the optimizers share; the signature of :class:`torch.optim.Adam` and more."""

    _runs_hooks = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Sequence[float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        bias_correction: bool = True,
        projection: Projection | None = None,
        backend: BackendName = "auto",
        max_grad_norm: float | None = None,
        grad_norm_group: ProcessGroup | None = None,
    ) -> None:
        betas = pair_of_betas(betas)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
            "bias_correction": bias_correction,
            "projection": projection,
            "backend": backend,
        }
        self._stepper = Stepper()
        self._handle = compiled.new_handle(self)
        self.max_grad_norm = max_grad_norm
        self.grad_norm_group = grad_norm_group
        zero = zero_redundancy_optimizer()
        if zero is not None:
            self._zero = weakref.ref(zero)
            self._stepper.grad_norm_group = zero.process_group
        check_betas_of_one_kind(betas)
        check_options(defaults, optimizer=type(self).__name__, monotone=self._monotone)
        super().__init__(params, defaults)

    @property
    def backends_used(self) -> tuple[str, ...]:
        """Names of the backends that parameters were last stepped by; empty before the first."""
        names = {*self._stepper.backends_used}
        return tuple(sorted(names.union(*(stepper.backends_used for stepper in self._in_backward))))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see :meth:`torch.optim.Optimizer.add_param_group`.

        Raises:
            TypeError, ValueError, NotImplementedError: an option of the group, or a parameter's
                type, cannot be used; the group is not added then. Of a frozen parameter
                (``requires_grad=False`` and no gradient) nothing is asked.
            RuntimeError: the group's named backend cannot run on a parameter's device.
        """
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        try:
            options = self._options(self.param_groups[index])
            for i, param in enumerate(self.param_groups[index]["params"]):
                if not is_frozen(param):
                    check_parameter(param, options, f"params[{i}] of group {index}")
        except Exception:
            self.param_groups.pop()
            raise
        # A list, or a config's, would have to be read anew in every step.
        self.param_groups[index]["betas"] = (options.beta1, options.beta2)

    @_hooked
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss; called once, with gradients
                enabled.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError, TypeError, ValueError, NotImplementedError: an option, a gradient or a
                state tensor cannot be used; no parameter and no state has been changed then.
        """
        if is_compiling():
            return compiled.step(self, closure)
        is_captured = check_capturable(self.param_groups, type(self).__name__)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        inputs = self._inputs()
        if self._in_backward:
            in_backward.check_inputs(inputs)
        self._opt_called = True
        self._stepper.step(
            self.param_groups,
            self.state,
            self._options,
            inputs,
            records=self._records,
            is_captured=is_captured,
        )
        return loss

    def step_in_backward(
        self, model: torch.nn.Module | Iterable[Tensor] | None = None
    ) -> InBackwardHandle:
        """Step each parameter inside ``backward()``, as soon as its gradient is accumulated.

        The bits are those of :meth:`step` after ``backward()``, and so are state and schedules;
        each gradient is freed (``p.grad = None``) once it is used. A parameter that several
        modules share is stepped once, when its gradient is whole. Every ``backward()`` is a step:
        gradients are not accumulated over several. :meth:`step` steps what still has a gradient,
        and may be called as ever.

        Step hooks are not run. Hooks on the same parameters registered later find no gradient. An
        error is raised from ``backward()``: that parameter is as it was, earlier ones have been
        stepped. Under ``torch.utils.checkpoint`` with ``use_reentrant=True`` a parameter of
        several checkpointed parts is stepped for each.

        Args:
            model: whose parameters, or which ones. Those of a module that are not in the optimizer
                are left alone, as they are by :meth:`step`. Default: all of the optimizer's, as
                of now; groups added later are stepped by :meth:`step`.

        Returns:
            A handle with ``remove()``, also a context manager. It keeps the optimizer alive; the
            hooks do not.

        Raises:
            RuntimeError: with ``max_grad_norm``, a GradScaler or ``differentiable``, here or from
                ``backward()`` if set later. A scaler shows only at ``scaler.step()``: by then its
                first gradients have been taken, scaled.
            ValueError: a parameter is stepped in backward already, or not the optimizer's, or
                ``model`` contains a ``DistributedDataParallel``, which averages gradients later.

        Example:
            >>> import torch
            >>> from adamal_kernels import AdamAL
            >>> p = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
            >>> optimizer = AdamAL([p], lr=0.5)
            >>> with optimizer.step_in_backward():
            ...     p.square().sum().backward()
            >>> p.detach(), p.grad
            (tensor([ 0.5000, -0.5000]), None)
        """
        return in_backward.step_in_backward(self, model)

    def watch(self) -> Watch:
        """Watch every step from now on, from inside it: no second pass, no waiting until read.

        Of each parameter's last step: how many elements' ``v`` grew and when any last did, the
        smallest and largest effective step size, the least change of the regularization budget
        (equation 15's Γ, with the step's own denominator) and how much of the parameter lies on
        the boundary of its set. :class:`ParameterStatistics` has each. Parameters, state and
        checkpoints are what they are without; a copy, and what is pickled, is not watched; loading
        a checkpoint begins anew.

        Off, it costs nothing. It works with every option and backend. In a CUDA graph it has to
        be on, or off, when the step is captured.

        Returns:
            What reads the statistics, and ends them by ``stop()`` or as a context manager.

        Raises:
            RuntimeError: the optimizer is being watched already.

        Example:
            >>> import torch
            >>> from adamal_kernels import AdamAL, Box
            >>> p = torch.nn.Parameter(torch.tensor([1.0, -0.75]))
            >>> optimizer = AdamAL([p], lr=0.5, eps=0.0, projection=Box(-1, 0.5))
            >>> with optimizer.watch() as watch:
            ...     for _ in range(2):
            ...         p.grad = torch.tensor([1.0, 2.0])
            ...         optimizer.step()
            >>> found = watch.read()[p]
            >>> found.step, found.grown_fraction, found.boundary_fraction
            (2, 1.0, 0.5)
        """
        if self._records is not None:
            raise RuntimeError(
                "the optimizer is being watched already; use what watch() returned then, or call "
                "its stop()"
            )
        return Watch(self)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What GradScaler asks: whether to leave unscaling, and skipping, to the step.

        As torch has it, to who asked for it by ``fused=True``. FSDP1's ShardedGradScaler, which
        alone knows of its processes, reduces what it found only where it unscales. A step in
        backward refuses a scaler, so it has to be told.
        """
        if self._in_backward:
            return True
        return bool(self.defaults["fused"]) and not any(
            is_flat_shard(param) for group in self.param_groups for param in group["params"]
        )

    @property
    def max_grad_norm(self) -> float | None:
        """The global norm gradients are clipped to inside the step, > 0; None: not clipped.

        Raises:
            TypeError, ValueError: set to what is not a positive finite number.
        """
        return self._stepper.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        self._stepper.max_grad_norm = None if value is None else check_max_grad_norm(value)

    @property
    def grad_norm_group(self) -> ProcessGroup | None:
        """The process group over which parameters are partitioned that are no DTensors.

        None: every process has them whole, as under ``DistributedDataParallel``. A copy, and what
        is pickled, has to be given it anew.

        Raises:
            TypeError: set to what is no process group of this process.
        """
        return self._stepper.grad_norm_group

    @grad_norm_group.setter
    def grad_norm_group(self, value: ProcessGroup | None) -> None:
        if value is not None:
            check_process_group(value, "grad_norm_group")
        self._stepper.grad_norm_group = value
        self._stepper.lacks_group = False

    @property
    def last_grad_norm(self) -> Tensor | None:
        """Norm of all gradients in the last step, unscaled and before clipping.

        A float64 scalar on the first parameter's device, not waited for; None where
        ``max_grad_norm`` was None, or before the first step.
        """
        _check_is_eager("last_grad_norm")
        return self._stepper.grad_norm

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps skipped themselves because a gradient, or their norm, was not finite.

        An int64 scalar, where counts are on a device, on that device and not waited for. A step
        that a GradScaler does not call, as it does not without ``fused=True``, is not counted.
        """
        _check_is_eager("skipped_steps")
        if self._stepper.skipped_steps is None:
            return torch.zeros((), dtype=torch.int64, device="cpu")
        return self._stepper.skipped_steps.clone()

    # torch's schedulers ask before they wrap it, which Dynamo cannot trace: they want to know of a
    # step, and _opt_called tells them.
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    def _patch_step_function(self) -> None:
        cls = type(self)
        if not getattr(cls.step, "hooked", False):
            cls.step = _hooked(cls.step)  # type: ignore[method-assign]
        super()._patch_step_function()

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state: tensors, numbers, strings, lists and dicts only.

        The keys are those of :class:`torch.optim.Adam`, which can load it. A projection is saved
        as a dict, which hooks see so. See :meth:`torch.optim.Optimizer.state_dict`.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        saved = packed(self.param_groups, self.state)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, saved)
            if replaced is not None:
                saved = replaced
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer, of :class:`torch.optim.Adam` or of a few others.

        Those of apex, Transformer Engine and DeepSpeed FusedAdam, of optimi and of bitsandbytes
        with 32-bit states are recognised by their layout
        (:mod:`adamal_kernels.checkpoints.foreign`). In one saved with ``amsgrad=True`` the
        monotone ``v`` of :class:`AdamAL` goes on from ``max_exp_avg_sq``, and ``amsgrad`` becomes
        False.

        Unlike torch's, it casts nothing (a bfloat16 parameter's float32 moments stay float32) and
        leaves the running optimizer's ``backend``, ``fused``, ``foreach``, ``capturable`` and
        ``differentiable`` as they are, and whether ``lr`` and ``betas`` are numbers or Tensors.
        Tensors are copied, onto their parameters' devices; ``step`` becomes a float32 scalar on
        the CPU.

        Warns:
            UserWarning: a foreign checkpoint holds state that has no place here.

        Raises:
            ValueError, TypeError: groups or shapes differ from the optimizer's, a key is missing
                or holds what cannot be read, or an option in the checkpoint is not for this
                optimizer; the message names it, and nothing has been changed then.
        """
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        for name in ("state", "param_groups"):
            if name not in state_dict:
                raise ValueError(
                    f"load_state_dict: the checkpoint has no {name!r}; it has "
                    f"{', '.join(map(repr, state_dict)) or 'nothing'}"
                )
        saved_groups, saved_state = as_torch_adam(state_dict["param_groups"], state_dict["state"])
        groups = merge_groups(self.param_groups, saved_groups)
        state = merge_state(groups, saved_groups, saved_state)
        if self._monotone:
            feed_back_maxima(groups, state)
        for group in groups:
            options = self._options(group)
            for i, param in enumerate(group["params"]):
                if not is_frozen(param):
                    check_parameter(param, options, f"load_state_dict: params[{i}]")
        self.__setstate__({"state": state, "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over pickled or loaded groups and state, with a stepper that has bound nothing."""
        state = dict(state)
        stepper = Stepper()
        if "_stepper" in self.__dict__:
            stepper.take_over(self._stepper)
        else:
            stepper.skipped_steps = state.pop("skipped_steps", None)
            stepper.max_grad_norm = state.pop("_max_grad_norm", None)
            stepper.lacks_group = state.pop("_lacks_group", False)
        super().__setstate__(state)
        self._stepper = stepper
        if self._records is not None:
            self._records.clear()
        if "_handle" not in self.__dict__:
            self._handle = compiled.new_handle(self)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle or a copy holds: torch's, and what is no param group's."""
        return {
            **super().__getstate__(),
            "_max_grad_norm": self._stepper.max_grad_norm,
            "_lacks_group": self._stepper.lacks_group or self._stepper.grad_norm_group is not None,
            "skipped_steps": self._stepper.skipped_steps,
        }


class _Decoupled(_AdamBase):
    """The signature of :class:`torch.optim.AdamW`."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over groups and state; the decay is decoupled whatever a checkpoint of Adam says."""
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Sequence[float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        bias_correction: bool = True,
        projection: Projection | None = None,
        backend: BackendName = "auto",
        max_grad_norm: float | None = None,
        grad_norm_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            bias_correction=bias_correction,
            projection=projection,
            backend=backend,
            max_grad_norm=max_grad_norm,
            grad_norm_group=grad_norm_group,
        )


class AdamAL(_AdamBase):
    """Adam with a second moment that never decreases, and a projected step.

    Per element, with gradient ``g`` and parameter ``p``, at step ``t``::

        g = g + weight_decay * p                              coupled decay
        p = p * (1 - lr * weight_decay)                       decoupled decay
        m = m + (1 - beta1) * (g - m)
        v = v + (1 - beta2) * (g*g - v)  if g*g > v  else  v
        d = sqrt(v) / sqrt(1 - beta2**t) + eps
        p = projection(p - lr / (1 - beta1**t) * m / d)

    This is Algorithm 1 of "A New Perspective in Understanding of Adam-Type Algorithms and Beyond"
    (section 3.3), bias-corrected unless that is switched off. In closed form
    ``v = max(v, beta2 * v + (1 - beta2) * g*g)``: AMSGrad's maximum fed back into the average, so
    two buffers do where ``torch.optim.Adam(amsgrad=True)`` needs three. The algorithm's line 7
    prints beta1 where equation 18 has beta2; ``betas=(b, b)`` gives the printed line. Where
    moments and ``eps`` are all zero the paper divides 0 by 0, and here the parameter stays.

    The arguments up to ``decoupled_weight_decay`` are those of :class:`torch.optim.Adam`, in its
    order. Every option but ``max_grad_norm`` and ``grad_norm_group`` may differ from group to
    group.

    Args:
        params: parameters, named parameters or param groups, as for every torch optimizer. Types
            float32, float64, bfloat16 and float16, and complex ones as pairs of reals; any
            device, shape and strides. Gradients have the parameter's type; with ``p.grad_dtype``
            16-bit parameters may have float32 gradients, and float32 ones 16-bit gradients.
        lr: learning rate, ``>= 0``, a number or a float32 or float64 tensor of one element, which
            every step reads anew: on the parameters' device it is not waited for. A float64 one
            gives the bits of the number. A step with ``lr=0`` does not project. Default: 1e-3.
        betas: decay rates of the two moments, each in ``[0, 1)``, both numbers or both tensors
            like ``lr``; any sequence of two, of which the group has a tuple. Default: (0.9, 0.999).
        eps: added to the denominator, ``>= 0``. Default: 1e-8.
        weight_decay: ``>= 0``, added to the gradient as ``weight_decay * p``. Default: 0.
        amsgrad: must be False: the second moment is already monotone, without a third buffer.
            (Checkpoints with ``amsgrad=True`` are taken: ``v`` goes on from their maximum.)
        foreach: True means ``backend="foreach"``. Default: None.
        maximize: ascend instead of descend. Default: False.
        capturable: keep step counts on the parameters' device and derive the step's scalars
            there, so that a CUDA graph can capture the step; take one step before. Works on CPUs
            too, to the same bits. Default: False.
        differentiable: let autograd differentiate through the step; only
            ``backend="reference"``, which ``"auto"`` then takes. Default: False.
        fused: True demands a fused backend (cuda, triton or cpu), and lets the step unscale for a
            GradScaler, as in torch (see below); False together with ``foreach=False`` means
            ``backend="reference"``. Default: None.
        decoupled_weight_decay: multiply ``p`` by ``1 - lr * weight_decay`` instead of adding to
            the gradient. Default: False.
        bias_correction: divide the moments by ``1 - beta**t``. Default: True.
        projection: a set that every step projects onto, in the metric of its denominator:
            :class:`~adamal_kernels.Box`, :class:`~adamal_kernels.NonNegative`,
            :class:`~adamal_kernels.L2Ball`, :class:`~adamal_kernels.L1Ball` or
            :class:`~adamal_kernels.Simplex`; of real parameters only. A parameter that starts
            outside of it is projected by its first step. Default: None.
        backend: ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"``, ``"foreach"`` or
            ``"reference"``. ``"auto"`` takes the fastest that can run on each parameter's device,
            and warns once where that is not the first choice; a named one is never replaced.
            Default: ``"auto"``.
        max_grad_norm: the norm of all gradients together, ``> 0``, that they are clipped to inside
            the step, as :func:`torch.nn.utils.clip_grad_norm_` does before it; gradients stay as
            they are. A step whose norm is not finite is skipped whole: ``v`` never forgets a
            spike. It is no option of a group and not part of a checkpoint. Of DTensors it is the
            norm of the whole. See :attr:`last_grad_norm` and :attr:`skipped_steps`. Default: None,
            no clipping.
        grad_norm_group: the process group over which parameters that are no DTensors are
            partitioned, so that their norm is that of all processes' parts: the one that FSDP1
            shards over, without which ``max_grad_norm`` is refused there. The group of a
            ``ZeroRedundancyOptimizer`` is taken by itself. Where FSDP1 shards some parameters, the
            others count as whole. Default: None: every process has them whole, as under
            ``DistributedDataParallel``.

    State per parameter: ``step`` (float32 scalar, on the CPU unless the step's scalars are derived
    on the device; one that a user places in shared memory is counted there), ``exp_avg`` and
    ``exp_avg_sq`` (float64 for float64 parameters, else float32; laid out as the parameter, and for
    a DTensor DTensors on its mesh with its placements). Of a DTensor each process steps its own
    part. Parameters in a ball or a simplex have ``multiplier`` besides: float64, one number a row,
    from which the next projection starts.

    :class:`torch.amp.GradScaler` unscales the gradients before the step and skips the step where
    one is not finite: gradients can be clipped and logged in between, and trainers see what was
    skipped. It costs one more read and write of the gradients and a wait for the device. With the
    constructor's ``fused=True``, as with torch's fused Adam, it leaves both to the step: what the
    scaler found infinite is then the same on all processes of a DTensor's mesh, gradients stay
    scaled, and a skipped step is counted by :attr:`skipped_steps` and seen by no trainer. FSDP1's
    ``ShardedGradScaler`` unscales in any case.

    ``step()`` can be part of a function that ``torch.compile(fullgraph=True)`` compiles, or be
    compiled itself: :mod:`adamal_kernels.modes.compiled`.

    Raises:
        TypeError, ValueError: an option is of a wrong type, out of range or contradicts another,
            or a parameter's type is not supported.
        RuntimeError: the named backend cannot run here; the message says what would make it run.

    Example:
        >>> import torch
        >>> from adamal_kernels import AdamAL, Box
        >>> p = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
        >>> optimizer = AdamAL([p], lr=0.5, projection=Box(-1, 1), backend="reference")
        >>> p.square().sum().backward()
        >>> optimizer.step()
        >>> p.detach()
        tensor([ 0.5000, -0.5000])
    """

    _monotone = True


class AdamALW(_Decoupled, AdamAL):
    """:class:`AdamAL` with decoupled weight decay; the signature of :class:`torch.optim.AdamW`.

    Args:
        params, lr, betas, eps, amsgrad, maximize, foreach, capturable, differentiable, fused,
            bias_correction, projection, backend, max_grad_norm, grad_norm_group: see
            :class:`AdamAL`.
        weight_decay: ``p`` is multiplied by ``1 - lr * weight_decay``, ``>= 0``. Default: 1e-2.

    Example:
        >>> import torch
        >>> from adamal_kernels import AdamALW
        >>> p = torch.nn.Parameter(torch.tensor([2.0]))
        >>> optimizer = AdamALW([p], lr=0.5, weight_decay=0.5, backend="reference")
        >>> p.grad = torch.zeros(1)
        >>> optimizer.step()
        >>> p.detach()
        tensor([1.5000])
    """


class Adam(_AdamBase):
    """:class:`torch.optim.Adam` through the same kernels, within rounding of torch's own.

    The honest partner of an A/B comparison: the same step as :class:`AdamAL` but for
    ``v = beta2 * v + (1 - beta2) * g*g``. Differs from torch's in the order of roundings, in that
    16-bit parameters keep float32 moments, and in the additional options.

    Args:
        params, lr, betas, eps, weight_decay, foreach, maximize, capturable, differentiable, fused,
            decoupled_weight_decay, bias_correction, projection, backend, max_grad_norm,
            grad_norm_group: see :class:`AdamAL`.
        amsgrad: divide by the largest ``v`` so far, kept in a third buffer
            ``max_exp_avg_sq`` (Reddi et al.; equation 16 of the paper). Default: False.

    Example:
        >>> import torch
        >>> from adamal_kernels import Adam
        >>> p = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = Adam([p], lr=0.5, amsgrad=True, backend="reference")
        >>> p.square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[p])
        ['exp_avg', 'exp_avg_sq', 'max_exp_avg_sq', 'step']
    """

    _monotone = False


class AdamW(_Decoupled, Adam):
    """:class:`torch.optim.AdamW` through the same kernels: :class:`Adam`, decoupled decay.

    Args:
        params, lr, betas, eps, weight_decay, maximize, foreach, capturable, differentiable, fused,
            bias_correction, projection, backend, max_grad_norm, grad_norm_group: see
            :class:`AdamALW`.
        amsgrad: see :class:`Adam`.

    Example:
        >>> import torch
        >>> from adamal_kernels import AdamW
        >>> p = torch.nn.Parameter(torch.tensor([2.0]))
        >>> optimizer = AdamW([p], lr=0.5, weight_decay=0.5, backend="reference")
        >>> p.grad = torch.zeros(1)
        >>> optimizer.step()
        >>> p.detach()
        tensor([1.5000])
    """
