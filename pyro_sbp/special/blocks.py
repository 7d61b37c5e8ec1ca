"""Functions of many elements, evaluated in blocks whose intermediate results stay in the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_sbp.special.derivatives import common_shape, may_look

__all__ = ["BLOCK", "in_blocks"]

#: Elements: in float64 256 KiB.
BLOCK = 1 << 15


def in_blocks(function: Callable[..., Sequence[Tensor]], *inputs: Tensor) -> list[Tensor]:
    """What a function gives that treats every element alone.

    Args:
        function: from tensors that broadcast to tensors of the shape that they have together.
        inputs: what it is called with; whole, if they are few or are copied along a dimension.
    """
    if not all(map(may_look, inputs)):
        return list(function(*inputs))
    sizes = {x.numel() for x in inputs}
    size = max(sizes)
    if size <= BLOCK or not sizes <= {1, size}:
        return list(function(*inputs))
    shape, count = common_shape(*inputs), -(-size // BLOCK)
    split = (
        [x.reshape(())] * count if x.numel() == 1 else x.reshape(-1).split(BLOCK) for x in inputs
    )
    found = [function(*block) for block in zip(*split, strict=True)]
    return [torch.cat(list(parts)).view(shape) for parts in zip(*found, strict=True)]
