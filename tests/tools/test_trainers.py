"""The examples' trainers: with Adam they follow torch's, AdamAL steps in them, and resumes.

In float64, where a gradient that should be zero (a key's bias in attention) is small beside eps.
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from adamal_kernels import Adam, AdamAL, AdamALW, AdamW
from adamal_kernels.verify import same_bits

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS, HALF = 16, 8
DTYPE = torch.float64


class Trained(NamedTuple):
    """What a trainer leaves."""

    model: nn.Module
    optimizer: Optimizer


def example(name: str, *needs: str) -> Any:
    """Return an example's module, or skip the test where what it ``needs`` is not installed."""
    for package in needs:
        pytest.importorskip(package)
    return importlib.import_module(name)


def plain_loop(folder: Path, cls: type, first: int, last: int) -> Trained:
    """Train in a plain loop, with a sequence of schedules and averaged weights."""
    run = example("plain_loop").Run(cls, steps=STEPS, dtype=DTYPE)
    if first:
        run.load_state_dict(torch.load(folder / "checkpoint.pt", weights_only=True))
    for _ in range(first, last):
        run.step()
    folder.mkdir(exist_ok=True)
    torch.save(run.state_dict(), folder / "checkpoint.pt")
    if last == STEPS:
        run.finish()
    return Trained(nn.ModuleList([run.model, run.averaged]), run.optimizer)


def accelerate_loop(folder: Path, cls: type, first: int, last: int) -> Trained:
    """Train with accelerate, which accumulates two batches a step; an epoch is two steps."""
    run = example("accelerate_loop", "accelerate").Run(cls, steps=STEPS, dtype=DTYPE)
    if first:
        run.load(folder / "state")
    for _ in range(first, last, 2):
        run.epoch()
    run.save(folder / "state")
    return Trained(run.model, run.optimizer.optimizer)


def lightning_trainer(folder: Path, cls: type, first: int, last: int) -> Trained:
    """Train with Lightning, which steps with a closure."""
    made = example("lightning_trainer", "lightning")
    from lightning.pytorch.callbacks import ModelCheckpoint

    module = made.Squares(cls, STEPS).to(DTYPE)
    # To the end, whatever ``last`` says: the checkpoint half way is that of a job stopped there.
    saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=HALF, save_top_k=-1)
    trainer = made.make_trainer(folder, STEPS, precision="64-true", callbacks=[saves])
    checkpoint = folder / f"step={first}.ckpt" if first else None
    trainer.fit(module, ckpt_path=checkpoint, weights_only=True)
    return Trained(module, trainer.optimizers[0])


def hugging_face_trainer(folder: Path, cls: type, first: int, last: int) -> Trained:
    """Train with Hugging Face's Trainer, which makes the optimizer; it decays no biases."""
    made = example("hugging_face_trainer", "transformers", "accelerate")
    trainer = made.make_trainer(folder, cls, steps=STEPS, save_steps=HALF, dtype=DTYPE)
    # To the end, too.
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{first}") if first else None)
    return Trained(trainer.model, trainer.optimizer.optimizer)


Train = Callable[[Path, type, int, int], Trained]
TRAINERS: list[Train] = [plain_loop, accelerate_loop, lightning_trainer, hugging_face_trainer]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On one thread, offline, with the examples at hand; what is deprecated inside is theirs."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.syspath_prepend(EXAMPLES)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


def assert_close(ours: Trained, theirs: Trained) -> None:
    torch.testing.assert_close(dict(ours.model.state_dict()), dict(theirs.model.state_dict()))
    for our, their in zip(ours.optimizer.param_groups, theirs.optimizer.param_groups, strict=True):
        assert our["lr"] == their["lr"]
        assert our["weight_decay"] == their["weight_decay"]
        for p, q in zip(our["params"], their["params"], strict=True):
            assert ours.optimizer.state[p]["step"] == theirs.optimizer.state[q]["step"] == STEPS
            for name in ("exp_avg", "exp_avg_sq"):
                found, expected = ours.optimizer.state[p][name], theirs.optimizer.state[q][name]
                torch.testing.assert_close(found, expected)


def assert_same(found: Trained, expected: Trained) -> None:
    for ours, theirs in zip(
        found.model.state_dict().values(), expected.model.state_dict().values(), strict=True
    ):
        assert same_bits(ours, theirs)


