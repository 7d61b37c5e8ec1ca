"""The errors and the calibration of the networks of a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from pyro_sbp.datasets.loading import ImageData
from pyro_sbp.datasets.splits import LabelledImages
from pyro_sbp.methods.phase import Predict
from pyro_sbp.models.calibration import BINS, Measured, measured, sums
from pyro_sbp.training.devices import sum_over_processes

__all__ = ["Evaluation"]

#: The largest number of values, and of images, in a batch of test images. A batch has 500 images
#: of CIFAR-10, or 10 images of 224 x 224.
TEST_NUMBERS, TEST_BATCH = 500 * 3 * 32 * 32, 500


class Evaluation:
    """The errors and the calibration of the networks of a run, by split and by the name of the
    network.

    The splits are "test", "validation" if images are reserved for it, and "training" if its labels
    are random.

    Args:
        data: the data, on the device of `fabric`.
        fabric: the devices.
        to_input: from images to the input of the network.
        on_training: whether networks are also measured on the training images.

    Attributes:
        errors: in percent.
        calibration: NLL and ECE.
    """

    def __init__(
        self,
        data: ImageData,
        fabric: Fabric,
        to_input: Callable[[Tensor], Tensor],
        on_training: bool,
    ) -> None:
        self.data, self.fabric, self.to_input = data, fabric, to_input
        self.on_training = on_training
        splits = ("test", "validation", "training")
        self.errors: dict[str, dict[str, float | None]] = {split: {} for split in splits}
        self.calibration: dict[str, dict[str, dict[str, float]]] = {split: {} for split in splits}

    def measure(self, name: str, predict: Predict) -> None:
        """Measure the error and the calibration of a network on all splits."""
        splits: dict[str, LabelledImages] = {"test": self.data.test}
        if self.data.validation is not None:
            splits["validation"] = self.data.validation
        if self.on_training:
            splits["training"] = self.data.train
        for split, images in splits.items():
            found = self.evaluate(predict, images)
            self.errors[split][name] = found.error
            self.calibration[split][name] = {"nll": found.nll, "ece": found.ece}

    @torch.no_grad()
    def evaluate(self, predict: Predict, split: LabelledImages | None = None) -> Measured:
        """The error and the calibration of a network on a split; by default the test set.

        They are computed in the precision of the parameters. Training may use bfloat16, but the
        returned network does not.
        """
        images = self.data.test if split is None else split
        if isinstance(predict, nn.Module):
            predict.eval()
        total = torch.zeros(2 + BINS, dtype=torch.float64, device=self.fabric.device)
        rank, world = self.fabric.global_rank, self.fabric.world_size
        batches = torch.arange(len(images), device="cpu").split(_test_batch(images))[rank::world]
        with closing(images.batches(batches)) as shares:
            for x, y in shares:
                total += sums(predict(self.to_input(x)), y)
        return measured(sum_over_processes(self.fabric, total), len(images))


def _test_batch(split: LabelledImages) -> int:
    """The batch size for predictions on a split."""
    return min(TEST_BATCH, max(1, TEST_NUMBERS // math.prod(split.image_shape)))
