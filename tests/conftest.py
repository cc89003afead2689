"""Fixtures that the tests share."""

from __future__ import annotations

import pytest
import torch
from support import DEVICES, PLACES, Place


# Session scope, as hypothesis asks of fixtures that all examples of a test share.
@pytest.fixture(scope="session", params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device there is here."""
    return request.param


@pytest.fixture(scope="session", params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    """Every backend that can run here, on every device that it can run on."""
    return request.param
