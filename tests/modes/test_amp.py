"""Mixed precision: torch.amp.GradScaler unscales and skips, or leaves both to the step itself.

The tests up to TestTheScalerDecides are of steps that unscale, of every backend.
"""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers.support import Place, name_of, unscaling
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_

import adamal_kernels
from adamal_kernels import Box
from adamal_kernels.core.storage import FORMATS, Format
from adamal_kernels.verify import different_values, same_bits

Adam, AdamAL, AdamALW, AdamW = (
    unscaling(getattr(adamal_kernels, name)) for name in ("Adam", "AdamAL", "AdamALW", "AdamW")
)
STEPS = 12
# A step's gradients are infinite: in the first, that has no state yet, in two running, and where
# nothing is checked in Python any more.
INFINITE = (0, 4, 5, 9)


@pytest.fixture(autouse=True)
def on_the_device(place: Place) -> Iterator[None]:
    """Scalers, parameters and losses are the place's."""
    with nullcontext() if place.device.type == "cpu" else place.device:
        yield


def new_scaler(scale: float = 2.0**12, **options: Any) -> GradScaler:
    """Return a scaler that grows and backs off within a few steps."""
    device = torch.get_default_device().type
    return GradScaler(device, init_scale=scale, growth_interval=2, **options)


def draw(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return the same values on every device."""
    values = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return values.to(torch.get_default_device())


def new_params(dtypes: Format = FORMATS[0]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in ((3, 4), (7,), (), (0,), (2050,)):
        values = draw(shape, generator)
        params.append(values.to(dtypes.param).requires_grad_())
        params[-1].grad_dtype = dtypes.grad
    return params


def loss_of(params: Iterable[Tensor], seed: int) -> Tensor:
    """Return a loss whose gradients do not depend on the parameters."""
    generator = torch.Generator().manual_seed(seed)
    factors = [draw(p.shape, generator) for p in params]
    loss = sum((p * f.to(p.dtype)).sum() for p, f in zip(params, factors, strict=True))
    assert isinstance(loss, Tensor)
    return loss.float() * (math.inf if seed in INFINITE else 1.0)


def values_of(optimizer: Any, params: list[Tensor]) -> list[dict[str, Tensor]]:
    """Return parameters, and the state of those that have taken a step."""
    states = [optimizer.state.get(param, {}) for param in params]
    stepped = [state if state and state["step"] > 0 else {} for state in states]
    return [{"param": p.detach(), **held} for p, held in zip(params, stepped, strict=True)]


def train(scaler: GradScaler, optimizer: Any, params: list[Tensor], seed: int) -> None:
    optimizer.zero_grad()
    scaler.scale(loss_of(params, seed)).backward()
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("scale", [2.0**12, 3000.0])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(("cls", "twin"), [(Adam, torch.optim.Adam), (AdamW, torch.optim.AdamW)])
def test_it_follows_torch_under_autocast(
    place: Place, cls: type, twin: type, amsgrad: bool, scale: float
) -> None:
    """The scale grows and backs off alike, the same steps are skipped."""
    models, scalers = [], [new_scaler(scale), new_scaler(scale)]
    for _ in range(2):
        torch.manual_seed(0)
        models.append(nn.Linear(6, 5))
    options = {"lr": 0.05, "weight_decay": 0.1, "amsgrad": amsgrad}
    optimizers = [
        cls(models[0].parameters(), backend=place.backend, **options),
        twin(models[1].parameters(), foreach=False, fused=False, **options),
    ]
    scales = []
    for step in range(STEPS):
        inputs = draw((8, 6), torch.Generator().manual_seed(step)).float()
        for model, optimizer, scaler in zip(models, optimizers, scalers, strict=True):
            optimizer.zero_grad()
            with torch.autocast(place.device.type, dtype=torch.bfloat16):
                outputs = model(inputs)
            assert outputs.dtype == torch.bfloat16
            # Linear, so that the two do not drift apart by more than their own roundings.
            loss = outputs.float().mean() * (math.inf if step in INFINITE else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        scales.append(scalers[0].get_scale())
        assert scalers[0].state_dict() == scalers[1].state_dict()
        for our, their in zip(*(model.parameters() for model in models), strict=True):
            torch.testing.assert_close(our, their)
            states = [o.state[p] for o, p in zip(optimizers, (our, their), strict=True)]
            # torch keeps its counts on the CPU.
            torch.testing.assert_close(*map(dict, states), check_device=False)
    changes = [math.log2(after / before) for before, after in itertools.pairwise(scales)]
    assert (min(changes), max(changes)) == (-1, 1)
    assert optimizers[0].skipped_steps.item() == len(INFINITE)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("cls", [AdamAL, AdamALW])
@pytest.mark.parametrize("dtypes", FORMATS, ids=name_of)
def test_it_is_the_plain_step_with_unscaled_gradients(
    place: Place, dtypes: Format, cls: type, capturable: bool
) -> None:
    """To the bit, as scales are powers of two; 16-bit gradients of 32-bit parameters included."""
    place.skip_unless_supported(dtypes)
    ours, theirs = new_params(dtypes), new_params(dtypes)
    options = {"lr": 0.05, "weight_decay": 0.1, "projection": Box(-1, 1)}
    optimizer = cls(ours, backend=place.backend, capturable=capturable, **options)
    reference = cls(theirs, backend="reference", **options)
    # Small, for float16: gradients must lose nothing when they are scaled.
    scaler = new_scaler(4.0)
    for step in range(STEPS):
        train(scaler, optimizer, ours, step)
        if step not in INFINITE:
            reference.zero_grad()
            loss_of(theirs, step).backward()
            reference.step()
        assert different_values(values_of(optimizer, ours), values_of(reference, theirs)) == []
        assert optimizer.skipped_steps.item() == sum(s <= step for s in INFINITE)


@pytest.mark.parametrize("scale", [4.0, 3.7])
def test_any_scale_gives_the_same_bits(place: Place, scale: float) -> None:
    results = []
    for backend in (place.backend, "reference"):
        params, scaler = new_params(), new_scaler(scale)
        optimizer = AdamAL(params, lr=0.05, backend=backend, max_grad_norm=2.0)
        for step in range(STEPS):
            train(scaler, optimizer, params, step)
        results.append(values_of(optimizer, params))
    assert different_values(*results) == []


def test_gradients_stay_scaled(place: Place) -> None:
    params, scaler = new_params(), new_scaler()
    optimizer = AdamAL(params, backend=place.backend)
    for step in (1, 2, 3):
        optimizer.zero_grad()
        scaler.scale(loss_of(params, step)).backward()
        before = [param.grad.clone() for param in params]
        saved = scaler.state_dict()
        scaler.step(optimizer)
        assert scaler.state_dict() == saved
        scaler.update()
        assert all(same_bits(p.grad, grad) for p, grad in zip(params, before, strict=True))


@pytest.mark.parametrize("max_norm", [1.0, math.inf])
def test_unscaled_before_the_step(place: Place, max_norm: float) -> None:
    """For clipping in between: the step is told of no scale then, and still of infinities."""
    ours, theirs, scaler = new_params(), new_params(), new_scaler()
    optimizer = AdamAL(ours, lr=0.05, backend=place.backend)
    reference = AdamAL(theirs, lr=0.05, backend="reference")
    told = []
    optimizer.register_step_pre_hook(lambda o, a, k: told.append((o.grad_scale, o.found_inf)))
    for step in range(STEPS):
        optimizer.zero_grad()
        scaler.scale(loss_of(ours, step)).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(ours, max_norm)
        scaler.step(optimizer)
        scaler.update()
        if step not in INFINITE:
            reference.zero_grad()
            loss_of(theirs, step).backward()
            clip_grad_norm_(theirs, max_norm)
            reference.step()
        assert told[-1][0] is None
        assert bool(told[-1][1]) is (step in INFINITE)
    assert len(told) == STEPS
    assert different_values(values_of(optimizer, ours), values_of(reference, theirs)) == []


def test_two_backward_passes_are_accumulated(place: Place) -> None:
    ours, theirs, scaler = new_params(), new_params(), new_scaler()
    optimizer = AdamAL(ours, lr=0.05, backend=place.backend)
    reference = AdamAL(theirs, lr=0.05, backend="reference")
    for step in range(5):
        for both in (optimizer, reference):
            both.zero_grad()
        infinite = False
        for seed in (2 * step, 2 * step + 1):
            scaler.scale(loss_of(ours, seed)).backward()
            loss_of(theirs, seed).backward()
            infinite |= seed in INFINITE
        scaler.step(optimizer)
        scaler.update()
        if not infinite:
            reference.step()
    assert optimizer.skipped_steps.item() == 3
    assert different_values(values_of(optimizer, ours), values_of(reference, theirs)) == []


def test_two_optimizers_of_one_scaler(place: Place) -> None:
    """Each skips for its own gradients; the scale backs off for either."""
    scaler = new_scaler()
    ours = [new_params(), new_params()]
    optimizers = [AdamAL(params, lr=0.05, backend=place.backend) for params in ours]
    finite = (1, 2, 3)
    for step, (first, second) in enumerate(((1, 1), (INFINITE[0], 2), (INFINITE[1], 3))):
        for params, seed in zip(ours, (first, second), strict=True):
            for param in params:
                param.grad = None
            scaler.scale(loss_of(params, seed)).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        assert [o.skipped_steps.item() for o in optimizers] == [step, 0]
    assert scaler.get_scale() == 2.0**10
    for optimizer, params, seeds in zip(optimizers, ours, (finite[:1], finite), strict=True):
        theirs = new_params()
        reference = AdamAL(theirs, lr=0.05, backend="reference")
        for seed in seeds:
            reference.zero_grad()
            loss_of(theirs, seed).backward()
            reference.step()
        assert different_values(values_of(optimizer, params), values_of(reference, theirs)) == []


def test_steps_with_and_without_a_scaler_in_turn(place: Place) -> None:
    """A scale is for the step it was set for, and a scaler that is not enabled sets none."""
    ours, theirs, scaler = new_params(), new_params(), new_scaler()
    optimizer = AdamAL(ours, lr=0.05, backend=place.backend)
    reference = AdamAL(theirs, lr=0.05, backend="reference")
    for step in (1, 2, 3, 6, 7, 8):
        train(new_scaler(enabled=step % 2 == 0) if step > 3 else scaler, optimizer, ours, step)
        optimizer.zero_grad()
        loss_of(ours, 100 + step).backward()
        optimizer.step()
        for seed in (step, 100 + step):
            reference.zero_grad()
            loss_of(theirs, seed).backward()
            reference.step()
    assert different_values(values_of(optimizer, ours), values_of(reference, theirs)) == []


def test_a_scale_set_by_hand(place: Place) -> None:
    """torch's scaler multiplies what the user has set; without one, it is taken as it is."""
    ours, theirs = new_params(), new_params()
    optimizer = AdamAL(ours, lr=0.05, backend=place.backend)
    reference = AdamAL(theirs, lr=0.05, backend="reference")
    for step in (1, 2, 3):
        for both, params, factor in ((optimizer, ours, 8.0), (reference, theirs, 1.0)):
            both.zero_grad()
            (loss_of(params, step) * factor).backward()
        optimizer.grad_scale = torch.tensor([8.0])
        optimizer.found_inf = torch.tensor([0.0])
        optimizer.step()
        reference.step()
    optimizer.found_inf = torch.tensor([1.0])
    optimizer.step()
    assert optimizer.skipped_steps.item() == 1
    assert different_values(values_of(optimizer, ours), values_of(reference, theirs)) == []


@pytest.mark.parametrize("name", ["Adam", "AdamAL", "AdamALW", "AdamW"])
class TestTheScalerDecides:
    """Without ``fused=True``, as with torch's default Adam."""

    def test_it_unscales_and_skips(self, place: Place, name: str) -> None:
        cls = getattr(adamal_kernels, name)
        ours, theirs, singles = new_params(), new_params(), new_params()
        optimizer = cls(ours, lr=0.05, backend=place.backend)
        twin = torch.optim.Adam(theirs, lr=0.05, foreach=False)
        reference = cls(singles, lr=0.05, backend="reference")
        scalers = [new_scaler(), new_scaler()]
        calls = []
        optimizer.register_step_pre_hook(lambda *_: calls.append(step))
        for step in range(STEPS):
            train(scalers[0], optimizer, ours, step)
            train(scalers[1], twin, theirs, step)
            assert scalers[0].state_dict() == scalers[1].state_dict()
            assert all(same_bits(p.grad, q.grad) for p, q in zip(ours, theirs, strict=True))
            if step not in INFINITE:
                reference.zero_grad()
                loss_of(singles, step).backward()
                reference.step()
            different = different_values(values_of(optimizer, ours), values_of(reference, singles))
            assert different == []
        assert calls == [step for step in range(STEPS) if step not in INFINITE]
        assert optimizer.skipped_steps.item() == 0

    def test_gradients_are_clipped_and_logged_in_between(self, place: Place, name: str) -> None:
        ours, theirs = new_params(), new_params()
        optimizer = getattr(adamal_kernels, name)(ours, backend=place.backend)
        scaler, twin = new_scaler(), torch.optim.Adam(theirs)
        for step in (1, 2, 3):
            for both, params in ((optimizer, ours), (twin, theirs)):
                both.zero_grad()
                (
                    scaler.scale(loss_of(params, step))
                    if both is optimizer
                    else loss_of(params, step)
                ).backward()
            scaler.unscale_(optimizer)
            assert same_bits(clip_grad_norm_(ours, 1.0), clip_grad_norm_(theirs, 1.0))
            scaler.step(optimizer)
            scaler.update()
            optimizer.max_grad_norm = 2.0
        assert optimizer.last_grad_norm is not None
        assert abs(optimizer.last_grad_norm.item() - 1) < 1e-5


class TestWhoUnscales:
    """What the scaler, and trainers around it, ask."""

    @staticmethod
    def unscales(optimizer: Any) -> bool:
        return getattr(optimizer, "_step_supports_amp_scaling", False)

    def test_fused_as_in_torch(self) -> None:
        """The constructor's; a named backend asks for nothing."""
        for cls in (adamal_kernels.AdamAL, torch.optim.Adam):
            assert self.unscales(cls(new_params(), fused=True)) is True
            for fused in (None, False):
                optimizer = cls(new_params(), fused=fused)
                optimizer.add_param_group({"params": new_params(), "fused": True})
                assert self.unscales(optimizer) is False
        assert self.unscales(adamal_kernels.AdamAL(new_params(), backend="cpu")) is False

    @pytest.mark.parametrize("fused", [True, None])
    def test_copies_and_checkpoints(self, fused: bool | None) -> None:
        """A copy unscales as what was copied; a checkpoint changes nothing."""
        optimizer = adamal_kernels.AdamAL(new_params(), fused=fused)
        for found in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            assert self.unscales(found) is bool(fused)
        optimizer.load_state_dict(torch.optim.Adam(new_params(), fused=not fused).state_dict())
        assert self.unscales(optimizer) is bool(fused)

    def test_in_backward_a_scaler_is_told_to_ask_the_step(self) -> None:
        """Which refuses it: some gradients are gone, and were taken scaled."""
        optimizer = adamal_kernels.AdamAL(new_params())
        with optimizer.step_in_backward():
            assert self.unscales(optimizer) is True
        assert self.unscales(optimizer) is False

    def test_without_gradients_there_is_nothing_to_step(self) -> None:
        used, unused = new_params(), new_params()
        scaler = new_scaler()
        first, second = (adamal_kernels.AdamAL(p, fused=True) for p in (used, unused))
        for count in (1, 2):
            scaler.scale(loss_of(used, count)).backward()
            scaler.step(first)
            scaler.step(second)
            scaler.update()
            assert {held["step"].item() for held in first.state.values()} == {count}
        assert len(second.state) == second.skipped_steps.item() == 0
