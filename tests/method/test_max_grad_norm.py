"""Clipping by the norm of all gradients inside the step, and steps skipped for it."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.steady_steps import Pair, checked, new_pair, on_places_of_steady_steps
from helpers.support import Place, name_of, refused, unscaling
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from adamal_kernels import Adam, AdamAL, AdamALW, AdamW, Box
from adamal_kernels.backends import BACKENDS
from adamal_kernels.core.bucket import Bucket, BucketKey, DeviceScalars
from adamal_kernels.core.buffers import SecondMoment
from adamal_kernels.core.scalars import StepInputs, StepOptions
from adamal_kernels.core.storage import FORMATS, Format
from adamal_kernels.step.stepper import Stepper
from adamal_kernels.verify import different_values, same_bits

__all__ = ["checked", "new_pair"]  # fixtures

SHAPES = ((3, 5), (0,), (), (2, 3, 4, 5), (2100,))
CLASSES = (AdamAL, AdamALW, Adam, AdamW)


def make_params(place: Place, dtypes: Format = FORMATS[0]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in SHAPES:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        params.append(values.to(place.device, dtypes.param).requires_grad_())
        params[-1].grad_dtype = dtypes.grad
    return params


def groups_of(params: list[Tensor], **second: Any) -> list[dict[str, Any]]:
    return [{"params": params[:3]}, {"params": params[3:], "lr": 0.05, **second}]


def set_gradients(params: list[Tensor], seed: int, scale: float = 1.0) -> None:
    """Set gradients drawn anew; one parameter in turn has none."""
    generator = torch.Generator().manual_seed(seed)
    for i, param in enumerate(params):
        values = torch.randn(param.shape, generator=generator, dtype=torch.float64) * scale
        grad = values.to(param.device, param.grad_dtype or param.dtype)
        param.grad = None if seed % 5 == i else grad


def values_of(optimizer: Any, params: list[Tensor]) -> list[dict[str, Tensor]]:
    """Return parameters, and the state of those that have taken a step."""
    states = [optimizer.state.get(param, {}) for param in params]
    stepped = [state if state and state["step"] > 0 else {} for state in states]
    return [{"param": p.detach(), **held} for p, held in zip(params, stepped, strict=True)]


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_it_is_torchs_clipping_and_a_plain_step(place: Place, cls: type, capturable: bool) -> None:
    """Some steps are clipped and some are not."""
    options = {"lr": 0.1, "backend": place.backend}
    ours, theirs = make_params(place), make_params(place)
    optimizer = cls(groups_of(ours), max_grad_norm=20.0, capturable=capturable, **options)
    plain = cls(groups_of(theirs), **options)
    norms = []
    for step in range(6):
        for params in (ours, theirs):
            set_gradients(params, step, 0.1 + 0.2 * step)
        norms.append(clip_grad_norm_(theirs, 20.0))
        plain.step()
        optimizer.step()
        assert optimizer.last_grad_norm is not None
        torch.testing.assert_close(optimizer.last_grad_norm.float(), norms[-1])
    assert min(norms) < 20 < max(norms)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(values_of(optimizer, ours), values_of(plain, theirs))


@pytest.mark.parametrize("max_norm", [1e-3, 0.7, 1e9])
@pytest.mark.parametrize("dtypes", FORMATS[:2], ids=name_of)
def test_gradients_are_multiplied_by_the_factor(
    place: Place, dtypes: Format, max_norm: float
) -> None:
    """By ``max_norm / (norm + 1e-6)``, rounded once; by nothing where that is 1 or more."""
    place.skip_unless_supported(dtypes)
    ours, theirs = make_params(place, dtypes), make_params(place, dtypes)
    optimizer = AdamAL(groups_of(ours), max_grad_norm=max_norm, backend=place.backend)
    plain = AdamAL(groups_of(theirs), backend="reference")
    for step in range(4):
        set_gradients(ours, step)
        optimizer.step()
        assert optimizer.last_grad_norm is not None
        factor = min(max_norm / (optimizer.last_grad_norm.item() + 1e-6), 1.0)
        for our, their in zip(ours, theirs, strict=True):
            their.grad = None
            if our.grad is not None:
                their.grad = our.grad * torch.tensor(factor, dtype=dtypes.param)
        plain.step()
    assert different_values(values_of(optimizer, ours), values_of(plain, theirs)) == []


@pytest.mark.parametrize("exponent", [-3, 0, 5])
@pytest.mark.parametrize("dtypes", FORMATS, ids=name_of)
def test_a_factor_that_is_a_power_of_two_is_exact(
    place: Place, dtypes: Format, exponent: int
) -> None:
    place.skip_unless_supported(dtypes)
    ours, theirs = make_params(place, dtypes), make_params(place, dtypes)
    optimizer = AdamAL(groups_of(ours), max_grad_norm=1.0, backend=place.backend)
    plain = AdamAL(groups_of(theirs), backend="reference")
    factor = min(2.0**exponent, 1.0)
    for step in range(3):
        set_gradients(ours, step)
        for our in ours:
            if our.grad is not None:
                # Of few digits: an eighth of float16's smallest numbers is none of them.
                our.grad.mul_(2**7).round_().div_(2**7)
        probe = AdamAL(ours, lr=0.0, max_grad_norm=1.0, backend="reference")
        probe.step()
        assert probe.last_grad_norm is not None
        optimizer.max_grad_norm = (probe.last_grad_norm.item() + 1e-6) * 2.0**exponent
        optimizer.step()
        for our, their in zip(ours, theirs, strict=True):
            their.grad = None if our.grad is None else our.grad * factor
        plain.step()
    assert different_values(values_of(optimizer, ours), values_of(plain, theirs)) == []


def test_last_grad_norm(place: Place) -> None:
    """Of the last step, before clipping; None where it was not asked for."""
    param = torch.zeros(2, device=place.device, requires_grad=True)
    optimizer = AdamAL([param], max_grad_norm=0.5, backend=place.backend)
    assert optimizer.last_grad_norm is None
    for size in (1.0, 2.0, 3.0):
        param.grad = torch.tensor([3.0 * size, 4.0 * size], device=place.device)
        optimizer.step()
        assert optimizer.last_grad_norm is not None
        assert optimizer.last_grad_norm.item() == 5 * size
        assert optimizer.last_grad_norm.shape == ()
        assert optimizer.last_grad_norm.dtype == torch.float64
        assert optimizer.last_grad_norm.device == place.device
        assert not optimizer.last_grad_norm.requires_grad
    kept = optimizer.last_grad_norm
    optimizer.max_grad_norm = None
    optimizer.step()
    assert optimizer.last_grad_norm is None
    assert kept.item() == 15
    assert param.grad.tolist() == [9, 12]


@pytest.mark.parametrize("name", ["foreach", "reference"])
def test_the_device_is_not_waited_for(name: str) -> None:
    """On a device without values, whose numbers can only be asked for in vain."""
    device = torch.device("meta")
    made = [torch.empty(5000, device=device) for _ in range(4)]
    with pytest.raises(RuntimeError, match=r"item\(\) cannot be called on meta"):
        made[0].sum().item()
    key = BucketKey(device, FORMATS[0], SecondMoment.MONOTONE, device_scalars=True)
    params, grads, *moments = ([tensor] for tensor in made)
    bucket = Bucket(key, params, grads, rows=[0])
    bucket.buffers |= zip(("exp_avg", "exp_avg_sq"), moments, strict=True)
    lr, scale, found_inf, count = (torch.empty((), device=device) for _ in range(4))
    stepper = Stepper()
    inputs = StepInputs(grad_scale=scale, found_inf=found_inf, max_grad_norm=1.0)
    inputs = stepper._complete(inputs, [(BACKENDS[name], bucket)])
    options = StepOptions(lr, 0.9, 0.999, 1e-8, 0.1, False, False, True, -1.0, 1.0)
    bucket.device_scalars = DeviceScalars([options], [count], inputs)
    BACKENDS[name].step(bucket)
    assert stepper.grad_norm is not None
    assert stepper.skipped_steps is not None
    assert stepper.grad_norm.device == stepper.skipped_steps.device == device
    written = (made[0], *made[2:], count, stepper.skipped_steps)
    assert all(tensor._version > 0 for tensor in written)


# Which steps of twelve have a gradient that is not finite: the first, whose state is not made
# yet; those that C++ takes without Python's check; two in a row; and one right after them.
SPOILED = (0, 1, 4, 7, 8, 10)


def spoil(params: list[Tensor], value: float) -> None:
    grad = params[4].grad if params[4].grad is not None else params[0].grad
    assert grad is not None
    grad.view(-1)[-1] = value


@pytest.mark.parametrize("second", [{}, {"capturable": True}], ids=["host", "mixed"])
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_norm_that_is_not_finite_skips_the_step_whole(
    place: Place, value: float, capturable: bool, second: dict[str, Any]
) -> None:
    """Parameters, state and counts are those of a run without the step."""
    ours, theirs = make_params(place), make_params(place)
    options = {"lr": 0.1, "projection": Box(-1, 1), "weight_decay": 0.1, "max_grad_norm": 3.0}
    optimizer = AdamAL(
        groups_of(ours, **second), backend=place.backend, capturable=capturable, **options
    )
    reference = AdamAL(groups_of(theirs), backend="reference", **options)
    both = ((optimizer, ours), (reference, theirs))
    assert optimizer.skipped_steps.item() == 0
    for step in range(12):
        set_gradients(ours, step)
        if step not in SPOILED:
            set_gradients(theirs, step)
            reference.step()
        else:
            spoil(ours, value)
        before = [param.detach().clone() for param in ours]
        versions = [param._version for param in ours]
        optimizer.step()
        if step in SPOILED:
            assert all(same_bits(a, b) for a, b in zip(ours, before, strict=True))
            if place.device.type == "cpu" and not capturable and not second:
                assert [param._version for param in ours] == versions
                made = [[p in o.state for p in ps] for o, ps in both]
                assert made[0] == made[1], "a step that is skipped makes no state"
        assert optimizer.skipped_steps.item() == sum(s <= step for s in SPOILED)
        for held in optimizer.state.values():
            assert held["step"] > 0 or not (held["exp_avg"].any() or held["exp_avg_sq"].any())
        assert different_values(values_of(optimizer, ours), values_of(reference, theirs)) == []
    assert optimizer.skipped_steps.dtype == torch.int64
    assert reference.skipped_steps.item() == 0


@on_places_of_steady_steps
@pytest.mark.parametrize("on_device", [False, True])
def test_skipped_or_not_steps_are_repeated_without_python(
    new_pair: Callable[..., Pair], checked: list[str], on_device: bool
) -> None:
    def spoil_last(optimizer: Any, params: list[Tensor]) -> None:
        for p in params:
            p.grad = torch.ones_like(p, requires_grad=False)
        params[-1].grad[-1] = math.nan
        optimizer.step()

    def told_of_infinity(optimizer: Any, params: list[Tensor]) -> None:
        params[-1].grad[-1] = 1
        optimizer.found_inf = torch.ones(())
        optimizer.step()
        optimizer.found_inf = torch.zeros(())
        optimizer.grad_scale = torch.full((1,), 3.0)

    pair = new_pair(max_grad_norm=2.0, capturable=on_device)
    pair.step(2)
    checked.clear()
    for change in (spoil_last, told_of_infinity, spoil_last):
        pair.both(change)
        pair.assert_equal()
        pair.step(2)
        pair.assert_equal()
    assert [optimizer.skipped_steps.item() for optimizer in pair.optimizers] == [3, 3]
    assert checked == []


def test_the_count_of_skipped_steps_is_a_copy(place: Place) -> None:
    param = torch.zeros(2, device=place.device, requires_grad=True)
    optimizer = AdamAL([param], max_grad_norm=1.0, backend=place.backend)
    param.grad = torch.full_like(param, math.nan)
    optimizer.step()
    first = optimizer.skipped_steps
    optimizer.step()
    first.add_(40)
    assert optimizer.skipped_steps.item() == 2


def test_without_it_nothing_is_skipped(place: Place) -> None:
    param = torch.zeros(2, device=place.device, requires_grad=True)
    optimizer = AdamAL([param], backend=place.backend)
    param.grad = torch.tensor([math.nan, 1.0], device=place.device)
    optimizer.step()
    assert param[0].isnan()
    assert optimizer.skipped_steps.item() == 0


@pytest.mark.parametrize("cls", [AdamAL, unscaling(AdamAL)], ids=["scaler's", "step's"])
@pytest.mark.parametrize("capturable", [False, True])
def test_with_a_grad_scaler(place: Place, capturable: bool, cls: type) -> None:
    """The norm is that of the unscaled gradients; an infinite one is skipped once, not twice."""
    ours, theirs = make_params(place), make_params(place)
    options = {"lr": 0.1, "max_grad_norm": 3.0}
    optimizer = cls(ours, backend=place.backend, capturable=capturable, **options)
    reference = AdamAL(theirs, backend="reference", **options)
    scaler = torch.amp.GradScaler(place.device.type, init_scale=2.0**10, growth_interval=2)
    infinite = (2, 3, 6)
    for step in range(8):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        scaler.scale(torch.zeros((), device=place.device))
        for param in ours:
            if param.grad is not None:
                param.grad *= scaler.get_scale()
        if step in infinite:
            spoil(ours, math.inf)
        else:
            reference.step()
        scaler.step(optimizer)
        scaler.update()
        skipped = sum(s <= step for s in infinite) if cls is not AdamAL else 0
        assert optimizer.skipped_steps.item() == skipped
        if step not in infinite:
            assert reference.last_grad_norm is not None
            assert same_bits(optimizer.last_grad_norm, reference.last_grad_norm)
    assert scaler.get_scale() != 2.0**10
    assert different_values(values_of(optimizer, ours), values_of(reference, theirs)) == []


BAD = [
    *[(value, ValueError, ["Invalid max_grad_norm", repr(value), "> 0"]) for value in (0, 0.0, -1)],
    *[(value, ValueError, ["max_grad_norm", repr(value)]) for value in (math.nan, math.inf)],
    *[(value, TypeError, ["max_grad_norm must be a number"]) for value in (True, "1", [1.0])],
    (torch.tensor(1.0), TypeError, ["max_grad_norm must be a number", ".item()"]),
]


@pytest.mark.parametrize(("value", "error", "words"), BAD, ids=lambda v: repr(v)[:20])
def test_what_is_no_norm_is_refused(value: Any, error: type[Exception], words: list[str]) -> None:
    param = nn.Parameter(torch.ones(2))
    with pytest.raises(error) as caught:
        AdamAL([param], max_grad_norm=value)
    assert [word for word in words if word not in str(caught.value)] == []
    optimizer = AdamAL([param], max_grad_norm=2)
    with refused(optimizer, error, *words):
        optimizer.max_grad_norm = value
    assert optimizer.max_grad_norm == 2.0
    assert isinstance(optimizer.max_grad_norm, float)


def test_a_changed_norm_is_seen_on_the_next_step(place: Place) -> None:
    ours, theirs = make_params(place), make_params(place)
    optimizer = AdamAL(ours, backend=place.backend)
    reference = AdamAL(theirs, backend="reference")
    for step, norm in enumerate((None, None, 1.0, 1.0, 5.0, 5.0, None, None, 0.1, 0.2)):
        for both, params in ((optimizer, ours), (reference, theirs)):
            set_gradients(params, step)
            both.max_grad_norm = norm
            both.step()
    assert different_values(values_of(optimizer, ours), values_of(reference, theirs)) == []


def _torch_save(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value)), _torch_save]
)
def test_copies_keep_it_and_the_count(place: Place, copied: Callable[[Any], Any]) -> None:
    params = make_params(place)
    optimizer = AdamAL(params, max_grad_norm=2.5, backend=place.backend)
    for step in range(3):
        set_gradients(params, step)
        if step == 1:
            spoil(params, math.nan)
        optimizer.step()
    other_params, other = copied((params, optimizer))
    assert (other.max_grad_norm, other.skipped_steps.item()) == (2.5, 1)
    assert other.last_grad_norm is None
    for both in (params, other_params):
        set_gradients(both, 3)
        spoil(both, math.inf)
    other.step()
    assert (optimizer.skipped_steps.item(), other.skipped_steps.item()) == (1, 2)
    optimizer.step()
    for step in (4, 5):
        for both, made in ((params, optimizer), (other_params, other)):
            set_gradients(both, step)
            made.step()
    assert different_values(values_of(other, other_params), values_of(optimizer, params)) == []


def test_a_checkpoint_leaves_it_and_the_count_as_they_are(place: Place) -> None:
    params = make_params(place)
    optimizer = AdamAL(params, max_grad_norm=2.5, backend=place.backend)
    set_gradients(params, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    spoil(params, math.nan)
    optimizer.step()
    optimizer.load_state_dict(saved)
    assert (optimizer.max_grad_norm, optimizer.skipped_steps.item()) == (2.5, 1)
    set_gradients(params, 1)
    spoil(params, math.nan)
    optimizer.step()
    assert optimizer.skipped_steps.item() == 2


class TestSpike:
    """One wild gradient in a run of ordinary ones, all of the same sign: ``lr`` a step."""

    STEPS, AT, SIZE, LR = 100, 20, 1e6, 0.1

    def late_steps(self, place: Place, **options: Any) -> Tensor:
        """Return how far each of the last steps went, in units of the learning rate."""
        param = torch.zeros(4, device=place.device, requires_grad=True)
        optimizer = AdamAL([param], lr=self.LR, backend=place.backend, **options)
        positions = []
        for step in range(self.STEPS):
            param.grad = torch.full_like(param, self.SIZE if step == self.AT else 1.0)
            optimizer.step()
            positions.append(param.detach().clone())
        return -torch.stack(positions[80:]).diff(dim=0) / self.LR

    def test_freezes_its_coordinates(self, place: Place) -> None:
        assert self.late_steps(place).max() < 1e-2

    def test_hardly_slows_those_that_are_clipped(self, place: Place) -> None:
        assert self.late_steps(place, max_grad_norm=2.5).min() > 0.9
