"""Scalars derived where the step runs: the bits of those that the host derives."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.property_testing import given, st
from helpers.steady_steps import (
    Pair,
    checked,
    new_pair,
    on_places_of_steady_steps,
    skip_all,
    with_gradients_missing,
)
from helpers.support import Place
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from adamal_kernels import Adam, AdamAL, Box
from adamal_kernels.backends import BACKENDS
from adamal_kernels.core.bucket import Bucket, BucketKey, DeviceScalars
from adamal_kernels.core.buffers import SecondMoment
from adamal_kernels.core.norm import ordered_sum
from adamal_kernels.core.scalars import (
    StepInputs,
    StepOptions,
    beta_power,
    derive_step_scalars,
    gradient_factor,
)
from adamal_kernels.core.stats import WORDS
from adamal_kernels.core.storage import FORMATS, Format
from adamal_kernels.step.options import check_capturable
from adamal_kernels.verify import Values, different_values, run_case, same_bits
from adamal_kernels.verify.cases import Case, cases

__all__ = ["checked", "new_pair"]  # fixtures

STEPS = 6
BETAS = (0.0, 0.1, 0.5, 0.9, 0.95, 0.99, 0.999, 0.9999, 1 - 2.0**-53)
# The last is where float32 counts end.
EXPONENTS = (*range(1000), 4095, 4096, 4097, 65535, 10**5, 10**6 + 1, 2**23 - 1, 2**24)


def bits_of(value: Any) -> list[str]:
    """Return the bits of a number, or of each number in a tensor."""
    values = value.flatten().tolist() if isinstance(value, Tensor) else [value]
    return [float(number).hex() for number in values]


@pytest.mark.parametrize("beta", BETAS)
def test_beta_power_of_tensors_is_that_of_numbers(beta: float) -> None:
    exponents = torch.tensor(EXPONENTS)
    expected = [beta_power(beta, exponent) for exponent in EXPONENTS]
    for base in (beta, torch.tensor(beta, dtype=torch.float64)):
        found = beta_power(base, exponents)
        assert found.dtype == torch.float64
        assert bits_of(found) == [power.hex() for power in expected]


finite = {"allow_nan": False, "allow_infinity": False}
OPTIONS = st.builds(
    StepOptions,
    lr=st.floats(0, **finite),
    beta1=st.floats(0, 1, exclude_max=True),
    beta2=st.floats(0, 1, exclude_max=True),
    eps=st.floats(0, **finite),
    weight_decay=st.floats(0, **finite),
    decoupled_weight_decay=st.booleans(),
    maximize=st.booleans(),
    bias_correction=st.booleans(),
    lower=st.sampled_from([-math.inf, -1.0]),
    upper=st.sampled_from([1.0, math.inf]),
)


def as_tensors(options: StepOptions, names: list[str]) -> StepOptions:
    values = {name: torch.tensor(getattr(options, name), dtype=torch.float64) for name in names}
    return options._replace(**values)


@given(
    OPTIONS,
    st.lists(st.integers(1, 2**24), min_size=1, max_size=4),
    st.floats(),
    st.sets(st.sampled_from(["lr", "beta1", "beta2", "eps", "weight_decay"])),
)
def test_scalars_of_tensors_are_those_of_numbers(
    options: StepOptions, steps: list[int], factor: float, names: set[str]
) -> None:
    """Whichever of them are tensors; counts as a vector have a row of scalars each."""
    rows = [derive_step_scalars(step, options, factor) for step in steps]
    found = derive_step_scalars(
        torch.tensor(steps),
        as_tensors(options, sorted(names)),
        torch.tensor(factor, dtype=torch.float64),
    )
    for name, value in found._asdict().items():
        numbers = bits_of(value)
        expected = [bits_of(getattr(row, name))[0] for row in rows]
        assert expected == (numbers if len(numbers) == len(rows) else numbers * len(rows)), name


# What GradScaler and a norm may be, the ends of their ranges included.
SCALES = st.none() | st.floats(0, width=32)
NORMS = st.none() | st.floats(0) | st.just(math.nan)


@given(SCALES, st.sampled_from([None, 0.0, 1.0, 2.0]), NORMS, st.floats(0, exclude_min=True))
def test_factor_of_tensors_is_that_of_numbers(
    scale: float | None, found_inf: float | None, norm: float | None, max_norm: float
) -> None:
    inputs = (scale, found_inf, norm)
    expected = gradient_factor(*inputs, max_norm)
    tensors = [None if x is None else torch.tensor(x, dtype=torch.float64) for x in inputs]
    found = gradient_factor(*tensors, max_norm)
    assert bits_of(found.factor) == bits_of(expected.factor)
    assert bool(found.skip) is expected.skip
    norm_is_finite = norm is None or math.isfinite(norm)
    assert expected.skip is (bool(found_inf) or not norm_is_finite)


def case_of(case: Case, **options: Any) -> Case:
    return dataclasses.replace(case, options={**case.options, **options})


# A fifth of the table: all variants in float32, and one of each other pair of types.
CASES = [
    case
    for case in cases()
    if case.dtypes == FORMATS[0] or case.variant == "box, special gradients"
]


@functools.cache
def of_the_host(case: Case, device: torch.device) -> Values:
    return run_case(case, "reference", device, STEPS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_capturable_gives_the_same_bits(place: Place, case: Case) -> None:
    """Groups, layouts, empty tensors and missing gradients among the cases."""
    place.skip_unless_supported(case.dtypes, case.second_moment)
    expected = of_the_host(case, place.device)
    capturable = case_of(case, capturable=True)
    found = run_case(capturable, place.backend, place.device, STEPS)
    assert different_values(found, expected) == []
    assert {values["step"].device for values in found} == {place.device}


def test_one_group_of_two_is_capturable(place: Place) -> None:
    case = next(c for c in CASES if c.variant == "box")
    mixed = dataclasses.replace(case, other_options={**case.other_options, "capturable": True})
    found = run_case(mixed, place.backend, place.device, STEPS)
    assert different_values(found, of_the_host(case, place.device)) == []


def capturable(place: Place, **options: Any) -> Pair:
    return Pair(place, capturable=True, weight_decay=0.1, projection=Box(-0.5, 0.5), **options)


def assert_steady(pair: Pair, checked: list[str], change: Callable[[Any, Any], None]) -> None:
    """Check that the step after a change takes it over, and C++ without Python."""
    pair.step(2)
    pair.assert_equal()
    checked.clear()
    for _ in range(3):
        pair.both(change)
        pair.step(2)
        pair.assert_equal()
    assert checked == []


@on_places_of_steady_steps
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tensors_changed_in_place_are_seen(
    new_pair: Callable[..., Pair], checked: list[str], dtype: torch.dtype, on_device: bool
) -> None:
    def change(optimizer: Any, params: Any) -> None:
        group = optimizer.param_groups[0]
        group["lr"].mul_(0.5)
        for beta in group["betas"]:
            beta.mul_(0.9)

    tensors = {
        "lr": torch.tensor([0.1], dtype=dtype),
        "betas": (torch.tensor(0.9, dtype=dtype), torch.tensor([[0.99]], dtype=dtype)),
    }
    pair = new_pair(capturable=on_device, projection=Box(-0.5, 0.5))
    pair.both(lambda optimizer, _: optimizer.param_groups[0].update(clones(tensors)))
    before = [p.detach().clone() for p in pair.params[0]]
    assert_steady(pair, checked, change)
    assert not same_bits(pair.params[0][0], before[0])


def clones(options: dict[str, Any]) -> dict[str, Any]:
    copied = {name: torch.clone(v) for name, v in options.items() if isinstance(v, Tensor)}
    betas = tuple(torch.clone(beta) for beta in options["betas"])
    return {**options, **copied, "betas": betas}


@on_places_of_steady_steps
@pytest.mark.parametrize("on_device", [False, True])
def test_numbers_become_tensors_and_back(
    new_pair: Callable[..., Pair], checked: list[str], on_device: bool
) -> None:
    values = iter(
        [
            *(torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)),
            *(0.2, 0.2),
            *(torch.tensor(0.0), torch.tensor([0.0])),
        ]
    )

    def change(optimizer: Any, params: Any) -> None:
        value = next(values)
        optimizer.param_groups[0]["lr"] = value
        optimizer.param_groups[1]["betas"] = (value, value)

    assert_steady(new_pair(capturable=on_device, projection=Box(-0.5, 0.5)), checked, change)


@on_places_of_steady_steps
@pytest.mark.parametrize("change", [with_gradients_missing, skip_all])
def test_gradients_come_and_go(
    place: Place, checked: list[str], change: Callable[[Any, Any], None]
) -> None:
    assert_steady(capturable(place), checked, change)


def test_tensor_of_float64_is_the_number(place: Place) -> None:
    """One of float32 is another number, 0.1 the other side of its rounding."""
    params = [torch.linspace(-1, 1, 9, dtype=torch.float64) for _ in range(3)]
    params = [param.to(place.device).requires_grad_() for param in params]
    numbers = {"lr": 0.1, "betas": (0.9, 0.99)}
    options: list[dict[str, Any]] = [numbers]
    for dtype in (torch.float64, torch.float32):
        lr, *betas = (torch.tensor(v, dtype=dtype, device=place.device) for v in (0.1, 0.9, 0.99))
        options.append({"lr": lr, "betas": tuple(betas)})
    optimizers = [
        AdamAL([param], backend=place.backend, **option)
        for param, option in zip(params, options, strict=True)
    ]
    for step in range(5):
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = torch.linspace(1, -2, 9, dtype=torch.float64, device=place.device) + step
            optimizer.step()
    assert same_bits(params[0], params[1])
    assert not same_bits(params[0], params[2])


@pytest.mark.parametrize("on_device", [False, True])
def test_tensor_lr_of_0_does_not_project(place: Place, on_device: bool) -> None:
    param = torch.tensor([-3.0, 3.0], device=place.device, requires_grad=True)
    lr = torch.tensor(0.0, device=place.device)
    options = {"lr": lr, "projection": Box(-1, 1), "backend": place.backend}
    optimizer = AdamAL([param], capturable=on_device, **options)
    for _ in range(2):
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert param.tolist() == [-3, 3]
    lr.fill_(1e-3)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert param.tolist() == [-1, 1]


@pytest.mark.parametrize("edit", [math.nan, math.inf, -1.0])
def test_a_count_edited_in_place_is_refused(place: Place, edit: float) -> None:
    if place.device.type != "cpu":
        pytest.skip("a count on the device is not read: that would be to wait for it")
    param = torch.ones(3, requires_grad=True)
    optimizer = AdamAL([param], backend=place.backend, capturable=True)
    for _ in range(3):
        param.grad = torch.ones_like(param)
        optimizer.step()
    optimizer.state[param]["step"].fill_(edit)
    with pytest.raises(ValueError, match=r"state\['step'\] of params\[0\] of group 0"):
        optimizer.step()


@pytest.mark.parametrize("count", [1, 99, 2.0**24 - 1, 2.0**24, 2.0**25, 2.0**30])
def test_counts_of_any_size(place: Place, count: float) -> None:
    """Float32 counts up to 2^24; a larger one, of a checkpoint, stands still."""
    start = torch.linspace(-1, 1, 9, dtype=torch.float64, device=place.device)
    params = [start.clone().requires_grad_() for _ in range(2)]
    optimizers = [
        AdamAL([param], betas=(0.9, 1 - 2.0**-30), backend=backend, capturable=on_device)
        for param, backend, on_device in zip(
            params, (place.backend, "reference"), (True, False), strict=True
        )
    ]
    for step in range(4):
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = start + 2
            optimizer.step()
            if step == 0:
                optimizer.state[param]["step"].fill_(count)
    found, expected = (
        {"param": param, **optimizer.state[param]}
        for param, optimizer in zip(params, optimizers, strict=True)
    )
    assert different_values([found], [expected]) == []


class NothingWaits(TorchFunctionMode):
    """Fails where a device would be waited for: its values read, or the host's copied there."""

    READ = (
        *(Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.__bool__),
        *(Tensor.__float__, Tensor.__int__, Tensor.__index__),
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in self.READ, func
        if func in (torch.tensor, torch.as_tensor):
            assert isinstance(args[0], Tensor), f"{func.__name__}({args[0]}) is copied there"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("second_moment", SecondMoment, ids=lambda moment: moment.name.lower())
@pytest.mark.parametrize("backend", ["foreach", "reference"])
def test_eager_steps_wait_for_nothing(backend: str, second_moment: SecondMoment) -> None:
    """By operators alone, which a CUDA graph can capture; norms and records too."""
    key = BucketKey(torch.device("cpu"), FORMATS[0], second_moment, device_scalars=True)
    bucket = Bucket(key, rows=[0, 1, 2, 3])
    streams = [bucket.params, bucket.grads, *bucket.elementwise_buffers]
    for stream in streams:
        stream.extend(torch.ones(5) for _ in bucket.rows)
    bucket.records = [torch.zeros(1, WORDS, dtype=torch.int64) for _ in bucket.rows]
    numbers = (0.1, 0.9, 0.99)
    tensors = (torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.9), torch.tensor(0.99))
    options = [
        StepOptions(*scalars, 1e-8, 0.1, decoupled, decoupled, True, -1.0, 1.0)
        for scalars in (numbers, tensors)
        for decoupled in (False, True)
    ]
    inputs = StepInputs(torch.ones(1), torch.zeros(1), torch.ones(()).double(), 0.5)
    steps = [torch.zeros(()) for _ in bucket.rows]
    bucket.device_scalars = DeviceScalars(options, steps, inputs)
    with NothingWaits(), torch.no_grad():
        BACKENDS[backend].step(bucket)
        BACKENDS[backend].squared_norm(bucket)
    assert [step.item() for step in steps] == [1.0] * len(steps)


