"""What torch.optim.Optimizer promises its users, and the choice of a backend."""

from __future__ import annotations

import collections
import copy
import doctest
import importlib
import inspect
import io
import pickle
import pkgutil
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from helpers.support import Place, refused
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook

import adamal_kernels
from adamal_kernels import Adam, AdamAL, AdamALW, AdamW, Box, NonNegative, backends
from adamal_kernels.verify import same_bits

CLASSES = (AdamAL, AdamALW, Adam, AdamW)
OPTIONS = {"backend": "foreach"}


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
    return (model(inputs) - inputs[:, :2]).square().mean()


def train(model: nn.Module, optimizer: Optimizer, steps: int = 5) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def same_model(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(same_bits(a, b) for a, b in pairs)


@pytest.mark.parametrize("cls", CLASSES)
def test_signature_is_torchs_and_more(cls: type) -> None:
    """torch's own arguments come first, in its order, with its defaults."""
    twin = torch.optim.AdamW if cls in (AdamALW, AdamW) else torch.optim.Adam
    ours = list(inspect.signature(cls.__init__).parameters.values())[2:]
    theirs = list(inspect.signature(twin.__init__).parameters.values())[2:]
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [
        (p.name, p.default) for p in theirs
    ]
    more = ["bias_correction", "projection", "backend", "max_grad_norm", "grad_norm_group"]
    assert [p.name for p in ours[len(theirs) :]] == more
    assert [p.name for p in ours if p.kind is p.KEYWORD_ONLY] == [
        p.name for p in ours if p.name not in ("lr", "betas", "eps", "weight_decay", "amsgrad")
    ]


@pytest.mark.parametrize("cls", CLASSES)
def test_it_trains(cls: type, place: Place) -> None:
    model = new_model().to(place.device)
    optimizer = cls(model.parameters(), lr=0.02, backend=place.backend)
    inputs = torch.randn(16, 4, device=place.device)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(inputs) - inputs[:, :2]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4
    assert optimizer.backends_used == (place.backend,)


@pytest.mark.parametrize(("cls", "base"), [(AdamALW, AdamAL), (AdamW, Adam)])
def test_w_is_decoupled_decay(cls: type, base: type) -> None:
    first, second = new_model(), new_model()
    train(first, cls(first.parameters(), lr=0.1, **OPTIONS))
    options = {"weight_decay": 1e-2, "decoupled_weight_decay": True, **OPTIONS}
    train(second, base(second.parameters(), lr=0.1, **options))
    assert same_model(first, second)


def test_closure_is_called_once_with_gradients_enabled() -> None:
    model = new_model()
    optimizer = AdamAL(model.parameters(), **OPTIONS)
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    expected = loss_of(model)
    with torch.no_grad():
        assert torch.equal(optimizer.step(closure), expected)
    assert calls == [True]
    assert loss_of(model) < expected
    assert optimizer.step() is None


def test_step_hooks() -> None:
    model = new_model()
    optimizer = AdamAL(model.parameters(), **OPTIONS)
    seen = []
    first = next(model.parameters())
    optimizer.register_step_pre_hook(lambda o, a, k: seen.append(("pre", first.detach().clone())))
    optimizer.register_step_post_hook(lambda o, a, k: seen.append(("post", first.detach().clone())))
    train(model, optimizer, 1)
    assert [name for name, _ in seen] == ["pre", "post"]
    assert not torch.equal(seen[0][1], seen[1][1])
    assert torch.equal(seen[1][1], first)


class Counting(AdamAL):
    """Counts its steps, as users' subclasses do."""

    steps = 0

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        self.steps += 1
        return super().step(closure)


class CountingTwice(Counting):
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        self.steps += 1
        return super().step(closure=closure)


@pytest.mark.parametrize("cls", [AdamAL, Counting, CountingTwice])
def test_hooks_of_a_subclass_that_overrides_step_run_once(cls: type[AdamAL]) -> None:
    """And one record of the profiler is made, whatever classes have been used before."""
    Counting([nn.Parameter(torch.ones(1))]).step()
    param = nn.Parameter(torch.ones(2))
    optimizer = cls([param], **OPTIONS)
    seen = []
    optimizer.register_step_pre_hook(lambda o, a, k: seen.append("pre"))
    optimizer.register_step_post_hook(lambda o, a, k: seen.append("post"))
    everywhere = register_optimizer_step_pre_hook(lambda o, a, k: seen.append("global"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = param.sum()
        loss.backward()
        return loss

    with everywhere, torch.profiler.profile() as profile:
        assert optimizer.step(closure) == 2
    assert seen == ["global", "pre", "post"]
    records = [e for e in profile.events() if e.name.startswith("Optimizer.step#")]
    assert [e.name for e in records] == [f"Optimizer.step#{cls.__name__}.step"]
    assert optimizer.state[param]["step"] == 1


def test_hooks_run_again_after_a_step_that_raised() -> None:
    param = nn.Parameter(torch.ones(2))
    optimizer = Counting([param], **OPTIONS)
    seen = []
    optimizer.register_step_pre_hook(lambda o, a, k: seen.append("pre"))
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step()
    assert seen == ["pre", "pre"]


def test_schedulers_know_of_a_step_of_a_subclass() -> None:
    """Also of one that steps by itself."""

    class Own(AdamAL):
        def step(self, closure: Callable[[], Tensor] | None = None) -> None:
            return None

    for cls in (Counting, Own):
        optimizer = cls([nn.Parameter(torch.ones(2))], **OPTIONS)
        schedule = lr_scheduler.StepLR(optimizer, 1)
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            schedule.step()


@pytest.mark.parametrize("cls", CLASSES)
def test_betas_of_any_sequence_become_a_tuple(cls: type) -> None:
    pairs = [[0.5, 0.75], np.array([0.5, 0.75]), collections.UserList([0.5, 0.75])]
    for pair in (*pairs, torch.tensor([0.5, 0.75])):
        optimizer = cls([nn.Parameter(torch.ones(2))], betas=pair, **OPTIONS)
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "betas": pair})
        optimizer.defaults["betas"] = pair
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        for group in optimizer.param_groups:
            assert type(group["betas"]) is tuple
            assert group["betas"] == (0.5, 0.75)


SCHEDULERS: dict[str, Callable[[Optimizer], object]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=1.0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str) -> None:
    """They drive torch.optim.Adam and Adam alike; OneCycleLR cycles betas as well."""
    models, rates = [new_model(), new_model()], []
    made = (
        Adam(models[0].parameters(), lr=0.1, **OPTIONS),
        torch.optim.Adam(models[1].parameters(), lr=0.1, foreach=False),
    )
    for model, optimizer in zip(models, made, strict=True):
        scheduler = SCHEDULERS[name](optimizer)
        for step in range(10):
            train(model, optimizer, 1)
            plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
            scheduler.step(*[1.0 + step] if plateau else [])
            group = optimizer.param_groups[0]
            rates.append((group["lr"], tuple(group["betas"])))
    assert rates[:10] == rates[10:]
    assert len(set(rates)) > 2
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_add_param_group_mid_run() -> None:
    """The new parameter starts at its own first step, with options of its own."""
    first, second = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = AdamAL([first], lr=0.1, **OPTIONS)
    first.grad = torch.ones(3)
    optimizer.step()
    optimizer.add_param_group({"params": [second], "lr": 0.5, "projection": Box(0.75, 1)})
    second.grad = torch.ones(3)
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in (first, second)] == [2, 1]
    assert second.tolist() == [0.75] * 3
    torch.testing.assert_close(first.detach(), torch.full((3,), 0.8), rtol=1e-6, atol=1e-6)


