"""Who is timed: every backend of ours, torch's own Adam in its kinds, and other packages'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..backends import BACKENDS, FUSED
from ..core.storage import compute_dtype
from ..optimizer import AdamAL
from .cases import Shape

__all__ = ["BASELINE", "OURS", "PEERS", "Contender", "Entrant", "first_line"]

BASELINE = "torch-fused"
"""The peer that everything is compared with."""

_OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}

_SATURATED = 1e4
"""A second moment that no square of the gradients here comes near."""

ParamGroups = list[dict[str, Any]]


@dataclass(frozen=True)
class Contender:
    """An optimizer, and what is known of it without running it."""

    name: str
    build: Callable[[ParamGroups], Optimizer]
    backend: str | None = None
    """Which of ours it is; None for a peer."""
    module: str | None = None
    """The package it takes, where that is not torch."""
    fused: bool = False
    """Reads and writes every element once, so that the bytes it moves are known."""
    stores_v_where_grown: bool = False
    """Leaves unwritten the parts of the second moment that did not grow."""
    principal: bool = False
    """Alternates with every principal one of the other side, with a saturated second moment too."""
    moments: int = 2
    """State tensors of the parameter's size."""
    scratch_all: int = 0
    """Temporaries at its peak, as multiples of all the parameters in the compute type."""
    scratch_largest: int = 0
    """Likewise, as multiples of the largest parameter."""

    def unavailable(self, device: torch.device) -> str | None:
        """Why it cannot run on ``device``, as far as can be told beforehand; None if it may."""
        if self.backend is not None:
            return BACKENDS[self.backend].unavailable(device)
        if self.module is None:
            return None
        try:
            import_module(self.module)
        # Whatever another package does wrong on import is a reason, never a crash.
        except ModuleNotFoundError as error:
            if error.name == self.module.partition(".")[0]:
                return "not installed: pip install 'adamal-kernels[peers]'"
            return f"cannot be imported: {error}"
        except Exception as error:
            return f"cannot be imported: {first_line(error)}"
        return None

    def bytes_held(self, shapes: Sequence[Shape], dtype: torch.dtype) -> int:
        """Estimate the memory of its parameters and state; gradients are shared."""
        moment = compute_dtype(dtype) if self.backend is not None else dtype
        return sum(map(prod, shapes)) * (dtype.itemsize + self.moments * moment.itemsize)

    def scratch_bytes(self, shapes: Sequence[Shape], dtype: torch.dtype) -> int:
        """Estimate the memory of its temporaries in a step."""
        sizes = [prod(shape) for shape in shapes]
        elements = sum(sizes) * self.scratch_all + max(sizes) * self.scratch_largest
        return elements * compute_dtype(dtype).itemsize


def _ours(backend: str) -> Contender:
    fused = backend in FUSED
    return Contender(
        f"adamal-{backend}",
        lambda groups: AdamAL(groups, backend=backend, **_OPTIONS),
        backend=backend,
        fused=fused,
        stores_v_where_grown=backend in ("cuda", "triton"),
        principal=fused,
        scratch_all=10 if backend == "foreach" else 0,
        scratch_largest=0 if fused else 12,
    )


def _torch(**options: bool) -> Callable[[ParamGroups], Optimizer]:
    return lambda groups: torch.optim.Adam(groups, **_OPTIONS, **options)


def _optimi(groups: ParamGroups) -> Optimizer:
    return import_module("optimi").Adam(groups, **_OPTIONS)


def _torchao(groups: ParamGroups) -> Optimizer:
    # The one of its optimizers whose moments are as wide as the parameters.
    return import_module("torchao.optim")._AdamW(groups, **_OPTIONS)


def _bitsandbytes(groups: ParamGroups) -> Optimizer:
    return import_module("bitsandbytes.optim").Adam(groups, optim_bits=32, **_OPTIONS)


def _flashoptim(groups: ParamGroups) -> Optimizer:
    # Its defaults store 8-bit moments and split parameters: another method, other bytes.
    on_gpu = groups[0]["params"][0].is_cuda
    return import_module("flashoptim").FlashAdam(
        groups, quantize=False, master_weight_bits=None, fused=on_gpu, **_OPTIONS
    )


OURS: dict[str, Contender] = {backend: _ours(backend) for backend in BACKENDS}
"""Ours, by the backend's name."""

PEERS: dict[str, Contender] = {
    peer.name: peer
    for peer in (
        Contender(BASELINE, _torch(fused=True), fused=True, principal=True),
        Contender(
            "torch-fused-amsgrad",
            _torch(fused=True, amsgrad=True),
            fused=True,
            principal=True,
            moments=3,
        ),
        Contender("torch-foreach", _torch(foreach=True), scratch_all=3),
        Contender("torch-for-loop", _torch(foreach=False, fused=False), scratch_largest=3),
        Contender("optimi", _optimi, module="optimi", scratch_all=3),
        Contender("torchao", _torchao, module="torchao.optim", scratch_largest=2),
        Contender("bitsandbytes", _bitsandbytes, module="bitsandbytes.optim", scratch_largest=2),
        Contender("flashoptim", _flashoptim, module="flashoptim", scratch_largest=2),
    )
}
"""Theirs, by name."""


class Entrant:
    """A contender with parameters of its own."""

    def __init__(
        self,
        contender: Contender,
        shapes: Sequence[Shape],
        dtype: torch.dtype,
        device: torch.device,
        group_each: bool = False,
    ) -> None:
        self.contender = contender
        self.params: list[Tensor] = [
            torch.full(shape, 0.1, dtype=dtype, device=device).requires_grad_() for shape in shapes
        ]
        parts = [[param] for param in self.params] if group_each else [self.params]
        self.optimizer = contender.build([{"params": part} for part in parts])

    def take_gradients(self, grads: Sequence[Tensor], *, fresh: bool) -> None:
        """Set the gradients: to ``grads`` themselves, or to copies made while the last ones live.

        So fresh gradients lie at other addresses than those of the last step, as in training.
        """
        if fresh:
            grads = [grad.clone() for grad in grads]
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad

    def saturate(self) -> None:
        """Raise the second moment above every square of a gradient, so that it stays."""
        for param in self.params:
            for name in ("exp_avg_sq", "max_exp_avg_sq"):
                if name in self.optimizer.state[param]:
                    self.optimizer.state[param][name].fill_(_SATURATED)

    def second_moments(self) -> list[Tensor]:
        """Return the second moment of every parameter."""
        return [self.optimizer.state[param]["exp_avg_sq"] for param in self.params]

    def bytes_per_parameter(self, v_written: float) -> float | None:
        """Return the bytes one step reads and writes for each element; None unless it is fused.

        Args:
            v_written: the fraction of the second moment that is written.
        """
        if not self.contender.fused:
            return None
        param = self.params[0]
        assert param.grad is not None
        moved = 2.0 * param.itemsize + param.grad.itemsize
        for name, value in self.optimizer.state[param].items():
            if isinstance(value, Tensor) and value.shape == param.shape and name != "step":
                moved += value.itemsize * (1 + (v_written if name == "exp_avg_sq" else 1))
        return moved


def first_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
