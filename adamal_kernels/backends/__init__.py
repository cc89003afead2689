"""The registry of backends, and the choice among them.

A backend sees buckets of plain tensors and scalars (:mod:`adamal_kernels.core.bucket`): no groups,
no options, no environment. It is one module and one line in :data:`BACKENDS`.
"""

from __future__ import annotations

from typing import Literal, get_args

from ..core.bucket import BucketKey
from ..user_warning import warn_user
from .base import Backend
from .eager.foreach import ForeachBackend
from .eager.reference import ReferenceBackend
from .native import CpuBackend, CudaBackend
from .triton.backend import TritonBackend

__all__ = [
    "BACKENDS",
    "BACKEND_NAMES",
    "FUSED",
    "Backend",
    "BackendName",
    "automatic_order",
    "check_request",
    "pick",
]


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        CudaBackend(),
        TritonBackend(),
        CpuBackend(),
        ForeachBackend(),
        ReferenceBackend(),
    )
}

FUSED = ("cuda", "triton", "cpu")
"""Backends that read and write every element once."""

BackendName = Literal["auto", "cuda", "triton", "cpu", "foreach", "reference"]
"""What ``backend=`` may be: "auto", or a key of :data:`BACKENDS`."""

BACKEND_NAMES: tuple[str, ...] = get_args(BackendName)

_AUTO = {"cuda": ("cuda", "triton", "foreach"), "cpu": ("cpu", "foreach")}
_AUTO_ELSEWHERE = ("foreach",)

# What a step of `foreach` takes in place of one of `cpu`: 1 x 20M, and 2000 x 16.
_EAGER_PRICE = (
    "(5 to 90 times slower than the compiled step: `adamal bench` tells it of yours; these of an "
    "AMD EPYC, 2 threads, torch 2.13.0, 2026-12-01)"
)

_announced: set[tuple[str, str]] = set()


def check_request(
    backend: object, *, fused: object, foreach: object, differentiable: object = False
) -> None:
    """Check that ``backend``, ``fused``, ``foreach`` and ``differentiable`` are valid and agree.

    Raises:
        TypeError: ``fused`` or ``foreach`` is neither a bool nor None.
        ValueError: ``backend`` names none, or they contradict each other.
        RuntimeError: ``fused`` and ``foreach``, or ``fused`` and ``differentiable``.
    """
    if backend not in BACKEND_NAMES:
        raise ValueError(f"backend: {backend!r} is unknown; use one of {', '.join(BACKEND_NAMES)}")
    for name, value in (("fused", fused), ("foreach", foreach)):
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"{name} must be True, False or None, got {value!r}")
    # torch's own errors, of its type and in its words.
    if fused and foreach:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together; set only backend")
    if fused and differentiable:
        raise RuntimeError(
            "`fused` does not support `differentiable`; only backend='reference' does: leave "
            "fused=None"
        )
    contradiction = None
    if fused and backend in ("foreach", "reference"):
        contradiction = f"fused=True and backend={backend!r}"
    elif fused is False and backend in FUSED:
        contradiction = f"fused=False and backend={backend!r}"
    elif foreach and backend not in ("auto", "foreach"):
        contradiction = f"foreach=True and backend={backend!r}"
    elif foreach is False and backend == "foreach":
        contradiction = f"foreach=False and backend={backend!r}"
    elif differentiable and (foreach or backend not in ("auto", "reference")):
        asked = "foreach=True" if foreach else f"backend={backend!r}"
        contradiction = f"differentiable=True, which only backend='reference' can do, and {asked}"
    if contradiction:
        raise ValueError(f"{contradiction} contradict each other; set only backend")


def automatic_order(device_type: str) -> tuple[str, ...]:
    """Return the backends that ``backend="auto"`` tries for a type of device, in order.

    Example:
        >>> automatic_order("cpu")
        ('cpu', 'foreach')
    """
    return _AUTO.get(device_type, _AUTO_ELSEWHERE)


def _candidates(
    device_type: str, backend: str, fused: bool | None, foreach: bool | None
) -> tuple[str, ...]:
    """Return the backends to try, in order; one only where it was named."""
    if backend != "auto":
        return (backend,)
    if foreach:
        return ("foreach",)
    order = automatic_order(device_type)
    if fused:
        return tuple(name for name in order if name in FUSED)
    if fused is False:
        return ("reference",) if foreach is False else ("foreach",)
    if foreach is False:
        return (*(name for name in order if name != "foreach"), "reference")
    return order


def pick(
    key: BucketKey,
    *,
    backend: str = "auto",
    fused: bool | None = None,
    foreach: bool | None = None,
    differentiable: bool = False,
) -> Backend:
    """Return the backend that steps buckets of kind ``key`` under these options.

    ``backend="auto"`` takes the first that can, and warns once for each reason it passed one
    over. A backend that was named, or ``fused=True``, is never replaced by another.

    Raises:
        RuntimeError: none of those asked for can; the message says why of each, and the remedy.
    """
    if differentiable:
        backend = "reference"
    candidates = _candidates(key.device.type, backend, fused, foreach)
    reasons = []
    for name in candidates:
        candidate = BACKENDS[name]
        reason = candidate.unavailable(key.device) or candidate.unsupported(key)
        if reason is None:
            for passed_over in reasons:
                _announce_once(name, passed_over)
            return candidate
        reasons.append(f"{name}: {reason}")
    asked = "fused=True" if backend == "auto" else f"backend={backend!r}"
    found = "; ".join(reasons) or f"no fused backend serves {key.device.type!r} devices"
    raise RuntimeError(f"{asked} cannot run here. {found}")


def _announce_once(taken: str, passed_over: str) -> None:
    if (taken, passed_over) not in _announced:
        _announced.add((taken, passed_over))
        compiled = passed_over.startswith("cpu: ")  # What was measured.
        price = f" {_EAGER_PRICE}" if compiled and taken == "foreach" else ""
        warn_user(f"adamal_kernels: using backend {taken!r}{price}, because {passed_over}")
