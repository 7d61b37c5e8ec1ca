"""Evaluate elementwise functions in blocks, so that intermediate results stay in the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_sbp.special.derivatives import common_shape, may_look

__all__ = ["BLOCK", "in_blocks"]

#: The number of elements of a block, 1 MiB in float64. In smaller blocks, the overhead of the
#: operations of torch costs more than a faster cache gains.
BLOCK = 1 << 17


def in_blocks(
    function: Callable[..., Sequence[Tensor]],
    *inputs: Tensor,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """The results of an elementwise function, computed block by block.

    Args:
        function: from tensors that broadcast to a list of tensors that expand to their common
            shape.
        inputs: its arguments. The function is called once on all elements if there are few, or if
            an input is expanded along a dimension.
        dtype: the dtype to which the results are rounded.
    """
    if not all(map(may_look, inputs)):
        return [found.to(dtype) for found in function(*inputs)]
    shape = common_shape(*inputs)
    sizes = {x.numel() for x in inputs}
    size = max(sizes)
    if size <= BLOCK or not sizes <= {1, size}:
        return [found.to(dtype).expand(shape) for found in function(*inputs)]
    whole: list[Tensor] = []
    split = (
        [x.reshape(())] * -(-size // BLOCK) if x.numel() == 1 else x.reshape(-1).split(BLOCK)
        for x in inputs
    )
    for index, block in enumerate(zip(*split, strict=True)):
        found = function(*block)
        whole = whole or [torch.empty(size, dtype=dtype, device="cpu") for _ in found]
        for part, values in zip(found, whole, strict=True):
            values[index * BLOCK : (index + 1) * BLOCK] = part
    return [values.view(shape) for values in whole]
