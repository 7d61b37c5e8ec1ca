"""Tensors with many zeros in a file that leaves these out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["read_sparse", "write_sparse"]

#: A gap between two numbers that a byte holds; a longer one is bridged by zeros that are stored.
_LONGEST = 255


def write_sparse(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors to a safetensors file.

    Of one in which that takes less room, the values that are not zero, ``NAME:values``, and how
    many places after the one before each stands, ``NAME:steps``, in a byte; the others as they are.
    """
    content, shapes = {}, {}
    for name, tensor in tensors.items():
        values, steps = _without_zeros(tensor)
        if values.numel() * (values.element_size() + 1) < tensor.numel() * tensor.element_size():
            shapes[name] = list(tensor.shape)
            content[f"{name}:values"], content[f"{name}:steps"] = values, steps
        else:
            content[name] = tensor.contiguous()
    save_file(content, path, metadata={"shapes": json.dumps(shapes)})


def _without_zeros(tensor: Tensor) -> tuple[Tensor, Tensor]:
    flat = tensor.detach().cpu().flatten()
    places = torch.nonzero(flat).flatten()
    steps = torch.diff(places, prepend=torch.tensor([-1]))
    # A step of 600 becomes 255, 255 and 90.
    bridges = (steps - 1) // _LONGEST
    rest = steps - bridges * _LONGEST
    ends = (bridges + 1).cumsum(0) - 1
    stored = torch.full((int((bridges + 1).sum()),), _LONGEST, dtype=torch.int64)
    stored[ends] = rest
    values = flat[stored.cumsum(0) - 1] if len(stored) else flat[:0]
    return values, stored.to(torch.uint8)


def read_sparse(path: Path) -> dict[str, Tensor]:
    """Read what `write_sparse` wrote.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            shapes = json.loads(file.metadata()["shapes"])
            content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{path} is no file of sparse tensors: {error}") from error
    tensors = {}
    for name, tensor in content.items():
        whole, _, kind = name.rpartition(":")
        if whole not in shapes:
            tensors[name] = tensor
        elif kind == "values":
            flat = tensor.new_zeros(torch.Size(shapes[whole]).numel())
            places = content[f"{whole}:steps"].long().cumsum(0) - 1
            if len(places) != len(tensor) or (len(places) and int(places[-1]) >= len(flat)):
                raise ValueError(f"{path} is damaged: {whole} has other places than values")
            flat[places] = tensor
            tensors[whole] = flat.view(shapes[whole])
    return tensors
