"""Networks with binary dropout, which memorise random labels, unlike networks with SBP.

They are used as `--arch pyro_sbp.experiments.dropout:lenet_300_100`, for example.
"""

from __future__ import annotations

from torch import Tensor, nn

from pyro_sbp.networks import LeNet5, LeNet300_100

__all__ = ["lenet5_32", "lenet5_32_dropout", "lenet_300_100"]

#: The share of hidden units that dropout sets to zero.
RATE = 0.5


class _LeNet300_100(LeNet300_100):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes=num_classes)
        self.dropout = nn.Dropout(RATE)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[batch, 1, 28, 28]`` to logits ``[batch, classes]``."""
        x = self.dropout(self.fc1(x.flatten(1)).relu())
        x = self.dropout(self.fc2(x).relu())
        return self.fc3(x)


class _LeNet5(LeNet5):
    def __init__(self, num_classes: int, rate: float) -> None:
        super().__init__(3, num_classes)
        self.fc1 = nn.Linear(50 * 5 * 5, 500)
        self.dropout = nn.Dropout(rate)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[batch, 3, 32, 32]`` to logits ``[batch, classes]``."""
        x = self.pool(self.conv1(x)).relu()
        x = self.pool(self.conv2(x)).relu()
        x = self.dropout(self.fc1(x.flatten(1)).relu())
        return self.fc2(x)


def lenet_300_100(num_classes: int = 10) -> nn.Module:
    """LeNet-300-100 with dropout after both hidden layers, for 28x28 grey images."""
    return _LeNet300_100(num_classes)


def lenet5_32(num_classes: int = 10) -> nn.Module:
    """LeNet-5 for 32x32 colour images, without dropout, for training with SBP."""
    return _LeNet5(num_classes, 0.0)


def lenet5_32_dropout(num_classes: int = 10) -> nn.Module:
    """LeNet-5 for 32x32 colour images, with dropout after its hidden dense layer."""
    return _LeNet5(num_classes, RATE)
