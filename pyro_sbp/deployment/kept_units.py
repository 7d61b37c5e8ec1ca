"""The units of every gate in ``units.json``."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_sbp.deployment.description import parse_json
from pyro_sbp.errors import damage
from pyro_sbp.gates.units import Units

__all__ = ["UNITS", "read_units", "units_from_dicts"]

#: The name of the file.
UNITS = "units.json"
#: The largest number of units of a gate that is read from a file.
MOST = 2**24


def read_units(file: Path) -> dict[str, Units]:
    """Read the units of every gate.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged. The message does not name the directory.
    """
    try:
        return units_from_dicts(parse_json(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{file.name} is damaged: {damage(error)}") from error


def units_from_dicts(content: Any) -> dict[str, Units]:
    """The units of every gate from the dictionaries of `Units.to_dict`.

    Raises:
        ValueError: the content has another format.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"the units are {reprlib.repr(content)}; expected the units by gate")
    return {gate: _units(gate, numbers) for gate, numbers in content.items()}


def _units(gate: str, numbers: Any) -> Units:
    names = ("total", "kept", "zeroed")
    if not isinstance(numbers, Mapping) or not numbers.keys() >= {*names}:
        raise ValueError(
            f"the units of {gate!r} are {reprlib.repr(numbers)}; expected {', '.join(names)}"
        )
    total, kept, zeroed = (numbers[name] for name in names)
    if not _is_index(total, MOST + 1):
        raise ValueError(f"{gate!r} has {reprlib.repr(total)} units; expected at most {MOST:,}")
    masks = [_mask(gate, indices, total) for indices in (kept, zeroed)]
    return Units(masks[0], masks[0] | masks[1])


def _mask(gate: str, indices: Any, total: int) -> Tensor:
    """The bool mask ``[total]`` of a list of indices."""
    if not isinstance(indices, list | tuple) or not all(_is_index(i, total) for i in indices):
        raise ValueError(
            f"{gate!r} has the indices {reprlib.repr(indices)}; expected a list of integers from 0 "
            f"to {total - 1}"
        )
    mask = torch.zeros(total, dtype=torch.bool, device="cpu")
    mask[list(indices)] = True
    return mask


def _is_index(value: Any, end: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < end
