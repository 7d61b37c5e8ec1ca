"""The networks of the papers: LeNet-500-300, LeNet-300-100, LeNet-5-Caffe and VGG-like."""

from torch import Tensor, nn

__all__ = ["LeNet5", "LeNet300_100", "LeNet500_300", "VGGLike"]


class _DenseLeNet(nn.Module):
    def __init__(self, hidden: tuple[int, int], in_features: int, num_classes: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden[0])
        self.fc2 = nn.Linear(hidden[0], hidden[1])
        self.fc3 = nn.Linear(hidden[1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[batch, ...]`` with `in_features` pixels to logits ``[batch, classes]``."""
        x = self.fc1(x.flatten(1)).relu()
        x = self.fc2(x).relu()
        return self.fc3(x)


class LeNet500_300(_DenseLeNet):
    """Dense network 784-500-300-10 (arXiv 1705.07283, section 5)."""

    def __init__(self, in_features: int = 784, num_classes: int = 10) -> None:
        super().__init__((500, 300), in_features, num_classes)


class LeNet300_100(_DenseLeNet):
    """Dense network 784-300-100-10 (arXiv 1701.05369, section 5)."""

    def __init__(self, in_features: int = 784, num_classes: int = 10) -> None:
        super().__init__((300, 100), in_features, num_classes)


class LeNet5(nn.Module):
    """LeNet-5-Caffe: conv 20 and 50 at 5x5, dense 800-500-10 (arXiv 1705.07283, section 5)."""

    def __init__(self, in_channels: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[batch, channels, 28, 28]`` to logits ``[batch, classes]``."""
        # Pooling first is the same as ReLU first, and four times cheaper.
        x = self.pool(self.conv1(x)).relu()
        x = self.pool(self.conv2(x)).relu()
        x = self.fc1(x.flatten(1)).relu()
        return self.fc2(x)


class VGGLike(nn.Module):
    """VGG-like for 32x32 images: 13 conv 3x3 with batch norm, dense 512 (arXiv 1705.07283).

    Args:
        in_channels: of the images.
        num_classes: how many logits.
        width: channels of the first block; 64 in the paper. The others have 2, 4, 8 and 8 times as
            many, and the dense layer 8 times.
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
        """Map images ``[batch, channels, 32, 32]`` to logits ``[batch, classes]``."""
        x = self.features(x).flatten(1)
        x = self.bn1(self.fc1(x)).relu()
        return self.fc2(x)
