"""Standardize images by the mean and the standard deviation of every channel."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Standardization"]


@dataclass(frozen=True, eq=False)
class Standardization:
    """Subtract from every channel its mean, and divide by its standard deviation.

    Attributes:
        mean: the means of pixels in [0, 1], ``[channels, 1, 1]``, float32.
        std: their standard deviations, of the same shape. It is 1 for a constant channel, which
            becomes zero.
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, mean: Sequence[float], std: Sequence[float]) -> Standardization:
        """A standardization by given values, one for each channel."""
        return cls(*(torch.tensor(x, device="cpu")[:, None, None] for x in (mean, std)))

    @classmethod
    def measure(cls, batches: Iterable[Tensor]) -> Standardization:
        """A standardization by the statistics of uint8 images.

        The sums are exact sums of integers, so the result depends neither on the sizes of the
        batches nor on the device.

        Args:
            batches: images ``[batch, channels, height, width]``.

        Raises:
            ValueError: there is no batch.
        """
        count, sums, squares = 0, None, None
        for batch in batches:
            # Exact in float64 up to 2^53, which is 10^11 pixels per channel.
            x = batch.double()
            first, second = x.sum((0, 2, 3)), x.square().sum((0, 2, 3))
            sums = first if sums is None else sums + first
            squares = second if squares is None else squares + second
            count += x.shape[0] * x.shape[2] * x.shape[3]
        if sums is None or squares is None:
            raise ValueError("there are no images to measure mean and standard deviation on")
        means, stds = [], []
        for total, square in zip(sums.tolist(), squares.tolist(), strict=True):
            # In integers, because the difference cancels in floating point.
            spread = count * int(square) - int(total) ** 2
            means.append(total / count / 255)
            stds.append(math.sqrt(spread) / count / 255 if spread else 1.0)
        return cls(*(torch.tensor(x, device=sums.device)[:, None, None] for x in (means, stds)))

    def __call__(self, x: Tensor) -> Tensor:
        """Standardize images ``[batch, channels, height, width]`` in [0, 1]."""
        return (x - self.mean) / self.std

    def to(self, device: torch.device) -> Standardization:
        """The same statistics on a device."""
        return Standardization(self.mean.to(device), self.std.to(device))

    def to_dict(self) -> dict[str, list[float]]:
        """``mean`` and ``std`` as lists of numbers, one for each channel."""
        return {"mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}
