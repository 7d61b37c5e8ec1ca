"""Store each tensor of a network once, even if it has several names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["under_all_names", "unique_tensors"]


def unique_tensors(net: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a network without repetitions.

    Returns:
        The tensors, each under its first name; and a mapping from every further name to the first
        name of the same tensor.

    Raises:
        ValueError: the state dict has a value that is not a dense tensor.
    """
    tensors: dict[str, torch.Tensor] = {}
    same: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor in net.state_dict().items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise ValueError(f"{name!r} of the state dict is not a dense tensor")
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and key in first:
            same[name] = first[key]
        else:
            first[key] = name
            tensors[name] = tensor.contiguous()
    return tensors, same


def under_all_names(
    tensors: Mapping[str, torch.Tensor], same: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    """The reverse of `unique_tensors`: a tensor with two names is included under both.

    Raises:
        ValueError: a further name is that of a stored tensor, or its first name is not.
    """
    for name, first in same.items():
        if first not in tensors or name in tensors:
            raise ValueError(f"{name!r} cannot be the same tensor as {first!r}")
    return {**tensors, **{name: tensors[first] for name, first in same.items()}}
