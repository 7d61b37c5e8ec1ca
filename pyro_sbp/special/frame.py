"""The truncated normal distribution in coordinates of its nearer bound, and its moments.

The distribution is reflected so that the bound nearer to ``loc`` is the left one. The coordinate r
is the distance from the mode in units of ``scale``. The mode is ``loc``, or the nearer bound if
``loc`` lies outside. Let alpha be the signed distance of the nearer bound from ``loc``, positive if
``loc`` lies outside. The density is then proportional to ``exp(-e(r))`` with
``e(r) = max(alpha, 0) r + r^2 / 2``. The term alpha^2 / 2, which causes cancellation in the
textbook formulas, does not occur. Moments are Gauss-Legendre sums over the window in which the
density is not negligible.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.polynomial.legendre import Legendre, leggauss
from torch import Tensor

from pyro_sbp.special.derivatives import (
    attach,
    common_shape,
    constant,
    has_shape,
    may_look,
    without_copies,
)

__all__ = ["mean_excess", "mills_ratio"]


HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


SQRT_HALF = math.sqrt(0.5)


_SQRT_HALF_PI = math.sqrt(0.5 * math.pi)


# The number of nodes of a sum, and the log density, relative to the mode, at which its window ends.
# On the window of float64, 40 nodes have an error of 1e-9 and 32 nodes one of 4e-6. Float32 needs
# fewer nodes.
_SUM = {torch.float64: (64, 42.0), torch.float32: (36, 26.0)}


NUM_NEAR_UNIFORM_NODES = 12


# Moments are taken about the origin, a point of the window [-1, 1], that is nearest to the mode.
# The mode is never right of the middle. Moments about a point far from the mode would lose digits
# by cancellation. For float32 one origin is enough, with a loss of at most five digits of float64.
_ORIGINS = {
    64: (-1.0, -0.75, -0.5, -0.25, 0.0),
    36: (-1.0,),
    NUM_NEAR_UNIFORM_NODES: (-1.0,),
}


_BLOCK = 4096  # elements of a block: their nodes take 1 MiB of the cache


# The width below which moments in closed form lose digits by cancellation, and the distance of loc
# outside the bounds, in scales, beyond which differences of erf do. Within these limits the errors
# are below 2e-9.
WIDE, OUTSIDE = 1.0, 3.0


MOST_SCALES = 37.0


_FEW = 1000  # elements: for fewer, sums are as fast as separating the elements


NARROW = 0.25  # the width and the log density below which the density is nearly uniform


_NUM_NARROW_NODES = 5


def _gauss_legendre(n: int) -> tuple[np.ndarray, np.ndarray]:
    """The nodes and weights of the Gauss-Legendre rule on [-1, 1]."""
    nodes, _ = leggauss(n)
    # The weights of NumPy have errors of 2e-15, these have errors of 2e-16.
    weights = 2 / ((1 - nodes**2) * Legendre.basis(n).deriv()(nodes) ** 2)
    return nodes, weights * (2 / weights.sum())


class Rule(NamedTuple):
    """The Gauss-Legendre rule with n nodes x on [-1, 1]."""

    nodes: Tensor  # [n]
    powers: Tensor  # [n, 3]: 1, x, x^2, which map the coefficients of a parabola to its values
    rows: Tensor  # [5 per origin, n]: weight (x - origin)^j for j = 0 to 4


def _rule(n: int) -> Rule:
    x, weights = (torch.tensor(values, device="cpu") for values in _gauss_legendre(n))
    moments = [weights * (x - origin) ** j for origin in _ORIGINS[n] for j in range(5)]
    return Rule(x, torch.stack([torch.ones_like(x), x, x * x], 1), torch.stack(moments))


_RULES = {(n, torch.device("cpu")): _rule(n) for n in _ORIGINS}


NARROW_NODES = tuple(
    zip(*(values.tolist() for values in _gauss_legendre(_NUM_NARROW_NODES)), strict=True)
)


def rule_on(n: int, device: torch.device) -> Rule:
    """The rule with n nodes on ``device``, to which it is copied once."""
    if (n, device) not in _RULES:
        _RULES[n, device] = Rule(*(x.to(device) for x in _RULES[n, torch.device("cpu")]))
    return _RULES[n, device]


def mills(x: Tensor) -> Tensor:
    return _SQRT_HALF_PI * torch.special.erfcx(x * SQRT_HALF)


def mills_slope(x: Tensor, mills: Tensor) -> Tensor:
    """``g(x) = 1 - x R(x)``, which is ``-R'(x)``."""
    # The subtraction has an error of x^2 eps. For x >= 16, ten terms of the asymptotic series are
    # exact to rounding.
    y = 1 / x.clamp_min(16.0).square()
    series = torch.ones_like(y)
    for k in range(21, 1, -2):
        series = 1 - k * y * series
    return torch.where(x < 16, 1 - x * mills, y * series)


