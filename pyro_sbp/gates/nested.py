"""Nested inputs and outputs of networks: find and replace the tensors in them."""

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

#: Types that contain no tensor.
_PLAIN = (str, bytes, bool, int, float, complex, enum.Enum, torch.dtype, torch.device, type(None))


def _parts(x: Any) -> Iterable[Any] | None:
    """The elements of a structure, in order, or None if `x` is not a known structure."""
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

    Strings, numbers, None, enums, dtypes and devices contain no tensors.

    Raises:
        TypeError: there is an object of an unknown type that may contain a tensor.
    """
    for leaf in _leaves(x):
        if isinstance(leaf, Tensor):
            yield leaf
        elif not isinstance(leaf, _PLAIN):
            raise TypeError(f"cannot look into a {type(leaf).__name__} for tensors")


def map_tensors(function: Callable[[Tensor], Tensor], x: Any) -> Any:
    """Copy a nested structure, and replace its tensors.

    Lists, tuples, mappings and dataclasses are copied, including named tuples, subclasses and
    frozen dataclasses. Objects of other types are not copied.

    Args:
        function: from a tensor of `x` to its replacement. It is called once for a tensor that
            occurs several times.
        x: a structure as for `tensors_of`.

    Returns:
        The copy, of the same types.

    Raises:
        TypeError: a structure cannot be copied, or computes its tensors at every access.
    """
    # In the memo of a deep copy, all leaves are entered as already copied. Unlike calling
    # constructors, this works for all classes, and also copies the attributes of subclasses.
    copied: dict[int, Any] = {}
    new, alive = [], []

    def visit(part: Any) -> None:
        if id(part) in copied:
            return
        parts = _parts(part)
        if parts is None:
            alive.append(part)  # keep it alive, so that its id is not reused
            copied[id(part)] = function(part) if isinstance(part, Tensor) else part
            new.append(copied[id(part)])
            return
        for inner in parts:
            visit(inner)
        if isinstance(part, MappingProxyType):  # a type that cannot be copied
            copied[id(part)] = MappingProxyType(copy.deepcopy(dict(part), copied))

    visit(x)
    result = copy.deepcopy(x, copied)
    known = set(map(id, new))
    if any(isinstance(leaf, Tensor) and id(leaf) not in known for leaf in _leaves(result)):
        raise TypeError(f"cannot put other tensors into a {type(x).__name__}")
    return result


def convert(x: Any, dtype: torch.dtype, device: torch.device | None = None) -> Any:
    """Copy a nested structure, and convert its tensors.

    Args:
        x: a structure as for `tensors_of`.
        dtype: the new dtype of floating-point tensors. Complex tensors become complex128 if it is
            float64, and complex64 otherwise. Other tensors keep their dtype.
        device: the new device of all tensors, or None to keep their devices.

    Returns:
        The copy. Its tensors are detached.

    Raises:
        TypeError: as for `map_tensors`.
    """

    def converted(tensor: Tensor) -> Tensor:
        new = dtype if tensor.is_floating_point() else None
        if tensor.is_complex():
            new = torch.complex128 if dtype == torch.float64 else torch.complex64
        return tensor.detach().to(device, new, copy=True)

    return map_tensors(converted, x)


def same(a: Any, b: Any) -> bool:
    """Whether two nested structures have the same types and equal tensors and values.

    Tensors are equal if their dtypes, shapes and values are equal, also on different devices. In
    dataclasses, the fields with ``compare=True`` are compared.
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
