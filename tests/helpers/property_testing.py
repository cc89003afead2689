"""Hypothesis; where it is missing, its tests are left out by name, and their neighbours run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest

__all__ = ["assume", "given", "settings", "st"]

try:
    from hypothesis import assume, given, settings
    from hypothesis import strategies as st
except ImportError:
    Test = TypeVar("Test", bound=Callable[..., Any])

    class _Anything:
        """Stands for every strategy, and for what makes and joins them."""

        def __getattr__(self, name: str) -> _Anything:
            return self

        def __call__(self, *arguments: Any, **options: Any) -> _Anything:
            return self

        def __or__(self, other: Any) -> _Anything:
            return self

    st = assume = _Anything()

    def settings(**options: Any) -> Callable[[Test], Test]:
        """Change nothing."""
        return lambda test: test

    def given(*strategies: Any, **named: Any) -> Callable[[Test], Test]:
        """Leave the test out."""
        return pytest.mark.skip(reason="hypothesis is not installed")
