"""Checks of the arguments of the distributions. Each error message is one line."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.distributions import Distribution

from pyro_sbp.special.derivatives import has_shape

__all__ = [
    "broadcast_parameters",
    "check_bounds",
    "check_expand",
    "check_normal",
    "require",
    "require_in_support",
    "require_probability",
    "shown",
    "validates",
]


def broadcast_parameters(owner: str, **parameters: Tensor | float) -> list[Tensor]:
    """Convert tensors and numbers to tensors of one shape, one floating dtype and one device.

    Raises:
        ValueError: the shapes do not broadcast, or a parameter is not a number.
    """
    tensors = [x for x in parameters.values() if isinstance(x, Tensor)]
    if len(tensors) == len(parameters) and tensors[0].is_floating_point():
        first = tensors[0]
        if all(has_shape(x, first.shape) and x.dtype == first.dtype for x in tensors):
            return tensors
    dtype, device = torch.get_default_dtype(), None
    if tensors:
        device = max(tensors, key=lambda x: x.ndim).device
        floating = [x.dtype for x in tensors if x.is_floating_point()]
        dtype = floating[0] if floating else dtype
        for other in floating[1:]:
            dtype = torch.promote_types(dtype, other)
    values = []
    for name, x in parameters.items():
        if not isinstance(x, Tensor | int | float):
            raise ValueError(f"{owner}: {name} must be a tensor or a number, got {x!r}")
        # full() fills on the device; tensor() would copy from the host, which synchronises.
        filled = torch.full((), x, dtype=dtype, device=device) if not isinstance(x, Tensor) else x
        values.append(filled.to(dtype))
    try:
        return list(torch.broadcast_tensors(*values))
    except RuntimeError:
        shapes = ", ".join(f"{n} {tuple(x.shape)}" for n, x in zip(parameters, values, strict=True))
        raise ValueError(f"{owner}: shapes do not broadcast: {shapes}") from None


def require(owner: str, name: str, value: Tensor, valid: Tensor, what: str) -> None:
    """Check that all elements are valid; the message shows the first one that is not.

    Args:
        owner: the name of the distribution, for the message.
        name: the name of the argument.
        value: its value.
        valid: bool; whether each element is valid.
        what: what the value must be, such as "positive".

    Raises:
        ValueError: an element is not valid.
    """
    if torch._is_all_true(valid):  # works under vmap, where bool(valid.all()) does not
        return
    if is_batchedtensor(valid):
        raise ValueError(f"{owner}: {name} must be {what} in every element of vmap")
    bad = value.expand(valid.shape)[~valid].reshape(-1)[0].item()
    raise ValueError(f"{owner}: {name} must be {what}, got {bad:g}")


def require_probability(owner: str, value: Tensor) -> None:
    """Raise ValueError if an element is not within [0, 1]."""
    require(owner, "a probability", value, (value >= 0) & (value <= 1), "within [0, 1]")


def check_normal(owner: str, loc: Tensor, scale: Tensor) -> None:
    """Check the parameters of a normal distribution.

    Raises:
        ValueError: `loc` is not finite, or `scale` is not positive and finite.
    """
    require(owner, "loc", loc, loc.isfinite(), "finite")
    require(owner, "scale", scale, (scale > 0) & scale.isfinite(), "positive and finite")


def check_bounds(owner: str, **bounds: Tensor) -> None:
    """Check that the first bound is below the second in every element.

    Raises:
        ValueError: the first bound of an element is not below the second.
    """
    (low_name, low), (high_name, high) = bounds.items()
    require(owner, low_name, low, low < high, f"below {high_name}")


def check_expand(distribution: Distribution, batch_shape: Sequence[int]) -> None:
    """Check that the batch shape of a distribution can be expanded to the given shape.

    Raises:
        ValueError: the batch shape cannot be expanded to it.
    """
    new, old = tuple(batch_shape), tuple(distribution.batch_shape)
    if new == old:
        return
    try:
        fits = torch.broadcast_shapes(old, new) == new
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{type(distribution).__name__}: the batch shape {old} does not expand to {new}"
        )


def require_in_support(
    distribution: Distribution, value: Tensor, is_within: Callable[[Tensor], Tensor]
) -> None:
    """Check that a value is in the support and broadcasts against the batch shape.

    Args:
        distribution: the distribution.
        value: the value.
        is_within: from the value to whether each element is in the support.

    Raises:
        ValueError: the value is not a tensor, does not broadcast, or is not in the support.
    """
    owner = type(distribution).__name__
    if not isinstance(value, Tensor):
        raise ValueError(f"{owner}: the value must be a tensor, got {value!r}")
    try:
        torch.broadcast_shapes(value.shape, distribution.batch_shape)
    except RuntimeError:
        raise ValueError(
            f"{owner}: a value of shape {tuple(value.shape)} does not broadcast against "
            f"the batch shape {tuple(distribution.batch_shape)}"
        ) from None
    require(owner, "the value", value, is_within(value), "within the support")


def shown(distribution: Distribution) -> str:
    """The representation of a distribution: its parameters by value, or by shape if not scalar."""
    # The representation of torch omits parameters that are properties.
    values = {name: getattr(distribution, name) for name in distribution.arg_constraints}
    shown = (f"{k}: {v if v.numel() == 1 else v.size()}" for k, v in values.items())
    return f"{type(distribution).__name__}({', '.join(shown)})"


def validates(validate_args: bool | None) -> bool:
    """`validate_args`, or the global setting of torch and Pyro if it is None."""
    # The check of torch runs in the constructor, and its message has several lines.
    return Distribution._validate_args if validate_args is None else validate_args
