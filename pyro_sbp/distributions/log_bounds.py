"""Bounds of theta = exp(x) that are given as bounds of x."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_sbp.distributions.checks import check_bounds, require
from pyro_sbp.special.derivatives import without_copies

__all__ = [
    "check_log_bounds",
    "clamp_theta",
    "exp_bound",
    "is_within",
    "log_within",
]


def check_log_bounds(owner: str, log_low: Tensor, log_high: Tensor) -> None:
    """Check the bounds of log theta.

    Raises:
        ValueError: the dtype cannot represent the exponential of a bound, a bound is more than 350
            from zero, or the lower bound is not below the upper bound.
    """
    # Beyond 350, the square of theta leaves the range of float64. In float16, values near the
    # default lower bound e^-20 round to zero.
    tiny = min(torch.finfo(log_low.dtype).tiny, torch.finfo(torch.float32).tiny)
    most = min(math.log(torch.finfo(log_low.dtype).max), 350.0)
    least = max(math.log(tiny), -350.0)
    dtype = str(log_low.dtype).removeprefix("torch.")
    what = f"within [{least:.4g}, {most:.4g}], so that {dtype} can represent its exponential"
    for name, bound in (("log_low", log_low), ("log_high", log_high)):
        require(owner, name, bound, (bound >= least) & (bound <= most), what)
    check_bounds(owner, log_low=log_low, log_high=log_high)


def exp_bound(log_bound: Tensor) -> Tensor:
    """The exponential of a bound, rounded once to its dtype, as samples are."""
    bound = without_copies(log_bound).double().exp().to(log_bound.dtype)
    return bound.expand(log_bound.shape)


def clamp_theta(theta: Tensor, log_low: Tensor, log_high: Tensor) -> Tensor:
    """Clamp theta = exp(x) to its bounds, in their dtype. The gradient is unchanged."""
    # Vectorised exp rounds differently, so theta may exceed a bound by the last bit. Clamp in
    # float64, because theta may overflow in the dtype of the bounds.
    low, high = (without_copies(bound.detach()).double().exp() for bound in (log_low, log_high))
    inside = torch.clamp(theta.detach(), low, high)
    return (theta + (inside - theta.detach())).to(log_low.dtype)


def is_within(theta: Tensor, log_low: Tensor, log_high: Tensor) -> Tensor:
    """Whether theta is within its bounds, up to the last two bits of its dtype."""
    slack = 2 * torch.finfo(log_low.dtype).eps
    low, high = exp_bound(log_low), exp_bound(log_high)
    return (theta >= low - slack * low) & (theta <= high + slack * high)


def log_within(theta: Tensor, log_low: Tensor, log_high: Tensor) -> tuple[Tensor, Tensor]:
    """Whether theta is within its bounds, and its log in float64.

    The log is clamped to the bounds, because the log of a rounded theta can lie outside. For theta
    outside its bounds it is the log of a bound. NaN counts as within, so that results are NaN.
    """
    inside = is_within(theta, log_low, log_high) | theta.isnan()
    x = torch.where(inside, theta.double(), exp_bound(log_low).double()).log()
    return inside, torch.minimum(torch.maximum(x, log_low.double()), log_high.double())
