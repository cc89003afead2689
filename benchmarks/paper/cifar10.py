"""Reads CIFAR-10 in its standard binary form.

A file is a sequence of records of 3073 bytes: a label from 0 to 9, then the 32x32 image's red,
green and blue planes, row by row.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["FOLDER", "TEST_FILES", "TRAIN_FILES", "Cifar10Error", "find_cifar10", "read_cifar10"]

TRAIN_FILES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST_FILES = ("test_batch.bin",)
FOLDER = "cifar-10-batches-bin"
SHAPE = (3, 32, 32)
RECORD_BYTES = 1 + 3 * 32 * 32
CLASSES = 10


class Cifar10Error(ValueError):
    """What is wrong with a folder that should hold CIFAR-10."""


def find_cifar10(folder: Path) -> Path:
    """Return where the files are: ``folder``, or ``cifar-10-batches-bin`` in it.

    Raises:
        Cifar10Error: files are missing; the message lists those expected and where they come from.
    """
    for place in (folder, folder / FOLDER):
        missing = [name for name in (*TRAIN_FILES, *TEST_FILES) if not (place / name).is_file()]
        if not missing:
            return place
        if len(missing) < len(TRAIN_FILES) + len(TEST_FILES):
            raise Cifar10Error(f"{place} lacks {', '.join(missing)}")
    raise Cifar10Error(
        f"{folder} holds no CIFAR-10; expected are the files {', '.join(TRAIN_FILES + TEST_FILES)} "
        f"there or in {FOLDER}/: unpack cifar-10-binary.tar.gz (the binary version, from "
        "https://www.cs.toronto.edu/~kriz/cifar.html)"
    )


def read_cifar10(folder: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (images, labels) of the training and of the test files.

    Args:
        folder: as for :func:`find_cifar10`.

    Returns:
        Images are uint8 of shape (N, 3, 32, 32), labels int64 of shape (N,).

    Raises:
        Cifar10Error: a file is missing, is not a whole number of records, or holds a label
            above 9.
    """
    place = find_cifar10(folder)
    train, test = ([_read(place / name) for name in names] for names in (TRAIN_FILES, TEST_FILES))
    return _joined(train), _joined(test)


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)


def _read(path: Path) -> tuple[Tensor, Tensor]:
    content = np.fromfile(path, dtype=np.uint8)
    if not content.size or content.size % RECORD_BYTES:
        raise Cifar10Error(
            f"{path} has {content.size} bytes, which is not a whole number of records of "
            f"{RECORD_BYTES}: it is not the binary version, or its download was cut off"
        )
    records = torch.from_numpy(content).view(-1, RECORD_BYTES)
    labels = records[:, 0].long()
    if labels.max() >= CLASSES:
        raise Cifar10Error(f"{path} holds the label {labels.max()}; CIFAR-10's are 0 to 9")
    return records[:, 1:].reshape(-1, *SHAPE), labels
