"""Properties of the functions that a network calls, and of their arguments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "PROPERTIES",
    "address_of",
    "changes_in_place",
    "has_nan",
    "is_inexact",
    "may_change_arguments",
    "operation_name",
    "tensors_in",
    "unobserved",
]

#: Names of attributes of tensors, of methods, and of functions, for `PROPERTIES`.
_GETTERS = ("shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_leaf", "is_cuda")
_METHODS = ("size", "dim", "numel", "nelement", "ndimension", "stride", "is_contiguous", "__len__")
_PREDICATES = ("is_floating_point", "is_complex")
#: Functions that return a property of a tensor that does not depend on the values of its elements.
PROPERTIES = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in _GETTERS),
        *(getattr(Tensor, name) for name in (*_METHODS, *_PREDICATES)),
        *(getattr(torch, name) for name in _PREDICATES),
    }
)


def unobserved() -> AbstractContextManager[Any]:
    """A context in which no mode sees the functions that are called.

    A mode that calls functions of torch for its own purposes calls them in this context.
    """
    context: AbstractContextManager[Any] = torch._C.DisableTorchFunction()
    return context


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """All tensors in the arguments or results of a function, also in lists, tuples and mappings."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from tensors_in(value.values())
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def is_inexact(tensor: Tensor) -> bool:
    """Whether a tensor has floating-point or complex elements, which can be NaN."""
    return tensor.is_floating_point() or tensor.is_complex()


def has_nan(tensor: Tensor) -> bool:
    """Whether an element of a tensor is NaN. It is False for integer tensors."""
    return is_inexact(tensor) and bool(tensor.isnan().any())


def changes_in_place(func: Any) -> bool:
    """Whether a function changes its first argument in place, according to its name."""
    name = getattr(func, "__name__", "")
    if name in ("__setitem__", "__set__") or name.startswith("__i"):
        return True
    return name.endswith("_") and not name.endswith("__")


def may_change_arguments(func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a function may change its arguments in place, according to its name and arguments."""
    if changes_in_place(func) or "out" in kwargs:
        return True
    if isinstance(func, torch._ops.OpOverload):
        return func._schema.is_mutable
    return any(value is True for value in (*args, *kwargs.values()))  # such as `inplace`


def address_of(tensor: Tensor) -> int:
    """The address of the storage of a tensor, which its views share."""
    address: int = torch._C._storage_address(tensor)  # type: ignore[attr-defined]  # no stub
    return address


def operation_name(func: Any) -> str:
    """The name of a registered operator such as ``torchvision::nms``, or "" for other functions."""
    if isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return str(getattr(func, "_qualified_op_name", "") or func.name()).split(".")[0]
    return ""
