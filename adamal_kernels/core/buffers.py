"""The state tensors of a parameter: one table, a row a tensor.

``step`` is none of them: it counts, and lies where the step's scalars are derived.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import IntEnum
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .storage import Format

__all__ = [
    "BUFFERS",
    "REQUIRED_KEYS",
    "Buffer",
    "SecondMoment",
    "buffers_of",
    "check_value",
    "held_buffers",
]


class SecondMoment(IntEnum):
    """How the second moment moves; the value is the code in ``csrc/formula/element.h``."""

    MONOTONE = 0
    """AdamAL: ``v + (1 - beta2) * (g2 - v)`` where ``g2 > v``, else ``v``."""
    PLAIN = 1
    """Adam: ``beta2 * v + (1 - beta2) * g2``."""
    AMSGRAD = 2
    """Adam with ``amsgrad=True``: plain, and a third buffer that keeps the largest ``v``."""


class Buffer(NamedTuple):
    """A state tensor."""

    key: str
    """In ``optimizer.state[p]``, in checkpoints and in :attr:`.bucket.Bucket.buffers`."""
    shape: Literal["parameter", "rows"] = "parameter"
    """That of the parameter, laid out in memory as it is; or one number a row of its set."""
    needs: Literal["nothing", "amsgrad", "row_set"] = "nothing"
    """What a parameter has it for; ``nothing``: each has it."""
    starts_as: str = ""
    """The buffer it begins as a copy of in a state that has been stepped; empty: zeros."""
    stored_as: Literal["exp_avg", "exp_avg_sq"] | torch.dtype = "exp_avg_sq"
    """The type of its numbers, or which of a format's it is."""

    def exists(self, second_moment: SecondMoment, has_row_set: bool) -> bool:
        """Whether a parameter has it.

        Example:
            >>> [b.key for b in BUFFERS if b.exists(SecondMoment.PLAIN, has_row_set=True)]
            ['exp_avg', 'exp_avg_sq', 'multiplier']
        """
        if self.needs == "amsgrad":
            return second_moment is SecondMoment.AMSGRAD
        return has_row_set if self.needs == "row_set" else True

    def dtype(self, format: Format, *, is_complex: bool = False) -> torch.dtype:
        """Return the type it is stored in; ``is_complex``: of a complex parameter.

        Example:
            >>> BUFFERS[0].dtype(Format(torch.bfloat16, torch.bfloat16))
            torch.float32
        """
        if not isinstance(self.stored_as, str):
            return self.stored_as
        dtype: torch.dtype = getattr(format, self.stored_as)
        return dtype.to_complex() if is_complex else dtype


# In the order of csrc's enum Buffer.
BUFFERS = (
    Buffer("exp_avg", stored_as="exp_avg"),
    Buffer("exp_avg_sq"),
    Buffer("max_exp_avg_sq", needs="amsgrad", starts_as="exp_avg_sq"),
    Buffer("multiplier", shape="rows", needs="row_set", stored_as=torch.float64),
)


# What every state that has been stepped holds.
REQUIRED_KEYS = ("step", *(buffer.key for buffer in BUFFERS if buffer.needs == "nothing"))


def buffers_of(second_moment: SecondMoment, has_row_set: bool) -> Iterator[Buffer]:
    """Yield what a parameter has."""
    return (buffer for buffer in BUFFERS if buffer.exists(second_moment, has_row_set))


def held_buffers(held: Mapping[str, Any]) -> Iterator[Buffer]:
    """Yield what a parameter's state holds, whether or not its group asks for it now."""
    return (buffer for buffer in BUFFERS if buffer.key in held)


def check_value(buffer: Buffer, value: Any, param: Tensor, where: str, remedy: str) -> None:
    """Check what state or a checkpoint holds of a buffer.

    Args:
        buffer: which one.
        value: what is held.
        param: the parameter.
        where: names the value.
        remedy: what to do about it.

    Raises:
        ValueError: it is no dense tensor of floating-point numbers (complex for a complex
            parameter) with values, or its shape is not the parameter's. Of a buffer of ``rows``
            the shape is free: that of another set starts anew. Of a parameter on meta, which is
            not stepped, the values are free.
    """
    is_complex = param.is_complex() and buffer.shape == "parameter"
    if not isinstance(value, Tensor) or not (
        value.is_complex() if is_complex else value.is_floating_point()
    ):
        kind = "complex" if is_complex else "floating-point"
        example = torch.complex64 if is_complex else torch.float32
        of_shape = f" of shape {tuple(param.shape)}" if buffer.shape == "parameter" else ""
        got = f"type {value.dtype}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"{where} must be a {kind} tensor{of_shape}, such as of {example}, got {got}; {remedy}"
        )
    if buffer.shape == "parameter" and value.shape != param.shape:
        raise ValueError(
            f"{where} has shape {tuple(value.shape)}, the parameter {tuple(param.shape)}; {remedy}"
        )
    if param.is_meta:
        return
    if value.is_meta:
        raise ValueError(
            f"{where} is on meta and holds no values; load it onto a real device, or start anew "
            "without it"
        )
    if value.layout != torch.strided:
        raise ValueError(f"{where} must be dense, got layout {value.layout}; {remedy}")