def test_every_option_may_differ_by_group(place: Place) -> None:
    """Groups in one optimizer step as optimizers of one group each do."""
    groups = [
        {"lr": 0.1},
        {"lr": 0.2, "betas": (0.5, 0.6)},
        {"eps": 0.1},
        {"weight_decay": 0.5},
        {"weight_decay": 0.5, "decoupled_weight_decay": True},
        {"maximize": True},
        {"bias_correction": False},
        {"projection": Box(-0.1, 0.1)},
        {"projection": NonNegative()},
    ]
    params = [torch.linspace(-1, 1, 9, device=place.device) for _ in range(2 * len(groups))]
    params = [nn.Parameter(param) for param in params]
    together, alone = params[: len(groups)], params[len(groups) :]
    both = [AdamAL([{"params": [p], **g} for p, g in zip(together, groups, strict=True)])]
    both += [AdamAL([p], **g) for p, g in zip(alone, groups, strict=True)]
    for optimizer in both:
        for group in optimizer.param_groups:
            group["backend"] = place.backend
    for step in range(4):
        for param in params:
            param.grad = torch.linspace(1, -0.5, 9, device=place.device) * (step + 1)
        for optimizer in both:
            optimizer.step()
    unlike = [g for g, a, b in zip(groups, together, alone, strict=True) if not same_bits(a, b)]
    assert unlike == []
    assert len({tuple(param.tolist()) for param in together}) == len(groups)