def mills_ratio(x: Tensor) -> Tensor:
    """The Mills ratio ``R(x) = (1 - Phi(x)) / phi(x)`` of the standard normal distribution [3].

    Args:
        x: a tensor of any shape, with values from -37, where R overflows, to infinity.

    Returns:
        Float64, of the shape of ``x``. The relative error is 1e-15 for x >= -1, and ``x^2`` times
        the machine precision below. The gradient ``R' = -(1 - x R)`` is analytic: through erfcx it
        would have an error of ``x^2`` times the machine precision.
    """
    with torch.no_grad():
        x64 = constant(x)
        ratio = mills(x64)
        slope = mills_slope(x64, ratio)
    return attach(ratio, (x, -slope))


def mean_excess(x: Tensor) -> Tensor:
    """The mean of ``z - x`` for a standard normal ``z > x``, which is ``1 / R(x) - x``.

    Args:
        x: a tensor of any shape, with values from -1 to 1e150.

    Returns:
        Float64, of the shape of ``x``, without a gradient. The relative error is 1e-13.
    """
    with torch.no_grad():
        return _mean_excess(constant(x))


def _mean_excess(x: Tensor) -> Tensor:
    ratio = mills(x)
    return mills_slope(x, ratio) / ratio


class Frame(NamedTuple):
    """The distribution in coordinates of the bound nearer to ``loc``, in units of ``scale``."""

    sign: Tensor  # 1 if the nearer bound is low, -1 if it is high
    loc: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor
    alpha: Tensor  # signed distance of the nearer bound from loc, positive if loc is outside
    beta: Tensor  # signed distance of the other bound
    width: Tensor  # beta - alpha, without cancellation
    precision: torch.dtype  # float64 if a parameter is float64, else float32

    @property
    def mode(self) -> Tensor:
        """The mode of the density: loc, or the nearer bound where loc is outside."""
        return torch.minimum(torch.maximum(self.loc, self.low), self.high)


