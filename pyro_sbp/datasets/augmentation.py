"""Random changes of training images, on whole batches and on their device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Augmentation"]


@dataclass(frozen=True)
class Augmentation:
    """A random crop and a random flip, drawn for every image.

    Random numbers come from torch's generator of the images' device, and none are drawn for what is
    off. Nothing waits for the device.

    Attributes:
        crop: pad every side by this many zero pixels, then cut back to the size at one of the
            ``(2 crop + 1)^2`` offsets, all as likely.
        flip: mirror left and right with probability one half.
    """

    crop: int = 0
    flip: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """Images ``[batch, channels, height, width]`` to images of the same shape."""
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
