"""The suites' fixtures: where it is timed, and parity before anything is."""

from __future__ import annotations

import pytest
import torch

from adamal_kernels.bench.command import available_memory
from adamal_kernels.bench.run import Gate, Venue


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", help="where to time; by default the first GPU, else the CPU")


@pytest.fixture(scope="session")
def venue(request: pytest.FixtureRequest) -> Venue:
    name = request.config.getoption("--device")
    device = torch.device(name or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    return Venue(device, available_memory(device))


@pytest.fixture(scope="session")
def gate(venue: Venue) -> Gate:
    return Gate(venue.device)
