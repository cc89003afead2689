"""Prepared launches of the Triton step: the same as Triton's own, without what those find out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any

import pytest
from helpers import triton_driver as checks
from helpers.support import name_of

from adamal_kernels.core.storage import FORMATS, Format

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

Run = Callable[..., None]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs a check in the process that has the driver; its failure is the caller's."""
    with ProcessPoolExecutor(
        1,
        get_context("spawn"),
        initializer=checks.start,
        initargs=(tmp_path_factory.mktemp("driver"),),
    ) as worker:

        def run(check: Callable[..., None], *args: Any) -> None:
            worker.submit(check, *args).result()

        yield run


@pytest.mark.parametrize("offset", [0, 8])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("dtypes", FORMATS[:3], ids=name_of)
def test_is_the_launch_that_triton_makes(
    driver: Run, dtypes: Format, aligned: bool, offset: int
) -> None:
    driver(checks.check_same_launch, dtypes, aligned, offset)


def test_every_kernel_launches_twice(driver: Run) -> None:
    driver(checks.check_every_kernel_launches_twice)


def test_tables_are_specialized_for(driver: Run) -> None:
    driver(checks.check_tables_are_specialized_for)


@pytest.mark.parametrize("version", [None, "3.6.0", "3.7.1+git1234", "3.9.1"])
def test_known_versions_launch_the_compiled_kernel(driver: Run, version: str | None) -> None:
    driver(checks.check_route, version, False)


@pytest.mark.parametrize("version", ["3.10.0", "4.0.0"])
def test_later_versions_launch_by_grid(driver: Run, version: str) -> None:
    driver(checks.check_route, version, True)


def test_without_a_compiled_kernel_launches_by_grid(driver: Run) -> None:
    driver(checks.check_route_without_a_compiled_kernel)
