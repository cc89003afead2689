"""Fixtures that the tests share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("helpers")

from helpers import triton_interpreter  # noqa: E402
from helpers.between_workers import is_worker  # noqa: E402
from helpers.support import DEVICES, PLACES, Place, is_on_gpu  # noqa: E402

# For tests of benchmarks/, whichever way pytest was started. Last: where a copy of the package is
# under test, it goes first.
sys.path.append(str(Path(__file__).parents[1]))

try:
    from hypothesis import settings
except ImportError:  # Machines lent for their GPU may lack it; the tests that need it say so.
    pass
else:
    # A busy machine is no failure.
    settings.register_profile("suite", deadline=None)
    settings.load_profile("suite")


if os.environ.get("TRITON_INTERPRET") == "1":
    triton_interpreter.start()


# Session scope, as hypothesis asks of fixtures that all examples of a test share.
@pytest.fixture(scope="session", params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device there is here."""
    return request.param


@pytest.fixture(scope="session", params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    """Every backend that can run here, on every device that it can run on."""
    return request.param


@pytest.fixture(scope="session")
def session_folder(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of temporary files that all workers of a run share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if is_worker(pytestconfig) else folder


# First: pytest's own hook selects by these marks.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is on a GPU, however it came by its place.

    Put first what takes nvcc half a minute each: as the last test it would keep a core idle.
    """
    for item in items:
        if isinstance(item, pytest.Function) and is_on_gpu(item):
            item.add_marker(pytest.mark.gpu)
    items.sort(key=lambda item: "machine_code" not in item.path.name)
