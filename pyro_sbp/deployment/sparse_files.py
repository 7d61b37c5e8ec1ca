"""Save tensors with many zeros to a file that does not store the zeros."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pyro_sbp.datasets.memory import available_memory
from pyro_sbp.deployment.description import parse_json
from pyro_sbp.errors import first_line

__all__ = ["read_sparse", "write_sparse"]

#: The longest step between stored values, which must fit into a byte. In longer gaps, zeros are
#: stored.
_LONGEST = 255


def write_sparse(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors to a safetensors file.

    If it takes less space, a tensor is stored as two tensors of the same length: ``NAME:values``,
    the values that are not zero, and ``NAME:steps``, the distance of each value from the value
    before it, in elements, as uint8. Other tensors are stored unchanged.
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
    steps = torch.diff(places, prepend=torch.tensor([-1], device="cpu"))
    # A step of 600 becomes 255, 255 and 90.
    bridges = (steps - 1) // _LONGEST
    rest = steps - bridges * _LONGEST
    ends = (bridges + 1).cumsum(0) - 1
    stored = torch.full((int((bridges + 1).sum()),), _LONGEST, dtype=torch.int64, device="cpu")
    stored[ends] = rest
    values = flat[stored.cumsum(0) - 1] if len(stored) else flat[:0]
    return values, stored.to(torch.uint8)


def read_sparse(path: Path) -> dict[str, Tensor]:
    """Read the tensors that `write_sparse` wrote, by name.

    Raises:
        ValueError: the file is damaged, or a tensor does not fit into memory.
    """
    try:
        with safe_open(path, "pt") as file:
            text = file.metadata()["shapes"]
            content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        shapes = parse_json(text)
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(f"{path} is not a file of sparse tensors: {first_line(error)}") from error
    if not isinstance(shapes, dict) or not all(map(_is_shape, shapes.values())):
        raise ValueError(f"{path} is damaged: its shapes are not lists of sizes")
    tensors = {}
    for name, shape in shapes.items():
        values, steps = content.pop(f"{name}:values", None), content.pop(f"{name}:steps", None)
        if values is None or steps is None:
            raise ValueError(f"{path} is damaged: the values or steps of {name!r} are missing")
        try:
            tensors[name] = _with_zeros(values, steps, shape)
        except (RuntimeError, ValueError) as error:  # RuntimeError: torch cannot allocate it
            raise ValueError(f"{path} is damaged: {name!r} has {first_line(error)}") from error
    return {**tensors, **content}


def _with_zeros(values: Tensor, steps: Tensor, shape: list[int]) -> Tensor:
    if values.ndim != 1 or steps.shape != values.shape or steps.dtype != torch.uint8:
        raise ValueError("positions that do not fit its values or its shape")
    size = math.prod(shape)
    places = steps.long().cumsum(0) - 1
    # A step of 0 would overwrite a value, or write to the end of the tensor.
    if len(places) and (int(steps.min()) == 0 or int(places[-1]) >= size):
        raise ValueError("positions that do not fit its values or its shape")
    available = available_memory(torch.device("cpu"))
    if available is not None and size * values.element_size() > available:
        raise ValueError(f"shape {shape}, which does not fit into memory")
    flat = values.new_zeros(size)
    flat[places] = values
    return flat.view(shape)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in value
    )
