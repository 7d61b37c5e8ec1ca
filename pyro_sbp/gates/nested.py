"""Nested inputs and outputs of networks: the tensors inside, and copies with other tensors."""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

__all__ = ["convert", "map_tensors", "same", "tensors_of"]

#: Types that hold no tensor.
_PLAIN = (str, bytes, bool, int, float, complex, enum.Enum, torch.dtype, torch.device, type(None))


def _parts(x: Any) -> Iterable[Any] | None:
    """What a structure holds, in order; None where `x` is no structure that can be opened."""
    if isinstance(x, Tensor):
        return None
    if isinstance(x, Mapping):
        return x.values()
    if isinstance(x, list | tuple):
        return x
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        names = (item.name for item in dataclasses.fields(x))
        return [getattr(x, name) for name in names if hasattr(x, name)]
    return None


def _leaves(x: Any) -> Iterator[Any]:
    parts = _parts(x)
    if parts is None:
        yield x
    else:
        for part in parts:
            yield from _leaves(part)


def tensors_of(x: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples, mappings and dataclasses, in order.

    Raises:
        TypeError: there is an object inside that may hold a tensor and cannot be opened.
    """
    for leaf in _leaves(x):
        if isinstance(leaf, Tensor):
            yield leaf
        elif not isinstance(leaf, _PLAIN):
            raise TypeError(f"cannot look into a {type(leaf).__name__} for tensors")


def map_tensors(function: Callable[[Tensor], Tensor], x: Any) -> Any:
    """A copy of a nested structure with other tensors, of the same types.

    Lists, tuples, mappings and dataclasses are copied, named tuples, subclasses and frozen
    dataclasses included. Objects that cannot be opened are not copied.

    Args:
        function: from a tensor of `x` to the one in its place. A tensor that occurs twice is given
            to it once.
        x: what `tensors_of` opens.

    Raises:
        TypeError: a structure cannot be copied, or computes its tensors every time.
    """
    # To a deep copy every leaf looks as if it had been copied already. This also copies what has a
    # constructor of its own, and the attributes that a subclass adds.
    copied: dict[int, Any] = {}
    new, alive = [], []

    def visit(part: Any) -> None:
        if id(part) in copied:
            return
        parts = _parts(part)
        if parts is None:
            alive.append(part)  # so that its id stays its own
            copied[id(part)] = function(part) if isinstance(part, Tensor) else part
            new.append(copied[id(part)])
            return
        for inner in parts:
            visit(inner)
        if isinstance(part, MappingProxyType):  # which has no copy
            copied[id(part)] = MappingProxyType(copy.deepcopy(dict(part), copied))

    visit(x)
    result = copy.deepcopy(x, copied)
    known = set(map(id, new))
    if any(isinstance(leaf, Tensor) and id(leaf) not in known for leaf in _leaves(result)):
        raise TypeError(f"cannot put other tensors into a {type(x).__name__}")
    return result


def convert(x: Any, dtype: torch.dtype, device: torch.device | None = None) -> Any:
    """A copy of a nested structure, floating-point tensors in `dtype`, all tensors on `device`.

    Complex tensors are converted to the same precision.

    Raises:
        TypeError: as `map_tensors`.
    """

    def converted(tensor: Tensor) -> Tensor:
        new = dtype if tensor.is_floating_point() else None
        if tensor.is_complex():
            new = torch.complex128 if dtype == torch.float64 else torch.complex64
        return tensor.detach().to(device, new, copy=True)

    return map_tensors(converted, x)


def same(a: Any, b: Any) -> bool:
    """Whether two nested structures are equal: of the same types, with equal tensors and values.

    Tensors are equal if their dtypes, shapes and values are, on whatever devices they are. Of
    dataclasses the fields that take part in comparisons are compared.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
    if type(a) is not type(b):
        return False
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if dataclasses.is_dataclass(a) and not isinstance(a, type):
        names = [item.name for item in dataclasses.fields(a) if item.compare]
        return all(same(getattr(a, name), getattr(b, name)) for name in names)
    return bool(a == b)
