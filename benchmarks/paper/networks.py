"""ResNet and VGG in their CIFAR forms, in plain torch, at any width and number of stages.

The form for CIFAR begins with a 3x3 convolution of stride 1 and no pooling, so that 32x32 images
last through all stages; batch normalisation follows every convolution.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

__all__ = ["NETWORKS", "VGG", "ResNet", "name_of"]

# Convolutions of each stage of VGG-16; its other three layers are dense in the form for ImageNet
# and one in that for CIFAR.
VGG16_STAGES = (2, 2, 3, 3, 3)
# Blocks of two convolutions in each stage of ResNet-18.
RESNET18_STAGES = (2, 2, 2, 2)


def _convolution(inputs: int, outputs: int, stride: int = 1, size: int = 3) -> nn.Sequential:
    """Return a convolution that keeps the image's size, divided by the stride, and its norm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(outputs),
    )


class _Residual(nn.Module):
    """The basic block: two convolutions, and a projection beside them where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _convolution(inputs, outputs, stride)
        self.second = _convolution(outputs, outputs)
        same = stride == 1 and inputs == outputs
        self.beside = nn.Identity() if same else _convolution(inputs, outputs, stride, size=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(functional.relu(self.first(x)))
        return functional.relu(y + self.beside(x))


class ResNet(nn.Module):
    """ResNet-18 at its default width and stages, 11.2 million parameters.

    Args:
        channels: of the images.
        width: channels of the first stage; each further stage doubles them and halves the image.
        stages: how many of the four there are.
        classes: logits returned.
    """

    def __init__(
        self, channels: int = 3, width: int = 64, stages: int = 4, classes: int = 10
    ) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        inputs = width
        for stage, count in enumerate(RESNET18_STAGES[:stages]):
            outputs = width * 2**stage
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(_Residual(inputs, outputs, stride))
                inputs = outputs
        self.stem = nn.Sequential(_convolution(channels, width), nn.ReLU())
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


class VGG(nn.Module):
    """VGG-16 at its default width and stages, with one dense layer, 14.7 million parameters.

    Args:
        channels: of the images.
        width: channels of the first stage; each further one doubles them, up to eight times.
        stages: how many of the five there are; each ends by halving the image.
        classes: logits returned.
    """

    def __init__(
        self, channels: int = 3, width: int = 64, stages: int = 5, classes: int = 10
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = channels
        for stage, count in enumerate(VGG16_STAGES[:stages]):
            outputs = width * 2 ** min(stage, 3)
            for _ in range(count):
                layers += [_convolution(inputs, outputs), nn.ReLU()]
                inputs = outputs
            layers.append(nn.MaxPool2d(2))
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(images).mean((2, 3)))


NETWORKS: dict[str, Callable[..., nn.Module]] = {"ResNet": ResNet, "VGG": VGG}


def name_of(network: str, stages: int, width: int) -> str:
    """Return a network's name as the field counts: its layers with weights, and its width.

    Example:
        >>> name_of("ResNet", 4, 64), name_of("VGG", 3, 8)
        ('ResNet-18', 'VGG-8, width 8')
    """
    if network == "ResNet":
        full = (stages, width) == (4, 64)
        layers = 2 + 2 * sum(RESNET18_STAGES[:stages])
    else:
        full = (stages, width) == (5, 64)
        # VGG-16 counts the three dense layers of its form for ImageNet.
        layers = sum(VGG16_STAGES[:stages]) + (3 if full else 1)
    return f"{network}-{layers}" + ("" if full else f", width {width}")
