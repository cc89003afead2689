"""An optimizer as those see it that step it in other ways, or watch it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor
from torch.optim.optimizer import Optimizer

from ..core.scalars import StepInputs
from ..core.stats import WatchRecords
from .options import GroupOptions, read_options
from .stepper import Stepper

if TYPE_CHECKING:
    from torch.distributed.optim import ZeroRedundancyOptimizer

__all__ = ["Host", "SteppedApart"]

_NO_INPUTS = StepInputs()


class SteppedApart(Protocol):
    """Parameters of an optimizer that are stepped in backward."""

    @property
    def params(self) -> Iterable[Tensor]:
        """Which ones."""

    @property
    def backends_used(self) -> set[str]:
        """Names of the backends that they were last stepped by."""


class Host(Optimizer):
    """What :mod:`adamal_kernels.modes` and :mod:`adamal_kernels.watch` ask of an optimizer.

    The names are no user's, who sees them on the optimizers; to the modules above they are the
    interface, besides torch's ``param_groups`` and ``state``.
    """

    _monotone: ClassVar[bool]
    """Whether the second moment is AdamAL's."""
    _handle: str
    """By which compiled code finds the optimizer."""
    _stepper: Stepper
    """Steps all parameters but those that are stepped apart."""
    _records: WatchRecords | None = None
    """Where the steps' statistics are kept; None: they are not watched."""
    _in_backward: Sequence[SteppedApart] = ()
    """What steps parameters in backward."""
    _zero: weakref.ref[ZeroRedundancyOptimizer] | None = None
    """The ZeroRedundancyOptimizer whose part this optimizer steps; None: it is nobody's part."""
    _opt_called: bool
    """By which torch's schedulers learn that there was a step."""

    def _options(self, group: dict[str, Any]) -> GroupOptions:
        """Check a group and return its options."""
        return read_options(group, optimizer=type(self).__name__, monotone=self._monotone)

    def _leave_to_backward(self, steppers: Sequence[SteppedApart]) -> None:
        """Leave their parameters to what steps them in backward."""
        self._in_backward = steppers
        self._stepper.stepped_apart = {param for stepper in steppers for param in stepper.params}

    def _inputs(self) -> StepInputs:
        """Return what is set on the optimizer that may scale, clip or skip its next step."""
        # torch.amp.GradScaler sets both before it calls step(), and takes them away again.
        grad_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        max_grad_norm = self._stepper.max_grad_norm
        if self._zero is not None:
            self._check_zero_holds_no_norm()
        if grad_scale is None and found_inf is None and max_grad_norm is None:
            return _NO_INPUTS
        if type(found_inf) is int and found_inf == 0:
            # The scaler's sum over the devices of gradients, where there are none.
            found_inf = None
        for name, value in (("grad_scale", grad_scale), ("found_inf", found_inf)):
            if value is not None and (not isinstance(value, Tensor) or value.numel() != 1):
                raise TypeError(
                    f"optimizer.{name} must be a Tensor of one element, as torch.amp.GradScaler "
                    f"sets it, or None; got {value!r}"
                )
        return StepInputs(
            grad_scale,
            found_inf,
            max_grad_norm=math.inf if max_grad_norm is None else max_grad_norm,
        )

    def _check_zero_holds_no_norm(self) -> None:
        """Refuse what was set on a ZeroRedundancyOptimizer, which hands nothing on."""
        zero = None if self._zero is None else self._zero()
        for name in ("max_grad_norm", "grad_norm_group"):
            if name in getattr(zero, "__dict__", ()):
                raise RuntimeError(
                    f"{name} is set on the ZeroRedundancyOptimizer, which hands only param groups "
                    f"on; delete it there and set zero.optim.{name}"
                )
