"""Random changes of training images, computed for whole batches on their device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Augmentation"]


@dataclass(frozen=True)
class Augmentation:
    """A random crop and a random flip, drawn for every image.

    Random numbers come from torch's generator for the device of the images. A change that is turned
    off draws none. No operation synchronises with the device.

    Attributes:
        crop: pad every side by this many zero pixels, then crop to the original size at one of the
            ``(2 crop + 1)^2`` offsets, with equal probabilities.
        flip: mirror every image from left to right with probability 1/2.
    """

    crop: int = 0
    flip: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """Map images ``[batch, channels, height, width]`` to images of the same shape."""
        if self.crop:
            x = _crop(x, self.crop)
        return _flip(x) if self.flip else x


def _crop(x: Tensor, pad: int) -> Tensor:
    examples, channels, height, width = x.shape

    def number(size: int) -> Tensor:
        return torch.arange(size, device=x.device)

    down, right = torch.randint(2 * pad + 1, (2, examples, 1), device=x.device)
    rows, columns = number(height) + down, number(width) + right
    return F.pad(x, (pad, pad, pad, pad))[
        number(examples)[:, None, None, None],
        number(channels)[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


def _flip(x: Tensor) -> Tensor:
    chosen = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
    return torch.where(chosen, x.flip(-1), x)
