"""The one warning of a slower backend: what it says, and the line that it names."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from adamal_kernels import backends, user_warning

MODEL = """
import torch
from adamal_kernels import AdamAL

model = torch.nn.Linear(2, 1)

def closure():
    loss = model(torch.ones(1, 2)).sum()
    loss.backward()
    return loss

closure()
"""
OPTIMIZER = (
    MODEL
    + """
optimizer = AdamAL(model.parameters())
lose_the_extension()
"""
)
TRAINER = """
def make(kind, params):
    return kind(params)

def train(optimizer):
    optimizer.step()
"""
PROGRAMS = {
    "made": MODEL + "AdamAL(model.parameters())  # named",
    "made by a library": MODEL
    + """
from trainer import make
make(AdamAL, model.parameters())  # named
""",
    "made by a subclass": MODEL
    + """
class Mine(AdamAL):
    def __init__(self, params):
        super().__init__(params)  # named

Mine(model.parameters())
""",
    "stepped": OPTIMIZER + "optimizer.step()  # named",
    "stepped with a closure": OPTIMIZER + "optimizer.step(closure)  # named",
    "stepped under a scheduler and a hook": OPTIMIZER
    + """
torch.optim.lr_scheduler.StepLR(optimizer, 1)
optimizer.register_step_pre_hook(lambda *_: None)
optimizer.step()  # named
""",
    "stepped by a scaler": OPTIMIZER
    + """
scaler = torch.amp.GradScaler("cpu")
scaler.scale(closure())
scaler.step(optimizer)  # named
""",
    "stepped by a library": OPTIMIZER
    + """
from trainer import train
train(optimizer)  # named
""",
}


def warned(source: str, folder: Path, lose: Callable[[], None]) -> warnings.WarningMessage:
    """Run a user's program; return the one warning that our package gave."""
    file = folder / "user.py"
    file.write_text(source)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(compile(source, str(file), "exec"), {"__name__": "user", "lose_the_extension": lose})
    (warning,) = [one for one in caught if "adamal_kernels: using" in str(one.message)]
    return warning


@pytest.fixture
def lose(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function that makes the compiled backend one that cannot run."""
    monkeypatch.setattr(backends, "_announced", set())

    def plant() -> None:
        reason = "adamal_kernels._C was not built; run: adamal build"
        monkeypatch.setattr(backends.BACKENDS["cpu"], "unavailable", lambda device: reason)

    return plant


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_users_line_is_named(
    name: str, lose: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site_packages = tmp_path / "site-packages"
    site_packages.mkdir()
    (site_packages / "trainer.py").write_text(TRAINER)
    monkeypatch.syspath_prepend(site_packages)
    monkeypatch.delitem(sys.modules, "trainer", raising=False)
    libraries = (*user_warning._LIBRARIES, f"{site_packages}/")
    monkeypatch.setattr(user_warning, "_LIBRARIES", libraries)
    if name.startswith("made"):
        lose()
    source = PROGRAMS[name]
    warning = warned(source, tmp_path, lose)
    assert warning.filename == str(tmp_path / "user.py")
    assert source.splitlines()[warning.lineno - 1].endswith("# named")


def test_where_all_are_libraries_the_caller_of_torch_is_named(
    lose: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(user_warning, "_LIBRARIES", ("/", "<"))
    warning = warned(PROGRAMS["stepped"], tmp_path, lose)
    assert warning.filename == str(tmp_path / "user.py")


def test_it_says_what_it_costs_and_what_to_do(lose: Callable[[], None], tmp_path: Path) -> None:
    message = str(warned(PROGRAMS["stepped"], tmp_path, lose).message)
    assert "using backend 'foreach'" in message
    assert "times slower than the compiled step: `adamal bench`" in message
    assert "run: adamal build" in message