def test_named_parameters() -> None:
    first, second = new_model(), new_model()
    optimizer = AdamAL(first.named_parameters(), lr=0.1, **OPTIONS)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == [
        name for name, _ in first.named_parameters()
    ]
    train(first, optimizer)
    train(second, AdamAL(second.parameters(), lr=0.1, **OPTIONS))
    assert same_model(first, second)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    model = new_model()
    optimizer = AdamAL(model.parameters(), **OPTIONS)
    train(model, optimizer, 1)
    optimizer.zero_grad(set_to_none=set_to_none)
    for param in model.parameters():
        assert param.grad is None if set_to_none else not param.grad.any()


def _deepcopy(model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    return copy.deepcopy((model, optimizer))


def _pickle(model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    return pickle.loads(pickle.dumps((model, optimizer)))


def _torch_save(model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    buffer = io.BytesIO()
    torch.save((model, optimizer), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [_deepcopy, _pickle, _torch_save])
def test_copies_go_on_alike_and_apart(place: Place, copied: Callable) -> None:
    """The copy's next steps are its own: they equal the original's and do not touch it."""
    if place.device.type != "cpu":
        pytest.skip("the model's inputs are on the CPU")
    model = new_model()
    options = {"lr": 0.05, "projection": Box(-0.5, 0.5), "backend": place.backend}
    optimizer = AdamAL(model.parameters(), **options)
    train(model, optimizer)
    other_model, other = copied(model, optimizer)
    before = [param.detach().clone() for param in model.parameters()]
    train(other_model, other)
    assert all(same_bits(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not same_model(model, other_model)
    train(model, optimizer)
    assert same_model(model, other_model)
    assert other.param_groups[0]["projection"] == Box(-0.5, 0.5)
    for ours, theirs in zip(model.parameters(), other_model.parameters(), strict=True):
        assert optimizer.state[ours]["step"] == other.state[theirs]["step"] == 10


def test_grad_scaler_skips_a_step() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    param = nn.Parameter(torch.ones(2))
    plain = nn.Parameter(torch.ones(2))
    optimizer, unscaled = AdamAL([param], **OPTIONS), AdamAL([plain], **OPTIONS)
    for factor in (1.0, float("inf"), 2.0):
        optimizer.zero_grad()
        scaler.scale((param * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        if factor != float("inf"):
            unscaled.zero_grad()
            (plain * factor).sum().backward()
            unscaled.step()
    assert optimizer.state[param]["step"] == 2
    assert same_bits(param, plain)


def test_repr_names_the_class_and_its_options() -> None:
    text = repr(AdamAL([nn.Parameter(torch.ones(1))], projection=Box(-1, 1), **OPTIONS))
    assert text.startswith("AdamAL (")
    assert "projection: Box(lo=-1.0, hi=1.0)" in text


@pytest.mark.parametrize(
    "options", [{}, {"fused": True}, {"backend": "cpu"}, {"foreach": False}], ids=str
)
def test_auto_takes_the_first(options: dict) -> None:
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        optimizer = AdamAL([param], **options)
        optimizer.step()
    assert optimizer.backends_used == ("cpu",)


class TestBackendChoice:
    """``auto`` falls back and says so once; what was named is never replaced."""

    REASON = "planted reason; plant the remedy"

    @pytest.fixture(autouse=True)
    def planted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make the fused backend for CPU tensors one that cannot run, and nothing announced."""
        monkeypatch.setattr(backends, "_announced", set())
        cpu = backends.BACKENDS["cpu"]
        monkeypatch.setattr(cpu, "unavailable", lambda device: self.REASON, raising=False)

    @staticmethod
    def params() -> Iterator[nn.Parameter]:
        param = nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        yield param

    def test_auto_warns_once(self) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                optimizer = AdamAL(self.params())
                optimizer.step()
                optimizer.step()
        messages = [str(w.message) for w in caught if self.REASON in str(w.message)]
        assert len(messages) == 1
        assert "'foreach'" in messages[0]
        assert optimizer.backends_used == ("foreach",)

    @pytest.mark.parametrize("options", [{"backend": "cpu"}, {"fused": True}], ids=str)
    def test_what_was_named_is_not_replaced(self, options: dict) -> None:
        with pytest.raises(RuntimeError, match=self.REASON):
            AdamAL(self.params(), **options)

    def test_lost_while_running(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cpu = backends.BACKENDS["cpu"]
        monkeypatch.setattr(cpu, "unavailable", lambda device: None)
        optimizer = AdamAL(self.params(), backend="cpu")
        monkeypatch.setattr(cpu, "unavailable", lambda device: self.REASON)
        with refused(optimizer, RuntimeError, "backend='cpu'", self.REASON):
            optimizer.step()

    @pytest.mark.parametrize(
        ("options", "used"),
        [
            ({"foreach": True}, "foreach"),
            ({"backend": "foreach"}, "foreach"),
            ({"fused": False}, "foreach"),
            ({"fused": False, "foreach": False}, "reference"),
            ({"backend": "reference"}, "reference"),
        ],
        ids=str,
    )
    def test_a_choice_of_what_runs_is_silent(self, options: dict, used: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            optimizer = AdamAL(self.params(), **options)
            optimizer.step()
        assert optimizer.backends_used == (used,)

    def test_backends_used_is_of_the_last_step(self) -> None:
        a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        groups = [
            {"params": [a], "backend": "foreach"},
            {"params": [b], "backend": "reference"},
        ]
        optimizer = AdamAL(groups)
        assert optimizer.backends_used == ()
        a.grad, b.grad = torch.ones(3), torch.ones(3)
        optimizer.step()
        assert optimizer.backends_used == ("foreach", "reference")
        assert same_bits(a, b)
        a.grad = None
        optimizer.step()
        assert optimizer.backends_used == ("reference",)
        optimizer.zero_grad()
        optimizer.step()
        assert optimizer.backends_used == ("reference",), "a step that stepped nothing used none"


def test_stepping_warns_of_nothing() -> None:
    model = new_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, AdamAL(model.parameters(), **OPTIONS))


MODULES = sorted(
    name
    for _, name, _ in pkgutil.walk_packages(adamal_kernels.__path__, "adamal_kernels.")
    if not name.rpartition(".")[2].startswith("_")
)


@pytest.mark.parametrize("name", ["adamal_kernels", *MODULES])
def test_examples_in_docstrings(name: str) -> None:
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("cls", CLASSES)
def test_every_optimizer_has_an_example(cls: type) -> None:
    assert doctest.DocTestFinder().find(cls, cls.__name__)[0].examples
