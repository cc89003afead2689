"""What the paper's experiments train: CIFAR-10 from its files, digits, and the networks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.cifar10_files import write_cifar10

from benchmarks.paper.cifar10 import (
    RECORD_BYTES,
    TEST_FILES,
    TRAIN_FILES,
    Cifar10Error,
    read_cifar10,
)
from benchmarks.paper.datasets import cifar10, crop_and_flip, digits, hold_out
from benchmarks.paper.networks import NETWORKS, VGG, ResNet, name_of


@pytest.mark.parametrize("inside", ["", "cifar-10-batches-bin"])
def test_cifar10_is_read_as_it_was_written(tmp_path: Path, inside: str) -> None:
    images, labels = write_cifar10(tmp_path / inside)
    train, test = read_cifar10(tmp_path)
    for (found_images, found_labels), part in ((train, slice(20)), (test, slice(20, None))):
        assert found_images.dtype == torch.uint8
        np.testing.assert_array_equal(found_images, images[part])
        assert found_labels.tolist() == labels[part].tolist()


def test_folder_without_cifar10_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(Cifar10Error) as caught:
        read_cifar10(tmp_path)
    for word in (str(tmp_path), *TRAIN_FILES, *TEST_FILES, "cifar-10-binary.tar.gz"):
        assert word in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    (tmp_path / TRAIN_FILES[2]).unlink()
    with pytest.raises(Cifar10Error, match=r"lacks data_batch_3\.bin$"):
        read_cifar10(tmp_path)


@pytest.mark.parametrize("size", [0, RECORD_BYTES - 1, RECORD_BYTES + 1])
def test_file_that_was_cut_off_is_refused(tmp_path: Path, size: int) -> None:
    write_cifar10(tmp_path)
    (tmp_path / TEST_FILES[0]).write_bytes(bytes(size))
    with pytest.raises(Cifar10Error, match=rf"test_batch\.bin has {size} bytes.*3073"):
        read_cifar10(tmp_path)


def test_label_beyond_9_is_refused(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    with (tmp_path / TRAIN_FILES[0]).open("r+b") as file:
        file.seek(RECORD_BYTES)
        file.write(bytes([10]))
    with pytest.raises(Cifar10Error, match=r"data_batch_1\.bin holds the label 10"):
        read_cifar10(tmp_path)


def test_cifar10_is_normalised_by_its_training_images(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    images = cifar10(tmp_path)
    normalised = images.normalised(images.train.pixels)
    torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalised.std((0, 2, 3)), torch.ones(3), atol=1e-5, rtol=0)
    assert images.augment is crop_and_flip


def test_crop_and_flip_moves_and_mirrors() -> None:
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (40, 2, 6, 6), dtype=torch.uint8, generator=random)
    found = crop_and_flip(pixels, random)
    assert found.dtype == torch.uint8
    mirrored = moved = 0
    for image, changed in zip(pixels, found, strict=True):
        padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
        windows = {
            (top, left, flip): window.flip(2) if flip else window
            for top in range(9)
            for left in range(9)
            for flip in (False, True)
            if (window := padded[:, top : top + 6, left : left + 6]) is not None
        }
        (place,) = [place for place, window in windows.items() if torch.equal(window, changed)][:1]
        mirrored += place[2]
        moved += place[:2] != (4, 4)
    assert 8 < mirrored < 32
    assert moved > 30


def test_digits_are_halved_in_file_order_and_held_out_from_training() -> None:
    images = digits()
    assert len(images.train) + len(images.test) == 1797
    assert images.train.pixels.shape[1:] == (1, 8, 8)
    assert images.train.pixels.max() == 16
    assert images.train.labels[:5].tolist() == [0, 1, 2, 3, 4]
    tuning = hold_out(images, 5)
    assert torch.equal(torch.cat([tuning.train.pixels, tuning.test.pixels]), images.train.pixels)
    assert len(tuning.test) == pytest.approx(len(images.train) / 5, abs=1)


def test_networks_are_those_of_the_field() -> None:
    """Parameters as published for CIFAR: VGG-16 less the convolutions' 4224 biases."""
    counts = {name: sum(p.numel() for p in make().parameters()) for name, make in NETWORKS.items()}
    assert counts == {"ResNet": 11_173_962, "VGG": 14_728_266 - 4224}
    assert name_of("ResNet", 4, 64) == "ResNet-18"
    assert name_of("VGG", 5, 64) == "VGG-16"
    assert name_of("VGG", 3, 16) == "VGG-8, width 16"


@pytest.mark.parametrize("network", [ResNet, VGG])
def test_networks_take_images_of_either_size(network: type[ResNet] | type[VGG]) -> None:
    assert network(1, 4, 3)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert network(3, 4)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