class Copies(TorchDispatchMode):
    """Remembers the operators that read what is on the CPU to make what is elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in (*args, result) if isinstance(t, Tensor)}
        if len(devices) > 1:
            self.found.append(func)
        return result


def test_host_tensors_are_filled_in_and_not_copied() -> None:
    """An asynchronous copy might read them after their owner has changed them."""
    elsewhere = torch.device("meta")
    options = derive_options(lr=torch.tensor([0.1]), beta1=torch.tensor(0.9).double())
    inputs = StepInputs(torch.ones(1), torch.zeros(1), torch.ones(()).double())
    with Copies() as copies:
        moved = [*options.on_device(elsewhere)[:2], *inputs.to(elsewhere)[:3]]
        moved.append(ordered_sum([torch.ones((), device=elsewhere), torch.ones(()).double()]))
    assert copies.found == []
    assert [tensor.device for tensor in moved] == [elsewhere] * 6
    assert [tensor.dtype for tensor in moved[:2]] == [torch.float32, torch.float64]


def derive_options(**changes: Any) -> StepOptions:
    return StepOptions(0.1, 0.9, 0.99, 1e-8, 0.0, False, False, True)._replace(**changes)


@pytest.mark.parametrize("name", ["lr", "betas"])
def test_host_tensors_are_not_captured(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A replay would take the value that they had."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    param = mock.Mock(is_cuda=True)
    group = {"params": [param], "capturable": True, "lr": 0.1, "betas": (0.9, 0.99)}
    assert check_capturable([group], "AdamAL") is True
    value = torch.tensor(0.1)
    group[name] = value if name == "lr" else (0.9, value)
    with pytest.raises(RuntimeError, match=f"{name} of group 0 holds a Tensor on the CPU"):
        check_capturable([group], "AdamAL")
    param.is_cuda = False
    assert check_capturable([group], "AdamAL") is True


@on_places_of_steady_steps
def test_switched_in_a_running_optimizer(new_pair: Callable[..., Pair]) -> None:
    pair = new_pair()
    for on_device in (True, False, True):
        pair.step(2)
        for group in pair.optimizers[0].param_groups:
            group["capturable"] = on_device
    pair.step(2)
    pair.assert_equal()


BAD_TENSORS = {
    "lr that is negative": ("lr", torch.tensor(-1.0), ValueError, "lr=-1.0"),
    "lr that is no number": ("lr", torch.tensor(math.nan), ValueError, "lr=nan"),
    "lr of two": ("lr", torch.tensor([0.1, 0.1]), ValueError, "1-element"),
    "lr of integers": ("lr", torch.tensor(1), TypeError, "float32 or float64"),
    "lr of bfloat16": ("lr", torch.tensor(0.1).bfloat16(), TypeError, "float32 or float64"),
    "betas out of range": (
        "betas",
        (torch.tensor(0.9), torch.tensor(1.0)),
        ValueError,
        r"betas\[1\]=1.0",
    ),
}


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_a_tensor_that_is_no_option_is_refused_in_every_step(
    place: Place, kind: str, on_device: bool
) -> None:
    name, value, error, words = BAD_TENSORS[kind]
    param = torch.ones(3, device=place.device, requires_grad=True)
    optimizer = AdamAL([param], backend=place.backend, capturable=on_device)
    for _ in range(3):
        param.grad = torch.ones_like(param)
        optimizer.step()
    before = {"param": param.detach().clone(), **clone_state(optimizer, param)}
    optimizer.param_groups[0][name] = value
    with pytest.raises(error, match=words):
        optimizer.step()
    assert different_values([{"param": param, **optimizer.state[param]}], [before]) == []


def clone_state(optimizer: Any, param: Tensor) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in optimizer.state[param].items()}


@on_places_of_steady_steps
@pytest.mark.parametrize("capturable", [False, True])
def test_groups_of_several_types(place: Place, capturable: bool) -> None:
    """A plan's options are its own, where a group has parameters of several plans."""
    place.skip_unless_supported(Format(torch.bfloat16, torch.bfloat16))
    runs = []
    for backend in (place.backend, "reference"):
        params = [
            torch.ones(3, dtype=dtype, device=place.device, requires_grad=True)
            for dtype in (torch.float32, torch.bfloat16, torch.bfloat16, torch.float64)
        ]
        groups = [{"params": params[:2], "lr": 0.5}, {"params": params[2:], "lr": 0.125}]
        optimizer = AdamAL(groups, capturable=capturable, backend=backend)
        for step in range(4):
            for param in params:
                param.grad = torch.full_like(param, 1.0 + step, requires_grad=False)
            optimizer.step()
        runs.append([{"param": param, **optimizer.state[param]} for param in params])
    assert different_values(*runs) == []
    assert not torch.equal(runs[0][1]["param"], runs[0][2]["param"])


def test_one_cycle_over_tensors(place: Place) -> None:
    """The schedule replaces the first beta by a number and leaves the second a tensor."""
    found = []
    for cls, options in ((Adam, {"backend": place.backend}), (torch.optim.Adam, {})):
        param = torch.ones(3, device=place.device, dtype=torch.float64, requires_grad=True)
        lr, betas = torch.tensor(0.01), (torch.tensor(0.9), torch.tensor(0.99))
        optimizer = cls([param], lr=lr, betas=betas, **options)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=8)
        for _ in range(6):
            param.grad = param.detach() - 3
            optimizer.step()
            schedule.step()
        assert {type(beta) for beta in optimizer.param_groups[0]["betas"]} == {float, Tensor}
        found.append(param.detach())
    torch.testing.assert_close(*found)
