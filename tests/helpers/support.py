"""What the tests share: the backends usable here, and the check of a refusal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch.optim import Optimizer

from adamal_kernels.backends import BACKENDS
from adamal_kernels.core.bucket import BucketKey
from adamal_kernels.core.buffers import SecondMoment
from adamal_kernels.core.storage import FORMATS, Format
from adamal_kernels.step.sharded import local_part
from adamal_kernels.verify import devices, same_bits


class Place(NamedTuple):
    """A backend, and a device that it can step parameters on."""

    device: torch.device
    backend: str

    def skip_unless_supported(
        self, dtypes: Format, second_moment: SecondMoment = SecondMoment.MONOTONE
    ) -> None:
        """Skip the test where the backend leaves out this kind of bucket, and say why."""
        assert dtypes in FORMATS, "no backend supports it: the test would never run"
        key = BucketKey(self.device, dtypes, second_moment)
        if reason := BACKENDS[self.backend].unsupported(key):
            pytest.skip(f"{self.backend}: {reason}")


DEVICES = [pytest.param(device, id=device.type) for device in devices()]

PLACES = [
    pytest.param(Place(device, name), id=f"{name}-{device.type}")
    for device in devices()
    for name, backend in BACKENDS.items()
    if backend.unavailable(device) is None
]


def is_on_gpu(test: pytest.Function) -> bool:
    """Whether one of a test's parameters is a GPU, or a place on one."""
    values = test.callspec.params.values() if hasattr(test, "callspec") else ()
    found = [value.device if isinstance(value, Place) else value for value in values]
    return any(isinstance(value, torch.device) and value.type == "cuda" for value in found)


def name_of(dtypes: Format) -> str:
    """Return a short name of a pair of types, for test ids."""
    return "-".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes[:2]))


def unscaling(cls: type[Optimizer]) -> type[Optimizer]:
    """Return ``cls`` whose step unscales for a GradScaler on every backend, as with fused=True."""
    return type(cls.__name__, (cls,), {"_step_supports_amp_scaling": True})


@contextmanager
def refused(optimizer: Optimizer, error: type[Exception], *words: str) -> Iterator[None]:
    """Check that the body raises ``error`` with all ``words``, the optimizer left as it was."""
    groups, values = _snapshot(optimizer)
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message
    groups_after, values_after = _snapshot(optimizer)
    assert groups_after == groups
    assert values_after.keys() == values.keys()
    assert [name for name in values if not same_bits(values[name], values_after[name])] == []


def _snapshot(optimizer: Optimizer) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Return an optimizer's options, and copies of its parameters and state by name."""
    groups, values = [], {}
    for g, group in enumerate(optimizer.param_groups):
        groups.append({**group, "params": [id(param) for param in group["params"]]})
        for i, param in enumerate(group["params"]):
            held = {"param": param.detach(), **optimizer.state.get(param, {})}
            for name, value in held.items():
                if not isinstance(value, torch.Tensor) or value.is_meta:
                    continue
                if value.layout == torch.strided:
                    values[f"{g}.{i}.{name}"] = local_part(value.detach()).clone()
    return groups, values
