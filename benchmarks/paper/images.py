"""Figure 2, Figure 3 and Table 1: image classification with all methods.

On CIFAR-10 with ResNet-18 and VGG-16 where ``--data`` names its folder; else the same experiment
on scikit-learn's digits, with networks of the same form sized to them and all epochs shortened in
proportion. The paper says of its setup: 80 epochs without tuning for Figure 2; for Table 1 tuned
hyper-parameters and the learning rate halved at 75, 125 and 175, of 200 epochs. What it does not
say is chosen here: batch sizes, the learning rates tried, augmentation (crops and flips on
CIFAR-10), the network of Table 1 and Figure 3 (ResNet).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from rich.table import Table

from . import images_report
from .datasets import ImageSet, cifar10, digits, hold_out
from .experiment import Advance, Claim, Experiment, band, spread
from .methods import ADAMS, METHODS
from .networks import NETWORKS, name_of
from .training import Curve, Setup, train
from .workers import run_jobs

__all__ = ["ImageClassification"]

PAPER_EPOCHS = 200
PAPER_MILESTONES = (75, 125, 175)
TUNED_NETWORK = "ResNet"

Curves = dict[Setup, Curve]


class _Job(NamedTuple):
    setup: Setup
    data: str
    folder: str | None
    train_images: int | None
    tuning: bool
    device: str


@dataclass(frozen=True)
class ImageClassification(Experiment):
    """Accuracy of all methods: untuned, at several batch sizes, and with tuned learning rates."""

    name = "images"
    title = "Figure 2, Figure 3 and Table 1: accuracy on images"

    seeds: int = 5
    data: str = "digits"
    folder: str | None = None
    """Where CIFAR-10 is, for ``data="cifar10"``."""
    device: str = "cpu"
    width: int = 16
    stages: tuple[int, int] = (3, 3)
    """Of ResNet and of VGG."""
    epochs: int = 16
    """Of Figures 2 and 3; 80 in the paper."""
    tuned_epochs: int = 40
    """Of Table 1; the learning rate is halved at 75, 125 and 175 of 200."""
    batch_size: int = 32
    batch_sizes: tuple[int, ...] = (16, 32, 64, 128)
    tuning_factors: tuple[float, ...] = (0.3, 1.0, 3.0)
    """Learning rates tried, times the untuned one, on held-out training images."""
    tuning_seeds: int = 2
    train_images: int | None = None
    """Leave out all but this many of the digits."""

    @classmethod
    def on_cifar10(cls, folder: Path, **sizes: Any) -> ImageClassification:
        """Return the paper's own experiment, on its data and at its sizes."""
        own: dict[str, Any] = {
            "data": "cifar10",
            "folder": str(folder),
            "width": 64,
            "stages": (4, 5),
            "epochs": 80,
            "tuned_epochs": PAPER_EPOCHS,
            "batch_size": 128,
            "batch_sizes": (64, 128, 256, 512),
        }
        return cls(**own | sizes)

    def units(self) -> int:
        """Return the number of epochs."""
        tuned = len(METHODS) * self.seeds * self.tuned_epochs
        setups = {*self._tuning(), *self._comparison(), *self._batches()}
        return tuned + sum(setup.epochs for setup in setups)

    def run(self, advance: Advance) -> dict[str, Any]:
        first = self._train_all({*self._comparison(), *self._batches()}, False, advance)
        tried = self._train_all(self._tuning(), True, advance)
        accuracy = {
            name: {lr: self._mean_accuracy(tried, name, lr) for lr in self._rates(name)}
            for name in METHODS
        }
        best = {name: max(rates, key=rates.__getitem__) for name, rates in accuracy.items()}
        tuned = self._train_all(
            {self._tuned(name, best[name], seed) for name in METHODS for seed in range(self.seeds)},
            False,
            advance,
        )
        images = load_images(self.data, self.folder, self.train_images)
        return {
            "train_images": len(images.train),
            "test_images": len(images.test),
            "networks": {network: self._describe(network, images) for network in NETWORKS},
            "figure2": {
                network: {name: self._found(first, network, name) for name in METHODS}
                for network in NETWORKS
            },
            "figure3": {
                name: {
                    str(size): self._found(first, TUNED_NETWORK, name, size)
                    for size in self.batch_sizes
                }
                for name in ADAMS
            },
            "table1": {
                name: {
                    "lr": best[name],
                    "held_out_accuracy": {str(lr): mean for lr, mean in accuracy[name].items()},
                    **_summary([tuned[s] for s in sorted(tuned, key=_seed) if s.method == name]),
                }
                for name in METHODS
            },
        }

    def _setup(self, network: str, method: str, seed: int, **others: Any) -> Setup:
        stages = dict(zip(NETWORKS, self.stages, strict=True))[network]
        own = {"lr": METHODS[method].lr, "batch_size": self.batch_size, "epochs": self.epochs}
        return Setup(network, self.width, stages, method, seed=seed, **own | others)

    def _comparison(self) -> Iterable[Setup]:
        for network in NETWORKS:
            for name in METHODS:
                yield from (self._setup(network, name, seed) for seed in range(self.seeds))

    def _batches(self) -> Iterable[Setup]:
        for name in ADAMS:
            for size in self.batch_sizes:
                for seed in range(self.seeds):
                    yield self._setup(TUNED_NETWORK, name, seed, batch_size=size)

    def _tuning(self) -> Iterable[Setup]:
        for name in METHODS:
            for lr in self._rates(name):
                yield from (self._tuned(name, lr, seed) for seed in range(self.tuning_seeds))

    def _tuned(self, name: str, lr: float, seed: int) -> Setup:
        halve_after = tuple(
            round(epoch * self.tuned_epochs / PAPER_EPOCHS) for epoch in PAPER_MILESTONES
        )
        epochs = self.tuned_epochs
        return self._setup(TUNED_NETWORK, name, seed, lr=lr, epochs=epochs, halve_after=halve_after)

    def _rates(self, name: str) -> list[float]:
        return [float(f"{METHODS[name].lr * factor:.6g}") for factor in self.tuning_factors]

    def _mean_accuracy(self, tried: Curves, name: str, lr: float) -> float:
        runs = (tried[self._tuned(name, lr, seed)] for seed in range(self.tuning_seeds))
        return fmean(run.test_accuracy[-1] for run in runs)

    def _found(
        self, curves: Curves, network: str, name: str, batch_size: int | None = None
    ) -> dict[str, Any]:
        others = {"batch_size": batch_size or self.batch_size}
        setups = [self._setup(network, name, seed, **others) for seed in range(self.seeds)]
        return {"lr": METHODS[name].lr, **_summary([curves[setup] for setup in setups])}

    def _describe(self, network: str, images: ImageSet) -> dict[str, Any]:
        stages = dict(zip(NETWORKS, self.stages, strict=True))[network]
        model = NETWORKS[network](images.train.pixels.shape[1], self.width, stages)
        count = sum(param.numel() for param in model.parameters())
        return {"name": name_of(network, stages, self.width), "parameters": count}

    def _train_all(self, setups: Iterable[Setup], tuning: bool, advance: Advance) -> Curves:
        """Return every setup's curve; ``tuning`` tests on held-out training images."""
        # The longest first: so no process is left with one when the others are done.
        ordered = sorted(setups, key=lambda setup: (setup.batch_size, setup.network, setup.seed))
        jobs = [
            _Job(setup, self.data, self.folder, self.train_images, tuning, self.device)
            for setup in ordered
        ]
        curves: Curves = {}
        for job, curve in run_jobs(_train_one, jobs, self.workers):
            curves[job.setup] = curve
            advance(job.setup.epochs)
        return curves

    @staticmethod
    def tables(record: dict[str, Any]) -> Sequence[Table]:
        return images_report.tables(record)

    @staticmethod
    def draw(record: dict[str, Any]) -> dict[str, Figure]:
        return images_report.draw(record)

    @staticmethod
    def claims(record: dict[str, Any]) -> Sequence[Claim]:
        return images_report.claims(record)


def load_images(data: str, folder: str | None, most: int | None) -> ImageSet:
    """Return the images that a record names."""
    if data == "digits":
        return digits(most)
    return cifar10(Path(folder or ""))


def _train_one(job: _Job) -> Curve:
    images = load_images(job.data, job.folder, job.train_images)
    if job.tuning:
        images = hold_out(images, parts=5)
    return train(job.setup, images.to(torch.device(job.device)))


def _seed(setup: Setup) -> int:
    return setup.seed


def _summary(curves: Sequence[Curve]) -> dict[str, Any]:
    return {
        "train_loss": band([curve.train_loss for curve in curves]),
        "test_loss": band([curve.test_loss for curve in curves]),
        "test_accuracy": band([curve.test_accuracy for curve in curves]),
        "final_accuracy": spread([curve.test_accuracy[-1] for curve in curves]),
    }
