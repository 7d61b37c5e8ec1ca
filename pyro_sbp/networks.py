"""The networks of the papers.

These are LeNet-500-300, LeNet-300-100, LeNet-5-Caffe, VGG-like, and residual networks for CIFAR-10.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

__all__ = [
    "LeNet5",
    "LeNet300_100",
    "LeNet500_300",
    "PlaceChannels",
    "ResNetCIFAR",
    "VGGLike",
    "place_channels",
    "resnet20",
    "resnet32",
    "resnet56",
    "resnet110",
]


class _DenseLeNet(nn.Module):
    def __init__(self, hidden: tuple[int, int], in_features: int, num_classes: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden[0])
        self.fc2 = nn.Linear(hidden[0], hidden[1])
        self.fc3 = nn.Linear(hidden[1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, ...]`` with `in_features` pixels to logits ``[batch, num_classes]``."""
        x = self.fc1(x.flatten(1)).relu()
        x = self.fc2(x).relu()
        return self.fc3(x)


class LeNet500_300(_DenseLeNet):
    """A dense network, 784-500-300-10 (arXiv 1705.07283, section 5).

    Args:
        in_features: the number of pixels of an image.
        num_classes: the number of logits.
    """

    def __init__(self, in_features: int = 784, num_classes: int = 10) -> None:
        super().__init__((500, 300), in_features, num_classes)


class LeNet300_100(_DenseLeNet):
    """A dense network, 784-300-100-10 (arXiv 1701.05369, section 5).

    Args:
        in_features: the number of pixels of an image.
        num_classes: the number of logits.
    """

    def __init__(self, in_features: int = 784, num_classes: int = 10) -> None:
        super().__init__((300, 100), in_features, num_classes)


class LeNet5(nn.Module):
    """LeNet-5-Caffe (arXiv 1705.07283, section 5).

    It has 5x5 convolutions with 20 and 50 channels, and dense layers 800-500-10.

    Args:
        in_channels: the number of channels of the images.
        num_classes: the number of logits.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[batch, in_channels, 28, 28]`` to logits ``[batch, num_classes]``."""
        # Pooling before ReLU gives the same result, and is four times cheaper.
        x = self.pool(self.conv1(x)).relu()
        x = self.pool(self.conv2(x)).relu()
        x = self.fc1(x.flatten(1)).relu()
        return self.fc2(x)


class VGGLike(nn.Module):
    """VGG-like, a network for 32x32 images (arXiv 1705.07283, section 5).

    It has 13 3x3 convolutions with batch norm, and a dense layer with 512 units.

    Args:
        in_channels: the number of channels of the images.
        num_classes: the number of logits.
        width: the number of channels of the first block, 64 in the paper. The other blocks have 2,
            4, 8 and 8 times as many channels, and the dense layer has 8 times as many units.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 10, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for times, convolutions in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
            channels = times * width
            for _ in range(convolutions):
                layers += [
                    nn.Conv2d(in_channels, channels, 3, padding=1),
                    nn.BatchNorm2d(channels),
                    nn.ReLU(),
                ]
                in_channels = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.fc1 = nn.Linear(8 * width, 8 * width)
        self.bn1 = nn.BatchNorm1d(8 * width)
        self.fc2 = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[batch, in_channels, 32, 32]`` to logits ``[batch, num_classes]``."""
        x = self.features(x).flatten(1)
        x = self.bn1(self.fc1(x)).relu()
        return self.fc2(x)


def place_channels(x: Tensor, weight: Tensor, source: Tensor) -> Tensor:
    """Multiply every channel by a factor, and insert channels of zeros.

    It is a single overridable function of torch, so that a `TorchFunctionMode` can observe it.

    Args:
        x: images ``[batch, channels, height, width]``.
        weight: the factor of every channel, ``[channels]``.
        source: for every output channel, the index of the input channel that it copies, or
            `channels` for a channel of zeros; int64 ``[outputs]``.

    Returns:
        Images ``[batch, outputs, height, width]``.
    """
    if has_torch_function((x, weight)):
        result: Tensor = handle_torch_function(place_channels, (x, weight), x, weight, source)
        return result
    padded = F.pad(x * weight.view(-1, 1, 1), (0, 0, 0, 0, 0, 1))
    return padded.index_select(1, source)


class PlaceChannels(nn.Module):
    """A shortcut without parameters that increases the number of channels.

    It takes every `stride`-th pixel, and puts the input channels in the middle of the output
    channels. The other output channels are zero (He et al. 2016, arXiv 1512.03385, section 4.2,
    option A). The positions of the channels are stored in a buffer, so that channels can be removed
    on both sides. Padding by fixed numbers would not allow this.

    Args:
        in_channels: the number of input channels.
        out_channels: the number of output channels.
        stride: the step between the pixels that are kept.
    """

    weight: Tensor
    source: Tensor

    def __init__(self, in_channels: int, out_channels: int, stride: int = 2) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.stride = in_channels, out_channels, stride
        before = (out_channels - in_channels) // 2
        source = torch.full((out_channels,), in_channels)
        source[before : before + in_channels] = torch.arange(in_channels)
        # A buffer, which is not trained. Pruning folds the noise of the input channels into it.
        self.register_buffer("weight", torch.ones(in_channels))
        self.register_buffer("source", source)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, in_channels, height, width]`` to ``[batch, out_channels, ...]``.

        The height and the width are divided by the stride.
        """
        return place_channels(x[:, :, :: self.stride, :: self.stride], self.weight, self.source)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}"


class _Block(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != channels or stride != 1:
            self.shortcut = PlaceChannels(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(y)) + self.shortcut(x)).relu()


class ResNetCIFAR(nn.Module):
    """A residual network for 32x32 images (He et al. 2016, arXiv 1512.03385, section 4.2).

    It has three stages with 16, 32 and 64 channels. The shortcuts have no parameters.

    Args:
        blocks: the number of blocks of each stage, 3 for ResNet-20 and 9 for ResNet-56.
        in_channels: the number of channels of the images.
        num_classes: the number of logits.
        width: the number of channels of the first stage.
    """

    def __init__(
        self, blocks: int, in_channels: int = 3, num_classes: int = 10, width: int = 16
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages, channels = [], width
        for stage in range(3):
            layers = []
            for block in range(blocks):
                new = width * 2**stage
                layers.append(_Block(channels, new, 2 if stage and not block else 1))
                channels = new
            stages.append(nn.Sequential(*layers))
        self.layer1, self.layer2, self.layer3 = stages
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[batch, in_channels, 32, 32]`` to logits ``[batch, num_classes]``."""
        x = self.bn1(self.conv1(x)).relu()
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def resnet20(in_channels: int = 3, num_classes: int = 10, width: int = 16) -> ResNetCIFAR:
    """ResNet-20 for 32x32 images: 0.27 M parameters, 40.55 M MACs."""
    return ResNetCIFAR(3, in_channels, num_classes, width)


def resnet32(in_channels: int = 3, num_classes: int = 10, width: int = 16) -> ResNetCIFAR:
    """ResNet-32 for 32x32 images."""
    return ResNetCIFAR(5, in_channels, num_classes, width)


def resnet56(in_channels: int = 3, num_classes: int = 10, width: int = 16) -> ResNetCIFAR:
    """ResNet-56 for 32x32 images."""
    return ResNetCIFAR(9, in_channels, num_classes, width)


def resnet110(in_channels: int = 3, num_classes: int = 10, width: int = 16) -> ResNetCIFAR:
    """ResNet-110 for 32x32 images."""
    return ResNetCIFAR(18, in_channels, num_classes, width)
