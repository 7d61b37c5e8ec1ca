"""Bounds of theta = exp(x) that are given as bounds of x."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_sbp.distributions.checks import check_bounds, require

__all__ = ["check_log_bounds", "exp_bound", "log_within"]


def check_log_bounds(owner: str, log_low: Tensor, log_high: Tensor) -> None:
    """Raise unless both are constants within 350 of zero and the first is below the second.

    Raises:
        ValueError: they are not.
    """
    for name, bound in (("log_low", log_low), ("log_high", log_high)):
        # Beyond, the square of theta would leave the range of float64.
        require(owner, name, bound, bound.abs() <= 350, "finite and within 350 of zero")
    check_bounds(owner, log_low=log_low, log_high=log_high)


def exp_bound(log_bound: Tensor) -> Tensor:
    """A bound of theta. Rounded once, as samples are, so that no sample falls outside of it."""
    return log_bound.double().exp().to(log_bound.dtype)


def log_within(value: Tensor, log_low: Tensor, log_high: Tensor) -> tuple[Tensor, Tensor]:
    """Whether theta is within its bounds, and log theta in float64 (of a bound where it is not).

    A theta at a bound may have a log that falls outside by the rounding of theta: it is put back.
    """
    inside = (value >= exp_bound(log_low)) & (value <= exp_bound(log_high))
    x = torch.where(inside, value.double(), exp_bound(log_low).double()).log()
    return inside, torch.minimum(torch.maximum(x, log_low.double()), log_high.double())
