"""Warnings that point at the line of the user's program, whichever path led from there to here."""

from __future__ import annotations

import os
import sys
import sysconfig
import warnings
from pathlib import Path
from types import FrameType

import torch

__all__ = ["warn_user"]

_OURS = str(Path(__file__).parent) + os.sep
_TORCH = str(Path(torch.__file__).parent) + os.sep
_LIBRARIES = tuple(
    {
        str(Path(folder)) + os.sep
        for folder in (
            Path(torch.__file__).parents[1],
            *map(sysconfig.get_path, ("purelib", "platlib", "stdlib")),
        )
    }
)


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn with the file and line of the innermost frame that is no library's.

    Hooks, schedulers and trainers may lie between the user's call and this one, so no fixed
    ``stacklevel`` is right. Where every frame is a library's, the innermost is named that is
    neither this package's nor torch's; in a thread of torch's own, the caller.

    Example:
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     warn_user("this line is named")
        >>> str(caught[0].message)
        'this line is named'
    """
    frame = (
        _innermost((_OURS, "<frozen ", *_LIBRARIES))
        or _innermost((_OURS, "<frozen ", _TORCH))
        or sys._getframe(1)
    )
    warnings.warn_explicit(
        message,
        category,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _innermost(passed_over: tuple[str, ...]) -> FrameType | None:
    """Return the innermost frame whose file's name begins with none of these."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(passed_over):
        frame = frame.f_back
    return frame