class ReferenceAdamALW(AdamALW):
    """AdamALW by its reference backend."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, backend="reference", **options)


@pytest.mark.parametrize("train", TRAINERS, ids=lambda train: train.__name__)
class TestTrainer:
    @pytest.mark.parametrize("cls", [Adam, AdamW])
    def test_follows_torchs(self, tmp_path: Path, train: Train, cls: type) -> None:
        ours = train(tmp_path / "ours", cls, 0, STEPS)
        theirs = train(tmp_path / "theirs", getattr(torch.optim, cls.__name__), 0, STEPS)
        assert type(ours.optimizer) is cls
        assert_close(ours, theirs)

    def test_adamal_is_what_steps(self, tmp_path: Path, train: Train) -> None:
        found = train(tmp_path / "ours", AdamALW, 0, STEPS)
        assert type(found.optimizer) is AdamALW
        assert found.optimizer.backends_used == ("cpu",)
        expected = train(tmp_path / "reference", ReferenceAdamALW, 0, STEPS)
        assert expected.optimizer.backends_used == ("reference",)
        assert_same(found, expected)
        other = train(tmp_path / "adam", AdamW, 0, STEPS)
        pairs = zip(found.model.parameters(), other.model.parameters(), strict=True)
        assert not any(same_bits(a, b) for a, b in pairs)

    def test_resumes_from_its_checkpoint(self, tmp_path: Path, train: Train) -> None:
        train(tmp_path, AdamAL, 0, HALF)
        resumed = train(tmp_path, AdamAL, HALF, STEPS)
        expected = train(tmp_path / "through", AdamAL, 0, STEPS)
        assert_same(resumed, expected)
        runs = (resumed.optimizer, expected.optimizer)
        for ours, theirs in zip(*(optimizer.state.values() for optimizer in runs), strict=True):
            assert same_bits(ours["exp_avg_sq"], theirs["exp_avg_sq"])
            assert ours["step"] == theirs["step"] == STEPS
        assert len({optimizer.param_groups[0]["lr"] for optimizer in runs}) == 1

    def test_goes_on_from_torchs_checkpoint(self, tmp_path: Path, train: Train) -> None:
        """The optimizer is replaced in a run that is under way."""
        train(tmp_path, torch.optim.Adam, 0, HALF)
        found = train(tmp_path, AdamAL, HALF, STEPS)
        assert type(found.optimizer) is AdamAL
        assert {values["step"].item() for values in found.optimizer.state.values()} == {STEPS}


class TestMixedPrecision:
    """The scaler's or the trainer's, as with torch's optimizers."""

    @pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
    @pytest.mark.parametrize("cls", [Adam, AdamW])
    def test_lightning_clips_and_logs(self, tmp_path: Path, cls: type, precision: Any) -> None:
        made = example("lightning_trainer", "lightning")
        from lightning.pytorch.plugins import MixedPrecision

        class Logged(made.Squares):
            def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
                grads = [p.grad for p in self.parameters()]
                self.norms.append(torch.nn.utils.get_total_norm(grads))

        found = []
        for each in (cls, getattr(torch.optim, cls.__name__)):
            # Of which the first step overflows.
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**17)
            plugin = MixedPrecision(precision, "cpu", scaler if precision == "16-mixed" else None)
            module = Logged(each, STEPS)
            module.norms = []
            made.make_trainer(tmp_path, STEPS, plugins=[plugin]).fit(module)
            found.append((module, scaler.get_scale()))
        (ours, scale), (theirs, their_scale) = found
        torch.testing.assert_close(ours.norms, theirs.norms, rtol=1e-3, atol=1e-6, equal_nan=True)
        finite = [norm for norm in ours.norms if norm.isfinite()]
        assert max(finite) < 1e3
        assert (len(finite) < STEPS) is (precision == "16-mixed")
        assert scale == their_scale
        torch.testing.assert_close(
            dict(ours.state_dict()), dict(theirs.state_dict()), rtol=1e-3, atol=1e-4
        )

    def test_accelerate_sees_what_was_skipped(self) -> None:
        pytest.importorskip("accelerate")
        from accelerate import Accelerator
        from accelerate.optimizer import AcceleratedOptimizer

        Accelerator(cpu=True)
        seen: dict[type, list[bool]] = {}
        for cls in (torch.optim.Adam, AdamAL):
            param = nn.Parameter(torch.ones(3))
            scaler = torch.amp.GradScaler("cpu")
            optimizer = AcceleratedOptimizer(cls([param]), device_placement=False, scaler=scaler)
            seen[cls] = []
            for factor in (1.0, float("inf"), 1.0):
                optimizer.zero_grad()
                scaler.scale(param.sum() * factor).backward()
                optimizer.step()
                seen[cls].append(optimizer.step_was_skipped)
            assert optimizer.state[param]["step"] == 2
        assert seen[torch.optim.Adam] == seen[AdamAL] == [False, True, False]


class TestMaxGradNorm:
    """Set on what a trainer makes of the optimizer."""

    def test_fabric_hands_it_on(self) -> None:
        fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
        _, optimizer = fabric.setup(
            nn.Linear(2, 1, bias=False), made := AdamAL([nn.Parameter(torch.ones(2))])
        )
        assert optimizer is not made
        optimizer.max_grad_norm = 0.5
        assert (optimizer.max_grad_norm, made.max_grad_norm) == (0.5, 0.5)
        made.param_groups[0]["params"][0].grad = torch.tensor([3.0, 4.0])
        optimizer.step()
        assert optimizer.last_grad_norm == 5.0

    def test_accelerate_takes_it_on_the_optimizer_inside(self) -> None:
        pytest.importorskip("accelerate")
        from accelerate import Accelerator

        param = nn.Parameter(torch.ones(2))
        optimizer = Accelerator(cpu=True).prepare(AdamAL([param], max_grad_norm=1.0))
        for norm in (1.0, 0.5):
            optimizer.optimizer.max_grad_norm = norm
            param.grad = torch.tensor([3.0, 4.0])
            optimizer.step()
            assert optimizer.optimizer.last_grad_norm == 5.0


# Each example, what it needs, and what its last loss is below; it begins some ten times higher.
EXAMPLE_RUNS = [
    ("plain_loop", (), 0.02),
    ("accelerate_loop", ("accelerate",), 0.01),
    ("lightning_trainer", ("lightning",), 0.01),
    ("hugging_face_trainer", ("transformers", "accelerate"), 1.2),
]


@pytest.mark.parametrize(
    ("name", "needs", "bound"), EXAMPLE_RUNS, ids=[run[0] for run in EXAMPLE_RUNS]
)
def test_examples_learn(
    name: str, needs: tuple[str, ...], bound: float, capsys: pytest.CaptureFixture[str]
) -> None:
    assert example(name, *needs).main() == 0
    losses = re.findall(r"^step \d+: loss (\S+)$", capsys.readouterr().out, re.MULTILINE)
    assert float(losses[-1]) < bound
