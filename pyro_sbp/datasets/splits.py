"""Labelled images, and batches of them."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pyro_sbp.datasets.standardization import Standardization

__all__ = ["LabelledImages", "Split"]


class LabelledImages(ABC):
    """Images with labels, in memory or on disk.

    Attributes:
        labels: int64 ``[examples]``, on the device of the batches.
        standardization: applied to every batch as the last step; with None, pixels are in [0, 1].
    """

    labels: Tensor
    standardization: Standardization | None

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, ...]:
        """The number of channels, the height and the width."""

    @abstractmethod
    def to(self, device: torch.device) -> Self:
        """The same images, with batches on a device."""

    @abstractmethod
    def part(self, index: Tensor) -> Self:
        """The examples with the indices in a tensor, as a new split."""

    @abstractmethod
    def with_labels(self, labels: Tensor) -> Self:
        """The same images with other labels."""

    @abstractmethod
    def standardized_by(self, standardization: Standardization) -> Self:
        """The same images with another standardization."""

    @abstractmethod
    def pixels(self, indices: Sequence[Tensor]) -> Generator[Tensor]:
        """The stored images, uint8, on the device of the batches, one batch per index tensor."""

    @abstractmethod
    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Images, as float32 in [0, 1] or standardized, and labels of the given indices."""

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self, indices: Sequence[Tensor], augment: Callable[[Tensor], Tensor] | None = None
    ) -> Generator[tuple[Tensor, Tensor]]:
        """Batches as from `batch`, one for each index tensor, in their order.

        Args:
            indices: the indices of the examples of each batch, int64.
            augment: applied to images in [0, 1] on the device, before they are standardized. It is
                called when a batch is requested, so its random numbers are drawn in the order of
                the batches.
        """
        with closing(self.pixels(indices)) as stored:
            for index, pixels in zip(indices, stored, strict=True):
                yield self._values(pixels, augment), self.labels[index.to(self.labels.device)]

    def _values(self, pixels: Tensor, augment: Callable[[Tensor], Tensor] | None) -> Tensor:
        x = pixels.float().div(255)
        x = x if augment is None else augment(x)
        return x if self.standardization is None else self.standardization(x)


@dataclass(frozen=True, eq=False)
class Split(LabelledImages):
    """Images ``[examples, channels, height, width]``, uint8; labels ``[examples]``, int64.

    Attributes:
        images, labels: on the device of the batches.
        standardization: applied to every batch as the last step; with None, pixels are in [0, 1].
    """

    images: Tensor
    labels: Tensor
    standardization: Standardization | None = None

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The number of channels, the height and the width."""
        return tuple(self.images.shape[1:])

    def to(self, device: torch.device) -> Split:
        """The same images on a device."""
        last = self.standardization
        return dataclasses.replace(
            self,
            images=self.images.to(device),
            labels=self.labels.to(device),
            standardization=None if last is None else last.to(device),
        )

    def part(self, index: Tensor) -> Split:
        """The examples with the indices in a tensor, as a new split."""
        index = index.to(self.labels.device)
        return dataclasses.replace(self, images=self.images[index], labels=self.labels[index])

    def with_labels(self, labels: Tensor) -> Split:
        """The same images with other labels."""
        return dataclasses.replace(self, labels=labels)

    def standardized_by(self, standardization: Standardization) -> Split:
        """The same images with another standardization."""
        return dataclasses.replace(self, standardization=standardization)

    def pixels(self, indices: Sequence[Tensor]) -> Generator[Tensor]:
        """The stored images, uint8, on the device of the batches, one batch per index tensor."""
        return (self.images[index.to(self.images.device)] for index in indices)

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Images, as float32 in [0, 1] or standardized, and labels of the given indices."""
        return self._values(self.images[index], None), self.labels[index]
