"""Training of one network with one method from one seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.lr_scheduler import MultiStepLR

from .datasets import Images, ImageSet
from .methods import METHODS
from .networks import NETWORKS

__all__ = ["Curve", "Setup", "Training", "train"]

TEST_BATCH = 1000


@dataclass(frozen=True)
class Setup:
    """Everything that a training depends on besides the images."""

    network: str
    width: int
    stages: int
    method: str
    lr: float
    batch_size: int
    epochs: int
    seed: int
    halve_after: tuple[int, ...] = ()
    """Epochs after which the learning rate is halved."""


@dataclass
class Curve:
    """What is recorded after every epoch."""

    train_loss: list[float] = field(default_factory=list)
    """Mean over the epoch's batches, each taken before its step."""
    test_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)


class Training:
    """A network in training.

    The seed sets the initial weights, the order of the images and their augmentation, each from a
    generator of its own, so that all methods have the same.
    """

    def __init__(self, setup: Setup, images: ImageSet) -> None:
        device = images.train.pixels.device
        self.images = images
        self.setup = setup
        self.random = torch.Generator().manual_seed(setup.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setup.seed)
            channels = images.train.pixels.shape[1]
            self.network = NETWORKS[setup.network](channels, setup.width, setup.stages).to(device)
        self.params = list(self.network.parameters())
        self.optimizer = METHODS[setup.method].make(self.params, lr=setup.lr)
        # A last batch of a few images would move the batch norms' averages far: it is left out.
        self.steps_per_epoch = max(1, len(images.train) // setup.batch_size)
        halve_after = [epoch * self.steps_per_epoch for epoch in setup.halve_after]
        self.schedule = MultiStepLR(self.optimizer, halve_after, gamma=0.5)

    def steps(self) -> Iterator[Tensor]:
        """Take steps for ever, yielding each one's loss; gradients are still there then."""
        count = len(self.images.train)
        while True:
            order = torch.randperm(count, generator=self.random)
            for which in order.split(self.setup.batch_size)[: self.steps_per_epoch]:
                yield self._step(which.to(self.images.train.labels.device))

    def _step(self, which: Tensor) -> Tensor:
        pixels = self.images.train.pixels[which]
        if self.images.augment is not None:
            pixels = self.images.augment(pixels, self.random)
        logits = self.network(self.images.normalised(pixels))
        loss = functional.cross_entropy(logits, self.images.train.labels[which])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()

    @torch.no_grad()
    def test(self, images: Images) -> tuple[float, float]:
        """Return mean loss and accuracy."""
        self.network.eval()
        loss, right = 0.0, 0
        for first in range(0, len(images), TEST_BATCH):
            batch = images[first : first + TEST_BATCH]
            logits = self.network(self.images.normalised(batch.pixels))
            loss += functional.cross_entropy(logits, batch.labels, reduction="sum").item()
            right += int((logits.argmax(1) == batch.labels).sum())
        self.network.train()
        return loss / len(images), right / len(images)


def train(setup: Setup, images: ImageSet) -> Curve:
    """Train for all epochs and test after each; ``images`` lie on the device to use."""
    training = Training(setup, images)
    curve = Curve()
    steps = training.steps()
    for _ in range(setup.epochs):
        losses = [next(steps) for _ in range(training.steps_per_epoch)]
        loss, accuracy = training.test(images.test)
        curve.train_loss.append(torch.stack(losses).mean().item())
        curve.test_loss.append(loss)
        curve.test_accuracy.append(accuracy)
    return curve
