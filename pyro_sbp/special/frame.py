"""The truncated normal seen from its nearer bound, and sums over its density.

The problem is reflected so that the nearer bound is at the left, and every length is counted from
the mode (the nearer bound if ``loc`` lies outside, else ``loc``) in units of ``scale``. With alpha
the signed distance of that bound (positive if ``loc`` is outside) the density is proportional to
``exp(-e(r))``, ``e(r) = max(alpha, 0) r + r^2 / 2``. The term alpha^2 / 2, which makes the textbook
formulas cancel, never appears. Moments are Gauss-Legendre sums over the window where the density
is not negligible.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.polynomial.legendre import Legendre, leggauss
from torch import Tensor

from pyro_sbp.special.derivatives import attach, constant

__all__ = ["mean_excess", "mills_ratio"]


HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


SQRT_HALF = math.sqrt(0.5)


_SQRT_HALF_PI = math.sqrt(0.5 * math.pi)


# Nodes of a sum, and the log density relative to the mode where its window ends. 40 nodes on the
# window of float64 give 1e-9, 32 give 4e-6; float32 needs less.
_SUM = {torch.float64: (64, 42.0), torch.float32: (36, 26.0)}


NUM_NEAR_UNIFORM_NODES = 12


# Moments are counted from the origin in the window [-1, 1] that is nearest to the mode, which never
# lies right of the middle: far from the mode their differences would cancel. That costs five
# digits at most, which float32 can spare.
_ORIGINS = {
    64: (-1.0, -0.75, -0.5, -0.25, 0.0),
    36: (-1.0,),
    NUM_NEAR_UNIFORM_NODES: (-1.0,),
}


NARROW = 0.25  # below it, in width and in log density, the density is nearly uniform


_NUM_NARROW_NODES = 5


def _gauss_legendre(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on [-1, 1]."""
    nodes, _ = leggauss(n)
    # Its weights are right to 2e-15, these to 2e-16.
    weights = 2 / ((1 - nodes**2) * Legendre.basis(n).deriv()(nodes) ** 2)
    return nodes, weights * (2 / weights.sum())


def _sums(n: int) -> Tensor:
    """Nodes [n], and rows that sum ``weight (x - origin)^j``, j = 0 to 4, for each origin."""
    x, weights = (torch.tensor(values, device="cpu") for values in _gauss_legendre(n))
    powers = [(x - origin) ** j for origin in _ORIGINS[n] for j in range(5)]
    return torch.stack([x, *(weights * y for y in powers)])


_NODES = {(n, torch.device("cpu")): _sums(n) for n in _ORIGINS}


NARROW_NODES = tuple(
    zip(*(values.tolist() for values in _gauss_legendre(_NUM_NARROW_NODES)), strict=True)
)


