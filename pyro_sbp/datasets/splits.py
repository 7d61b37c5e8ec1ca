"""Labelled images, held as tensors, and how they are handed out in batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_sbp.datasets.standardization import Standardization

__all__ = ["Split"]


@dataclass(frozen=True)
class Split:
    """Images ``[examples, channels, height, width]``, uint8; labels ``[examples]``, int64.

    Attributes:
        images, labels: on the device where batches are wanted.
        standardization: what every batch goes through last; None leaves pixels in [0, 1].
    """

    images: Tensor
    labels: Tensor
    standardization: Standardization | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Channels, height, width."""
        return tuple(self.images.shape[1:])

    def to(self, device: torch.device) -> Split:
        """The same on a device."""
        last = self.standardization
        return dataclasses.replace(
            self,
            images=self.images.to(device),
            labels=self.labels.to(device),
            standardization=None if last is None else last.to(device),
        )

    def part(self, index: Tensor) -> Split:
        """Some of the examples, as a split of their own."""
        index = index.to(self.labels.device)
        return dataclasses.replace(self, images=self.images[index], labels=self.labels[index])

    def pixels(self, indices: Sequence[Tensor]) -> Iterator[Tensor]:
        """The images as they are stored, uint8, on the device: a batch for every index tensor."""
        return (self.images[index.to(self.images.device)] for index in indices)

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Some examples: images as float32, in [0, 1] unless standardised, and labels."""
        return self._values(self.images[index], None), self.labels[index]

    def batches(
        self, indices: Sequence[Tensor], augment: Callable[[Tensor], Tensor] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches as of `batch`, one for every index tensor, in order.

        Args:
            indices: which examples, int64.
            augment: what is done to images in [0, 1] on the device, before they are standardised;
                it is called when the batch is taken, so its random numbers are drawn in order.
        """
        with closing(self.pixels(indices)) as stored:
            for index, pixels in zip(indices, stored, strict=True):
                yield self._values(pixels, augment), self.labels[index.to(self.labels.device)]

    def _values(self, pixels: Tensor, augment: Callable[[Tensor], Tensor] | None) -> Tensor:
        x = pixels.float().div(255)
        x = x if augment is None else augment(x)
        return x if self.standardization is None else self.standardization(x)
