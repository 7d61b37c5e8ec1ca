"""Products with weights that belong to no layer, such as ``x @ self.weight``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Product", "dimensions", "multiplied", "products"]

#: Functions that multiply matrices, and those with the operands in reverse order.
_RIGHT = {torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}
_REFLECTED = {Tensor.__rmatmul__}
_CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d}
_TRANSPOSED = {F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
_MULTIPLYING = {torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__}
_MULTIPLYING |= {Tensor.__rmul__}
_DIVIDING = {torch.div, torch.divide, torch.true_divide, Tensor.div, Tensor.divide}
_DIVIDING |= {Tensor.true_divide, Tensor.__truediv__}


@dataclass(frozen=True)
class Product:
    """A call of a function that is linear in the columns of one of its arguments, the weight.

    Attributes:
        x: the other argument.
        place: the position of `x` in the positional arguments, or its name.
        weight: the weight.
        dims: the dimensions of the rows and of the columns in the weight.
        x_dim: the dimension of the columns in `x`, as a negative number.
        out_dim: the dimension of the rows in the result, as a negative number.
        bias: the bias that is added, or None.
    """

    x: Tensor
    place: int | str
    weight: Tensor
    dims: tuple[int, int]
    x_dim: int
    out_dim: int
    bias: Tensor | None = None


def products(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Product]:
    """The ways to read a function call as a product of an input with a weight.

    A product of two matrices can be read in two ways, because each of them can be the weight. For
    functions that are no products, the list is empty.
    """
    if func is F.linear or func in _CONVOLUTIONS or func in _TRANSPOSED:
        return _of_layers(func, args, kwargs)
    if func is torch.addmm or func is Tensor.addmm:
        names: tuple[str, ...] = ("input", "mat1", "mat2")
        if kwargs.keys() - set(names):
            return []  # addmm with factors
    elif func in _RIGHT or func in _REFLECTED:
        names = ("input", "other")
    else:
        return []
    given = _given(names, args, kwargs)
    if given is None:
        return []
    *bias, (a_place, a), (b_place, b) = given
    if func in _REFLECTED:
        (a_place, a), (b_place, b) = (b_place, b), (a_place, a)
    found = []
    if b.ndim == 2 and a.ndim >= 1:
        found.append(Product(a, a_place, b, (1, 0), -1, -1, bias[0][1] if bias else None))
    if a.ndim == 2 and b.ndim >= 2 and not bias:
        found.append(Product(b, b_place, a, (0, 1), -2, -2))
    return found


def _of_layers(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Product]:
    """Interpret a call of the function of a dense layer or a convolution as a product.

    The list is empty for convolutions with groups.
    """
    given = _given(("input", "weight"), args, kwargs)
    if given is None:
        return []
    (place, x), (_, weight) = given
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    if func is F.linear:
        return [Product(x, place, weight, (0, 1), -1, -1, bias)] if weight.ndim == 2 else []
    groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
    if groups != 1:
        return []
    dims, dim = (1, 0) if func in _TRANSPOSED else (0, 1), 1 - weight.ndim
    return [Product(x, place, weight, dims, dim, dim, bias)]


def _given(
    names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[tuple[int | str, Tensor]] | None:
    """The position or name and the value of arguments, or None if one is not a tensor."""
    found: list[tuple[int | str, Tensor]] = []
    for position, name in enumerate(names):
        place = position if position < len(args) else name
        value = args[position] if position < len(args) else kwargs.get(name)
        if not isinstance(value, Tensor):
            return None
        found.append((place, value))
    return found


def multiplied(func: Any, args: Sequence[Any], out: Any) -> list[tuple[Tensor, Any]]:
    """The tensors that a call multiplies element by element, each with its factor.

    Only tensors with the shape of the result are included. For a division, the dividend is
    included, and its factor in the list is the divisor.
    """
    if func in _MULTIPLYING and len(args) == 2:
        pairs = [(args[0], args[1]), (args[1], args[0])]
    elif func in _DIVIDING and len(args) == 2:
        pairs = [(args[0], args[1])]
    else:
        return []
    return [
        (tensor, factor)
        for tensor, factor in pairs
        if isinstance(tensor, Tensor) and isinstance(out, Tensor) and tensor.shape == out.shape
    ]


def dimensions(view: Tensor, of: Tensor) -> list[int] | None:
    """The dimension of a tensor for each dimension of a view of all its elements.

    Args:
        view: the view, such as a transposed one.
        of: the tensor.

    Returns:
        The dimensions, with -1 for each dimension of length 1. None if `view` is not a view of all
        elements of the tensor, or combines or splits dimensions.
    """
    if view.data_ptr() != of.data_ptr() or view.numel() != of.numel():
        return None
    left = [dim for dim in range(of.ndim) if of.shape[dim] > 1]
    found = []
    for size, stride in zip(view.shape, view.stride(), strict=True):
        same = [dim for dim in left if of.shape[dim] == size and of.stride(dim) == stride]
        if size > 1 and not same:
            return None
        found.append(same[0] if size > 1 else -1)
        left = [dim for dim in left if dim not in same[:1]]
    return None if left else found
