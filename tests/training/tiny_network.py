"""Networks and a data set so small that a whole run of them takes a second."""

import torch

from pyro_sbp.datasets.loading import ImageData
from pyro_sbp.datasets.splits import Split

__all__ = ["Digits", "Net", "labelled_images"]


class Net(torch.nn.Sequential):
    """A dense network for 4 x 4 images."""

    def __init__(self, num_classes: int) -> None:
        layers = torch.nn.Linear(16, 12), torch.nn.ReLU(), torch.nn.Linear(12, num_classes)
        super().__init__(torch.nn.Flatten(), *layers)


class Digits(torch.nn.Sequential):
    """A dense network with two gates, for the 8 x 8 images of digits."""

    def __init__(self, num_classes: int = 10) -> None:
        first, second = torch.nn.Linear(64, 100), torch.nn.Linear(100, 50)
        layers = first, torch.nn.ReLU(), second, torch.nn.ReLU(), torch.nn.Linear(50, num_classes)
        super().__init__(torch.nn.Flatten(), *layers)


def labelled_images() -> ImageData:
    """100 images of two classes, told apart by the first pixel; they are also the test set."""
    torch.manual_seed(0)
    images = torch.randint(256, (100, 1, 4, 4), dtype=torch.uint8)
    split = Split(images, (images[:, 0, 0, 0] > 127).long())
    return ImageData(split, split, ("a", "b"))