def nodes_on(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes [n] and summing rows [5 a origin, n] on ``device``, copied there once."""
    if (n, device) not in _NODES:
        _NODES[n, device] = _NODES[n, torch.device("cpu")].to(device)
    return _NODES[n, device][0], _NODES[n, device][1:]


def mills(x: Tensor) -> Tensor:
    return _SQRT_HALF_PI * torch.special.erfcx(x * SQRT_HALF)


def mills_slope(x: Tensor, mills: Tensor) -> Tensor:
    """``g(x) = 1 - x R(x)``, which is ``-R'(x)``."""
    # The subtraction loses x^2 eps; from 16 on ten terms of the asymptotic series lose nothing.
    y = 1 / x.clamp_min(16.0).square()
    series = torch.ones_like(y)
    for k in range(21, 1, -2):
        series = 1 - k * y * series
    return torch.where(x < 16, 1 - x * mills, y * series)


def mills_ratio(x: Tensor) -> Tensor:
    """Mills ratio ``R(x) = (1 - Phi(x)) / phi(x)`` of the standard normal [3].

    Args:
        x: Any shape, from -37 (where R overflows) to infinity. Relative error 1e-15 from -1 on,
            ``x^2`` times the machine precision below.

    Returns:
        Float64, the shape of ``x``, with its own gradient ``R' = -(1 - x R)``: through erfcx it
        would lose ``x^2`` times the machine precision.
    """
    with torch.no_grad():
        x64 = constant(x)
        ratio = mills(x64)
        slope = mills_slope(x64, ratio)
    return attach(ratio, (x, -slope))


def mean_excess(x: Tensor) -> Tensor:
    """Mean of ``z - x`` for a standard normal ``z > x``, which is ``1 / R(x) - x``.

    Args:
        x: Any shape, from -1 to 1e150. Relative error 1e-13.

    Returns:
        Float64, the shape of ``x``; no gradient.
    """
    with torch.no_grad():
        return _mean_excess(constant(x))


def _mean_excess(x: Tensor) -> Tensor:
    ratio = mills(x)
    return mills_slope(x, ratio) / ratio


class Frame(NamedTuple):
    """The problem seen from the end nearer to ``loc``, lengths in units of ``scale``."""

    sign: Tensor  # 1 if the nearer end is low, -1 if it is high
    end: Tensor  # the nearer end; 0 where it is infinite, and not used there
    loc: Tensor
    scale: Tensor
    alpha: Tensor  # signed distance of the nearer end from loc, positive if loc is outside
    beta: Tensor  # signed distance of the other end
    width: Tensor  # beta - alpha, exact
    precision: torch.dtype  # float64 if a parameter is, else float32


def frame(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Frame:
    """The parameters, broadcast and in float64, as seen from the end nearer to ``loc``."""
    precision = torch.float64 if torch.float64 in (loc.dtype, scale.dtype) else torch.float32
    loc, scale, low, high = torch.broadcast_tensors(*(constant(x) for x in (loc, scale, low, high)))
    near_low = loc - low <= high - loc
    sign = torch.where(near_low, 1.0, -1.0).to(loc.dtype)
    near, far = torch.where(near_low, low, high), torch.where(near_low, high, low)
    return Frame(
        sign,
        torch.where(near.isinf(), 0.0, near),
        loc,
        scale,
        sign * (near - loc) / scale,
        sign * (far - loc) / scale,
        (high - low) / scale,
        precision,
    )


def mode_of(f: Frame) -> Tensor:
    return torch.where(f.alpha > 0, f.end, f.loc)


class Nodes(NamedTuple):
    """Gauss-Legendre nodes, along the first dimension, and the moments of the density there.

    ``r`` is the distance from the mode, ``y = x - origin`` the position in the window, which is
    x = -1 to 1.
    """

    num: int
    r: Tensor
    density: Tensor  # exp(-e(r))
    half: Tensor  # of the width of the window
    origin: Tensor
    log_mass: Tensor  # log of the integral of exp(-e) over r
    mean: Tensor  # of r
    var: Tensor  # of r
    third: Tensor  # central moment of r
    var_square: Tensor  # variance of (r - mean)^2
    slope: Tensor  # of e at the mean of r

    def sums(self, x: Tensor) -> Tensor:
        """Integrals of ``x y^j`` over the window, j = 0 to 4, in units of ``half``."""
        return _window_sums(self.num, x, self.origin)


def _window_sums(n: int, x: Tensor, origin: Tensor) -> Tensor:
    rows, origins = nodes_on(n, x.device)[1], _ORIGINS[n]
    of_each = (rows @ x.reshape(n, origin.numel())).reshape(len(origins), 5, *origin.shape)
    *others, sums = of_each.unbind()
    for at, other in zip(origins, others, strict=False):
        sums = torch.where(origin == at, other, sums)
    return sums


def integrate(f: Frame, tilt: Tensor | None = None) -> Nodes:
    """Nodes over the window of the density, and of the density times ``exp(tilt * r)`` if given."""
    num_nodes, cutoff = _SUM[f.precision]
    slope = f.alpha.clamp_min(0)
    first = f.alpha.clamp_max(0)
    last = torch.where(f.alpha > 0, f.width, f.beta)
    left = first.clamp_min(-math.sqrt(2 * cutoff))
    right = torch.minimum(last, _reach(slope, cutoff))
    if tilt is not None:
        tilted_left, tilted_right = _window(slope - tilt, first, last, cutoff)
        left, right = torch.minimum(left, tilted_left), torch.maximum(right, tilted_right)
    half = 0.5 * (right - left)
    r = spread(num_nodes, left, half)
    density = torch.add(-slope, r, alpha=-0.5).mul_(r).exp_()
    origins = _ORIGINS[num_nodes]
    origin = (-left / half - 1).mul_(4).round_().mul_(0.25).clamp(origins[0], origins[-1])
    total, *y = _window_sums(num_nodes, density, origin).unbind()
    y1, y2, y3, y4 = (x / total for x in y)
    square = y1 * y1
    var = y2 - square
    third = y3 - y1 * (3 * y2 - 2 * square)
    fourth = y4 - 4 * y1 * y3 + square * (6 * y2 - 3 * square)
    mean_ = left + half * (1 + origin) + half * y1
    half_square = half.square()
    return Nodes(
        num_nodes,
        r,
        density,
        half,
        origin,
        (half * total).log(),
        mean_,
        half_square * var,
        half * half_square * third,
        half_square.square() * (fourth - var * var),
        slope + mean_,
    )


def spread(n: int, left: Tensor, half: Tensor) -> Tensor:
    x = nodes_on(n, left.device)[0].reshape(n, *(1,) * left.ndim)
    return torch.addcmul(left, half, 1 + x)


def _window(slope: Tensor, first: Tensor, last: Tensor, cutoff: float) -> tuple[Tensor, Tensor]:
    """Where ``slope r + r^2 / 2`` is within the cutoff of its least value on [first, last]."""
    mode = torch.minimum(torch.maximum(-slope, first), last)
    slope = slope + mode  # at the mode: positive at the first end, negative at the last, else 0
    left = torch.maximum(first, mode - _reach((-slope).clamp_min(0), cutoff))
    right = torch.minimum(last, mode + _reach(slope.clamp_min(0), cutoff))
    return left, right


def _reach(slope: Tensor, cutoff: float) -> Tensor:
    """Where ``slope r + r^2 / 2`` is the cutoff."""
    return 2 * cutoff / (slope + (slope * slope + 2 * cutoff).sqrt())


class Value(NamedTuple):
    """A function of the parameters with its derivatives."""

    value: Tensor
    d_loc: Tensor
    d_scale: Tensor


def expectation(
    value: Tensor, f: Frame, n: Nodes, slope: Tensor | float, curvature: Tensor | float
) -> Value:
    """``value`` with the derivatives of ``E[h]``, h the parabola of that slope at the mean of r.

    The density is an exponential family with statistics ``r`` and ``e``: the derivatives of
    ``E[h]`` are ``Cov(h, r) / scale`` in the distance of loc from the end and ``2 Cov(h, e)`` in
    log scale, and what ``h`` itself changes has mean zero or is part of ``value``. With h = -log
    density they are those of the entropy.
    """
    with_r = slope * n.var + 0.5 * curvature * n.third
    square_with_e = n.slope * n.third + 0.5 * n.var_square
    with_e = slope * (n.slope * n.var + 0.5 * n.third) + 0.5 * curvature * square_with_e
    return Value(value, f.sign * with_r / f.scale, 2 * with_e / f.scale)


def mean_e(n: Nodes) -> Tensor:
    return n.mean * (n.slope - 0.5 * n.mean) + 0.5 * n.var
