"""The example trains both optimizers alike, and reports what it measured."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import adamal_kernels

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = ["--steps=40", "--batch-size=8", "--context=32", "--width=32", "--layers=1", "--heads=2"]
TINY += ["--lr=0.01", "--device=cpu"]
# A row of the table: how it begins, the figure's key in the JSON, and how it is printed.
ROWS = [
    ("Training loss", "final_train_loss", ".4f"),
    ("Held-out loss", "final_held_out_loss", ".4f"),
    ("Optimizer, median (ms/step)", "optimizer_ms_per_step", ".3f"),
    ("Optimizer state (bytes/parameter)", "state_bytes_per_parameter", ".3f"),
    ("Backend", "backend", ""),
]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the example once, as a user does; return what it left."""
    folder = tmp_path_factory.mktemp("example")
    command = [sys.executable, str(EXAMPLES / "train_gpt.py"), *TINY]
    command += ["--output", "new/curves.png", "--json", "new/figures.json"]
    package = str(Path(adamal_kernels.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": package, "COLUMNS": "100", "PYTHONUTF8": "1"}
    environment["OMP_NUM_THREADS"] = "1"  # A model this small gains nothing from more.
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=120
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "new/figures.json").read_text("utf-8"))
    return report | {"stdout": done.stdout, "png": folder / "new/curves.png"}


@pytest.fixture
def train_gpt(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import the example, which lies in no package."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("train_gpt")


def test_table_shows_the_measured_figures(result: dict[str, Any]) -> None:
    lines = result["stdout"].splitlines()
    header = next(line for line in lines if "torch.optim.Adam" in line and "┃" in line)
    assert [cell.strip() for cell in header.split("┃")[2:-1]] == ["torch.optim.Adam", "AdamAL"]
    for label, key, form in ROWS:
        (line,) = (line for line in lines if line.startswith(f"│ {label}"))
        printed = [cell.strip() for cell in line.split("│")[2:-1]]
        assert printed == [format(run[key], form) for run in result["runs"]]


def test_figures_are_those_of_the_runs(result: dict[str, Any]) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    optimizer = adamal_kernels.AdamAL([parameter])
    optimizer.step()
    adam, adamal = result["runs"]
    assert adam["backend"] == "torch fused"
    assert adamal["backend"] == ", ".join(optimizer.backends_used)
    for run in result["runs"]:
        assert len(run["train_loss"]) == 40
        assert run["final_train_loss"] == run["train_loss"][-1]
        assert run["held_out_loss"][-1] == [40, run["final_held_out_loss"]]
        assert len(run["optimizer_seconds"]) == 40
        median = statistics.median(run["optimizer_seconds"])
        assert run["optimizer_ms_per_step"] == 1e3 * median > 0
        # Two float32 moments, and a float32 step for each of some twenty tensors.
        assert 8 < run["state_bytes_per_parameter"] < 8.01
    assert result["device"] in result["stdout"]
    assert torch.__version__ in result["stdout"]


def test_losses_fall(result: dict[str, Any]) -> None:
    for run in result["runs"]:
        assert run["train_loss"][0] > 4 > 3.5 > run["final_train_loss"] > 0
        assert run["held_out_loss"][0][1] > 4 > 3.5 > run["final_held_out_loss"] > 0


def test_only_the_optimizer_differs(result: dict[str, Any]) -> None:
    adam, adamal = result["runs"]
    nothing = hashlib.sha256().hexdigest()
    for digest in ("initial_weights_sha256", "batches_sha256"):
        assert adam[digest] == adamal[digest] != nothing
    assert adam["train_loss"][0] == adamal["train_loss"][0]
    assert adam["held_out_loss"][0] == adamal["held_out_loss"][0]
    assert adam["train_loss"][-1] != adamal["train_loss"][-1]


def test_png_holds_both_curves_and_both_times(
    result: dict[str, Any], train_gpt: ModuleType
) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    image = torch.from_numpy(imread(result["png"]))[..., :3]
    assert image.shape[0] >= 600
    assert image.shape[1] >= 900
    for color, _, _ in train_gpt.STYLES.values():
        same = (image - torch.tensor(to_rgb(color))).abs().amax(-1) < 0.01
        columns = same.any(0).sum()
        assert columns > image.shape[1] / 2, f"{color} spans {columns} columns"
        right = same[:, image.shape[1] * 2 // 3 :].any(0).float().mean()
        assert right > 0.5, f"{color} spans {right} of the panel of times"


def test_seed_sets_weights_and_data_order(train_gpt: ModuleType) -> None:
    corpus = train_gpt.Corpus(
        torch.arange(100, dtype=torch.uint8), torch.arange(50, dtype=torch.uint8), files=2
    )

    def digests(name: str, seed: int) -> tuple[str, str]:
        config = train_gpt.Config(3, 2, 8, 8, 1, 1, 1e-3, seed, "cpu", "float32")
        training = train_gpt.Training(name, config, corpus)
        for _ in range(3):
            training.step()
        return training.weights.hexdigest(), training.batches.hexdigest()

    assert digests("AdamAL", 1) == digests("torch.optim.Adam", 1)
    for one, other in zip(digests("AdamAL", 1), digests("AdamAL", 2), strict=True):
        assert one != other


def test_corpus_is_ordered_split_by_file_and_ascii(tmp_path: Path, train_gpt: ModuleType) -> None:
    from char_gpt import load_corpus

    (tmp_path / "sub").mkdir()
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "a.py").write_text("no")
    (tmp_path / "notes.txt").write_text("no")
    for digit in range(9):
        (tmp_path / f"m{digit}.py").write_text(f"{digit}é\n", "utf-8")
    with pytest.raises(FileNotFoundError, match="9 Python source files, 10 or more"):
        load_corpus(tmp_path)
    (tmp_path / "sub" / "z.py").write_text("held")

    corpus = load_corpus(tmp_path)

    assert bytes(corpus.train.tolist()) == b"".join(b"%d\x7f\n" % digit for digit in range(9))
    assert bytes(corpus.held_out.tolist()) == b"held"
    assert corpus.files == 10


@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [
        ("--steps", "0", "whole number from 1"),
        ("--batch-size", "1.5", "whole number from 1"),
        ("--context", "-3", "whole number from 1"),
        ("--width", "wide", "whole number from 1"),
        ("--layers", "", "whole number from 1"),
        ("--heads", "3", "does not divide --width 128"),
        ("--lr", "nan", "positive, finite number"),
        ("--lr", "-1", "positive, finite number"),
        ("--seed", "-1", "whole number from 0"),
        ("--device", "tpu", "give auto, cpu, cuda"),
        ("--device", "cuda:999", "use --device cpu"),
        ("--dtype", "int8", "float32"),
        ("--output", "curves.pdf", "ends in .png"),
        ("--json", "figures", "ends in .json"),
    ],
)
def test_bad_option_is_named_before_training(
    option: str,
    value: str,
    remedy: str,
    train_gpt: ModuleType,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        train_gpt.main([f"{option}={value}"])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert f"argument {option}: " in message
    assert value in message
    assert remedy in message


def test_run_that_cannot_go_on_says_why(tmp_path: Path, train_gpt: ModuleType) -> None:
    output = tmp_path / "curves.png"
    arguments = [*TINY, "--output", str(output)]
    with pytest.raises(SystemExit, match=r"loss of torch\.optim\.Adam is .*lower --lr"):
        train_gpt.main([*arguments, "--lr", "1e30"])
    with pytest.raises(SystemExit, match=r"--context 99999999: give \d+ or less"):
        train_gpt.main([*arguments, "--context", "99999999"])
    assert not output.exists()
