"""What pyro-sbp knows of torch's layers: where the rows and columns of their weights lie."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "CHANNELWISE_FUNCTIONS",
    "LINEAR_FUNCTIONS",
    "SIZE_ATTRIBUTES",
    "channel_dim",
    "is_channelwise",
    "is_matrix",
    "resize",
]

#: Functions that are linear in the columns of their weight: f(input, weight, bias, ...).
LINEAR_FUNCTIONS = frozenset({F.linear, F.conv1d, F.conv2d, F.conv3d})
#: Functions that treat every channel alone.
CHANNELWISE_FUNCTIONS = frozenset({F.batch_norm, torch.batch_norm})

#: The attributes of layers that repeat the number of rows, and of columns.
_SIZES = (("out_features", "out_channels", "num_features"), ("in_features", "in_channels"))
#: All attributes of layers that `resize` changes.
SIZE_ATTRIBUTES = (*_SIZES[0], *_SIZES[1], "groups")

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def is_matrix(module: nn.Module) -> bool:
    """Whether a layer has the weight ``[rows, columns, ...]``: every input meets every output."""
    return isinstance(module, nn.Linear) or (
        isinstance(module, _CONVOLUTIONS) and module.groups == 1
    )


def is_channelwise(module: nn.Module) -> bool:
    """Whether a layer treats every channel alone: batch norm, depthwise convolution."""
    if isinstance(module, _BATCH_NORMS):
        return True
    return (
        isinstance(module, _CONVOLUTIONS)
        and module.groups > 1
        and module.groups == module.in_channels == module.out_channels
    )


def channel_dim(module: nn.Module, input: Tensor) -> int:
    """The dimension of `input` that holds the layer's channels or features."""
    if isinstance(module, nn.Linear):
        return input.ndim - 1
    if isinstance(module, _CONVOLUTIONS):
        return input.ndim - module.weight.ndim + 1
    return 1


def _select(tensor: Tensor, index: Tensor, dim: int) -> Tensor:
    return tensor.detach().index_select(dim, index.to(tensor.device)).clone()


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    old = getattr(module, name)
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value, requires_grad=old.requires_grad)
    setattr(module, name, value)


def resize(module: nn.Module, rows: Tensor | None, columns: Tensor | None) -> None:
    """Keep only `rows` (outputs) and `columns` (inputs) of a layer, in place; None keeps all."""
    channelwise = is_channelwise(module)
    for dim, index in enumerate((rows, None if channelwise else columns)):
        if index is None:
            continue
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensor: Any = getattr(module, name, None)
            if tensor is not None and tensor.ndim > dim:
                _replace(module, name, _select(tensor, index, dim))
        for name in _SIZES[dim]:
            if hasattr(module, name):
                setattr(module, name, len(index))
    if rows is not None and channelwise and hasattr(module, "groups"):
        module.groups = module.in_channels = len(rows)
