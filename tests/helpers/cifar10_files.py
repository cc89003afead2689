"""CIFAR-10's files, with images made up."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.paper.cifar10 import (
    TEST_FILES,
    TRAIN_FILES,
)

IMAGES_A_FILE = 4


def write_cifar10(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write CIFAR-10's files with a few random images each; return all images and labels."""
    random = np.random.default_rng(0)
    files = (*TRAIN_FILES, *TEST_FILES)
    images = random.integers(0, 256, (len(files), IMAGES_A_FILE, 3, 32, 32), dtype=np.uint8)
    labels = random.integers(0, 10, (len(files), IMAGES_A_FILE), dtype=np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    for name, some_images, some_labels in zip(files, images, labels, strict=True):
        with (folder / name).open("wb") as file:
            for image, label in zip(some_images, some_labels, strict=True):
                file.write(bytes([label]))
                for plane in image:  # Red, green, blue; each row by row.
                    file.write(plane.tobytes())
    return images.reshape(-1, 3, 32, 32), labels.reshape(-1)
