"""Evaluate elementwise functions in blocks, so that intermediate results stay in the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_sbp.special.derivatives import common_shape, may_look

__all__ = ["BLOCK", "in_blocks"]

#: The number of elements of a block, 256 KiB in float64.
BLOCK = 1 << 15


def in_blocks(function: Callable[..., Sequence[Tensor]], *inputs: Tensor) -> list[Tensor]:
    """The results of an elementwise function, computed block by block.

    Args:
        function: from tensors that broadcast to a list of tensors of their common shape.
        inputs: its arguments. The function is called once on all elements if there are few, or if
            an input is expanded along a dimension.
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