def frame(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Frame:
    """The `Frame` of parameters, broadcast and in float64."""
    precision = torch.float64 if torch.float64 in (loc.dtype, scale.dtype) else torch.float32
    shape = common_shape(loc, scale, low, high)
    loc, scale, low, high = (constant(without_copies(x)) for x in (loc, scale, low, high))
    below, above = (low - loc) / scale, (loc - high) / scale
    sign = (below >= above).to(torch.float64).mul_(2).sub_(1)
    alpha, beta = torch.maximum(below, above), torch.minimum(below, above).neg_()

    def full(x: Tensor) -> Tensor:
        return x if has_shape(x, shape) else x.expand(shape)

    return Frame(
        full(sign),
        full(loc),
        full(scale),
        full(low),
        full(high),
        full(alpha),
        full(beta),
        full((high - low) / scale),
        precision,
    )


class Moments(Protocol):
    """Moments of the density as a function of the distance r from the mode."""

    @property
    def mass(self) -> Tensor:
        """The integral of exp(-e) over r."""

    @property
    def mean(self) -> Tensor:
        """The mean of r."""

    @property
    def slope(self) -> Tensor:
        """The slope of e at the mean of r."""

    @property
    def var(self) -> Tensor:
        """Variance of r."""

    @property
    def third(self) -> Tensor:
        """Third central moment of r."""

    @property
    def var_square(self) -> Tensor:
        """Variance of (r - mean)^2."""


def moments(f: Frame) -> Moments:
    """Moments of the density, computed for each element by the cheapest accurate method.

    Where loc is inside the bounds, or outside by at most three scales, erf gives the moments in
    closed form. For float32 this is accurate, unless the density is nearly uniform. In all other
    cases, and for float64, the moments are quadrature sums.
    """
    if f.precision == torch.float64 or not may_look(f.alpha):
        return integrate(f)
    # Extreme values are found several times faster than elements of a mask are counted.
    if f.alpha.numel() and bool(f.alpha.max() < OUTSIDE) and bool(f.width.min() > WIDE):
        return ByErf(f)
    inside = (f.alpha < OUTSIDE) & (f.width > WIDE)
    count = int(inside.count_nonzero())
    if count == inside.numel():
        return ByErf(f)
    # Separating the elements takes about forty small operations.
    return integrate(f) if count < _FEW else ByRegion(f, inside)


class ByErf:
    """Moments of the density in closed form. Their errors grow as ``width^-4``, and as the inverse
    of the mass of the normal distribution within the bounds.

    They are moments of z, the distance from loc. If loc is outside, the mode is the nearer bound,
    and ``r = z - alpha``.
    """

    def __init__(self, f: Frame) -> None:
        # Further from loc there is no mass in float64, and subnormal numbers are slow.
        self._ends = torch.stack([f.alpha, f.beta]).clamp(-MOST_SCALES, MOST_SCALES)
        scaled = self._ends * SQRT_HALF
        below, above = torch.erf(scaled)
        self.mass = mass = (above - below).mul_(_SQRT_HALF_PI)
        # The density at the bounds, times a power of the bounds, gives the next moment.
        self._density = scaled.square_().neg_().exp_().div_(mass)
        self._mean = self.mean = self.slope = self._density[0] - self._density[1]
        if f.alpha.numel() and bool(f.alpha.max() > 0):
            outside = f.alpha.clamp_min(0)
            self.mean = self._mean - outside
            self.mass = mass * (0.5 * outside.square()).exp()
        self._powers = self._ends * self._density
        self._square = 1 + self._step()

    def _step(self) -> Tensor:
        return self._powers[0] - self._powers[1]

    @property
    def var(self) -> Tensor:
        return self._square - self._mean.square()

    @cached_property
    def _third_and_fourth(self) -> tuple[Tensor, Tensor]:
        """The third and the fourth moment of z."""
        self._powers.mul_(self._ends)
        third = 2 * self._mean + self._step()
        self._powers.mul_(self._ends)
        return third, 3 * self._square + self._step()

    @property
    def third(self) -> Tensor:
        third, _ = self._third_and_fourth
        return third - self._mean * (3 * self._square - 2 * self._mean.square())

    @property
    def var_square(self) -> Tensor:
        third, fourth = self._third_and_fourth
        square = self._mean.square()
        fourth = fourth - 4 * self._mean * third + square * (6 * self._square - 3 * square)
        return fourth - self.var.square()


class ByRegion:
    """Moments of the density, from `ByErf` where ``inside`` is true and from sums elsewhere."""

    def __init__(self, f: Frame, inside: Tensor) -> None:
        self._shape = inside.shape
        self._places = [x.reshape(-1).nonzero().squeeze(1) for x in (inside, ~inside)]
        lengths = (f.alpha, f.beta, f.width)
        self._parts: list[Moments] = []
        ways: tuple[Callable[[Frame], Moments], ...] = ByErf, integrate
        for places, function in zip(self._places, ways, strict=True):
            alpha, beta, width = (x.reshape(-1)[places] for x in lengths)
            self._parts.append(function(f._replace(alpha=alpha, beta=beta, width=width)))

    def __getattr__(self, name: str) -> Tensor:
        whole = torch.empty(self._shape.numel(), dtype=torch.float64, device="cpu")
        for places, part in zip(self._places, self._parts, strict=True):
            whole[places] = getattr(part, name)
        self.__dict__[name] = whole = whole.view(self._shape)
        return whole


class Nodes(NamedTuple):
    """Moments of the density as Gauss-Legendre sums over a window, in the distance r from the mode.

    The window is -1 <= x <= 1, and ``y = x - origin`` is a position in it.
    """

    half: Tensor  # half of the width of the window
    mass: Tensor  # the integral of exp(-e) over r
    mean: Tensor  # the mean of r
    slope: Tensor  # the slope of e at the mean of r
    y: Sequence[Tensor]  # E[y^j], j = 1 to 4
    sums: Sequence[
        Tensor
    ]  # integrals of density (exp(step r) - 1)^i y^j over the window, [5] for each i

    @property
    def var(self) -> Tensor:
        """Variance of r."""
        return self.half.square() * (self.y[1] - self.y[0] * self.y[0])

    @property
    def third(self) -> Tensor:
        """The third central moment of r."""
        y1, y2, y3, _ = self.y
        return self.half**3 * (y3 - y1 * (3 * y2 - 2 * y1 * y1))

    @property
    def var_square(self) -> Tensor:
        """Variance of (r - mean)^2."""
        y1, y2, y3, y4 = self.y
        square = y1 * y1
        var = y2 - square
        fourth = y4 - 4 * y1 * y3 + square * (6 * y2 - 3 * square)
        return self.half.square().square() * (fourth - var * var)


def integrate(f: Frame, step: Tensor | None = None) -> Nodes:
    """The moments of the density, and those of ``exp(step * r) - 1`` if a step is given."""
    num_nodes, cutoff = _SUM[f.precision]
    slope = f.alpha.clamp_min(0)
    first = f.alpha.clamp_max(0)
    last = torch.minimum(f.width, f.beta)
    left = first.clamp_min(-math.sqrt(2 * cutoff))
    right = torch.minimum(last, _reach(slope, cutoff))
    if step is not None:
        tilted_left, tilted_right = _window(slope - 2 * step, first, last, cutoff)
        left, right = torch.minimum(left, tilted_left), torch.maximum(right, tilted_right)
    half = 0.5 * (right - left)
    exponents = _parabolas(left, half, slope, step)
    if f.precision == torch.float64:
        exponents = [(left, half, slope), *([] if step is None else [(left, half, step)])]
    origins = _ORIGINS[num_nodes]
    origin: Tensor | float = origins[0]
    if len(origins) > 1:
        origin = (-left / half - 1).mul_(4).round_().mul_(0.25).clamp(origins[0], origins[-1])
    sums = _sums(num_nodes, exponents, origin)
    total = sums[0][0]
    y = (sums[0][1:] / total).unbind()
    mean_ = left + half * (1 + origin + y[0])
    return Nodes(half, half * total, mean_, slope + mean_, y, sums)


def _sums(n: int, exponents: Sequence[Sequence[Tensor]], origin: Any) -> list[Tensor]:
    """Sums of ``exp(p) (exp(q) - 1)^i y^j`` over the window, [5, ...] with j = 0 to 4, for each i.

    The exponents p = -e and q = step r are given by three tensors each. In float32 these are the
    coefficients of a parabola in x. In float64 they are left, half, and slope or step. If only p is
    given, only i = 0 is computed.
    """
    shape, origins = exponents[0][0].shape, _ORIGINS[n]
    rule = rule_on(n, exponents[0][0].device)
    coefficients = [torch.stack([x.reshape(-1) for x in e]) for e in exponents]
    blocks = zip(*(_blocks(c) for c in coefficients), strict=True)
    found = []
    for parts in zip(*(_sums_of_block(rule, *block) for block in blocks), strict=True):
        *others, sums = torch.cat(parts, 1).reshape(len(origins), 5, *shape).unbind()
        for at, other in zip(origins, others, strict=False):
            sums = torch.where(torch.eq(origin, at), other, sums)
        found.append(sums)
    return found


def _parabolas(
    left: Tensor, half: Tensor, slope: Tensor, step: Tensor | None
) -> list[tuple[Tensor, ...]]:
    """Coefficients of -e, and of ``step r`` if there is a step, as parabolas in x.

    A matrix product then gives their values at all nodes. This is faster than erfcx.
    """
    middle = left + half
    found: list[tuple[Tensor, ...]] = [
        (-middle * (slope + 0.5 * middle), -half * (slope + middle), -0.5 * half * half)
    ]
    if step is not None:
        found.append((step * middle, step * half, torch.zeros_like(half)))
    return found


def _sums_of_block(rule: Rule, p: Tensor, q: Tensor | None = None) -> list[Tensor]:
    if len(rule.nodes) == _SUM[torch.float32][0]:
        values = rule.powers @ p
        rise = None if q is None else rule.powers @ q
    else:  # a sum of three terms would lose the last digit of float64
        left, half, slope = p
        r = torch.addcmul(left, half, (1 + rule.nodes)[:, None])
        rise = None if q is None else r * q[2]
        values = torch.add(-slope, r, alpha=-0.5).mul_(r)
    values.exp_()
    sums = [rule.rows @ values]
    if rise is not None:
        rise.expm1_()
        sums.append(rule.rows @ values.mul_(rise))
        sums.append(rule.rows @ values.mul_(rise))
    return sums


def _blocks(x: Tensor) -> Sequence[Tensor]:
    """Split ``x`` along the last dimension into blocks whose nodes fit into the cache of a CPU."""
    # A trace would record the number of blocks. A compiler fuses the operations without blocks.
    return x.split(_BLOCK, -1) if may_look(x) else [x]


def _window(slope: Tensor, first: Tensor, last: Tensor, cutoff: float) -> tuple[Tensor, Tensor]:
    """The part of [first, last] where ``slope r + r^2 / 2`` is at most its minimum plus cutoff."""
    mode = torch.minimum(torch.maximum(-slope, first), last)
    slope = slope + mode  # at the mode: > 0 at the first end, < 0 at the last end, else 0
    left = torch.maximum(first, mode - _reach((-slope).clamp_min(0), cutoff))
    right = torch.minimum(last, mode + _reach(slope.clamp_min(0), cutoff))
    return left, right


def _reach(slope: Tensor, cutoff: float) -> Tensor:
    """The distance r at which ``slope r + r^2 / 2`` equals the cutoff."""
    return 2 * cutoff / (slope + (slope * slope + 2 * cutoff).sqrt())


class Value(NamedTuple):
    """The value of a function of the parameters, with its derivatives."""

    value: Tensor
    d_loc: Tensor
    d_scale: Tensor


def expectation(
    value: Tensor, f: Frame, n: Moments, slope: Tensor | float, curvature: Tensor | float
) -> Value:
    """``value`` with the derivatives of ``E[h]``, where h is a parabola in r.

    The density is an exponential family with the statistics ``r`` and ``e``. The derivative of
    ``E[h]`` with respect to the distance of loc from the bound is ``Cov(h, r) / scale``, and the
    derivative with respect to log scale is ``2 Cov(h, e)``. The contribution of the change of ``h``
    itself has mean zero or is part of ``value``. With h = -log density, the derivatives are those
    of the entropy.

    Args:
        value: the value ``E[h]``.
        f: the frame.
        n: the moments.
        slope: the slope of h at the mean of r.
        curvature: the second derivative of h.
    """
    var, third = n.var, n.third
    with_r = slope * var + 0.5 * curvature * third
    square_with_e = n.slope * third + 0.5 * n.var_square
    with_e = slope * (n.slope * var + 0.5 * third) + 0.5 * curvature * square_with_e
    return Value(value, f.sign * with_r / f.scale, 2 * with_e / f.scale)


def mean_e(n: Moments) -> Tensor:
    """E[e], the mean of the exponent under the density."""
    return n.mean * (n.slope - 0.5 * n.mean) + 0.5 * n.var
