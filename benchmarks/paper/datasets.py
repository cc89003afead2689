"""Images to classify: CIFAR-10 from a folder, or scikit-learn's digits, which come with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .cifar10 import read_cifar10

__all__ = ["ImageSet", "Images", "cifar10", "digits", "hold_out"]

Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Images:
    """Images, uint8 of shape (N, C, H, W), and their labels, int64 of shape (N,)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, which: slice) -> Images:
        return Images(self.pixels[which], self.labels[which])

    def to(self, device: torch.device) -> Images:
        return Images(self.pixels.to(device), self.labels.to(device))


@dataclass(frozen=True)
class ImageSet:
    """What is trained on and what is tested on, with the training pixels' mean and deviation."""

    train: Images
    test: Images
    mean: Tensor
    std: Tensor
    augment: Augment | None = None

    @classmethod
    def of(cls, train: Images, test: Images, augment: Augment | None = None) -> ImageSet:
        """Make a set, with mean and deviation by channel."""
        channels = train.pixels.transpose(0, 1).flatten(1).double()
        shape = (1, len(channels), 1, 1)
        mean, std = channels.mean(1).float().view(shape), channels.std(1).float().view(shape)
        return cls(train, test, mean, std, augment)

    def to(self, device: torch.device) -> ImageSet:
        parts = {name: getattr(self, name).to(device) for name in ("train", "test", "mean", "std")}
        return replace(self, **parts)

    def normalised(self, pixels: Tensor) -> Tensor:
        """Return pixels as a network takes them."""
        return (pixels.float() - self.mean) / self.std


def hold_out(images: ImageSet, parts: int) -> ImageSet:
    """Return a set without its test images: tested on the last of ``parts`` of the training ones.

    For choosing a learning rate: the test images must not have a say in it.
    """
    first = len(images.train) * (parts - 1) // parts
    train, test = images.train[:first], images.train[first:]
    return ImageSet.of(train, test, images.augment)


@cache
def digits(most: int | None = None) -> ImageSet:
    """Return scikit-learn's 1797 handwritten digits of 8x8 pixels.

    The first half in file order is trained on, the second tested on, as in scikit-learn's own
    example. The halves are not shuffled together: so none is drawn by the hand that drew its
    neighbour.

    Args:
        most: leave out all but this many training images.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.from_numpy(found.images).to(torch.uint8).unsqueeze(1)
    every = Images(pixels, torch.from_numpy(found.target).long())
    half = (len(every) + 1) // 2
    return ImageSet.of(every[: min(half, most or half)], every[half:])


@cache
def cifar10(folder: Path) -> ImageSet:
    """Return CIFAR-10 from its files in ``folder``, cropped and flipped at random in training."""
    train, test = read_cifar10(folder)
    return ImageSet.of(Images(*train), Images(*test), crop_and_flip)


def crop_and_flip(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Return every image moved by up to 4 pixels, black where nothing was, half of them mirrored.

    Args:
        pixels: of shape (N, C, H, W), on any device.
        generator: on the CPU.
    """
    count, _, height, width = pixels.shape
    margin = 4
    padded = torch.nn.functional.pad(pixels, (margin,) * 4)
    top, left = torch.randint(2 * margin + 1, (2, count), generator=generator)
    mirrored = torch.randint(2, (count,), generator=generator).bool()
    rows = top[:, None] + torch.arange(height)
    columns = torch.arange(width).expand(count, width)
    columns = left[:, None] + torch.where(mirrored[:, None], columns.flip(1), columns)
    image, rows, columns = (
        index.to(pixels.device)
        for index in (torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :])
    )
    # Advanced indices around a slice go first: (N, H, W, C).
    return padded[image, :, rows, columns].permute(0, 3, 1, 2)
