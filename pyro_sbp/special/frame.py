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


_BLOCK = 4096  # elements that are summed together: their nodes take 1 MiB of the cache of a CPU


_WIDE = 1.0  # in width: below it moments in closed form cancel


_MOST_SCALES = 37.0


_FEW = 1000  # elements, for which sums take no longer than what it needs to find them


NARROW = 0.25  # below it, in width and in log density, the density is nearly uniform


_NUM_NARROW_NODES = 5


def _gauss_legendre(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on [-1, 1]."""
    nodes, _ = leggauss(n)
    # Its weights are right to 2e-15, these to 2e-16.
    weights = 2 / ((1 - nodes**2) * Legendre.basis(n).deriv()(nodes) ** 2)
    return nodes, weights * (2 / weights.sum())


class Rule(NamedTuple):
    """A Gauss-Legendre rule of n nodes x on [-1, 1]."""

    nodes: Tensor  # [n]
    powers: Tensor  # [n, 3]: 1, x, x^2, from the coefficients of a parabola to its values
    rows: Tensor  # [5 a origin, n]: sums of weight (x - origin)^j, j = 0 to 4


def _rule(n: int) -> Rule:
    x, weights = (torch.tensor(values, device="cpu") for values in _gauss_legendre(n))
    moments = [weights * (x - origin) ** j for origin in _ORIGINS[n] for j in range(5)]
    return Rule(x, torch.stack([torch.ones_like(x), x, x * x], 1), torch.stack(moments))


_RULES = {(n, torch.device("cpu")): _rule(n) for n in _ORIGINS}


NARROW_NODES = tuple(
    zip(*(values.tolist() for values in _gauss_legendre(_NUM_NARROW_NODES)), strict=True)
)


def rule_on(n: int, device: torch.device) -> Rule:
    """The rule of n nodes on ``device``, copied there once."""
    if (n, device) not in _RULES:
        _RULES[n, device] = Rule(*(x.to(device) for x in _RULES[n, torch.device("cpu")]))
    return _RULES[n, device]


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
    loc: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor
    alpha: Tensor  # signed distance of the nearer end from loc, positive if loc is outside
    beta: Tensor  # signed distance of the other end
    width: Tensor  # beta - alpha, exact
    precision: torch.dtype  # float64 if a parameter is, else float32

    @property
    def mode(self) -> Tensor:
        """Of the density: loc, or the nearer end where loc is outside."""
        return torch.minimum(torch.maximum(self.loc, self.low), self.high)


def frame(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Frame:
    """The parameters, broadcast and in float64, as seen from the end nearer to ``loc``."""
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
    """Moments of the density, in the distance r from the mode."""

    @property
    def mass(self) -> Tensor:
        """The integral of exp(-e) over r."""

    @property
    def mean(self) -> Tensor:
        """Mean of r."""

    @property
    def slope(self) -> Tensor:
        """Slope of e at the mean of r."""

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
    """Moments of the density, of every element by the cheapest way that is right for it.

    Where loc is inside, erf gives them in closed form. For float32 that loses nothing, unless the
    density is nearly uniform; elsewhere, and for float64, they are sums.
    """
    if f.precision == torch.float64 or not may_look(f.alpha):
        return integrate(f)
    inside = (f.alpha < 0) & (f.width > _WIDE)
    count = int(inside.count_nonzero())
    if count == inside.numel():
        return ByErf(f)
    # To take the elements apart costs some forty small operations.
    return integrate(f) if count < _FEW else ByRegion(f, inside)


class ByErf:
    """Moments of the density in closed form, for a loc inside. They lose ``width^-4`` digits."""

    def __init__(self, f: Frame) -> None:
        # Beyond there is no mass, and next to nothing takes very long.
        self._ends = torch.stack([f.alpha, f.beta]).clamp(-_MOST_SCALES, _MOST_SCALES)
        scaled = self._ends * SQRT_HALF
        below, above = torch.erf(scaled)
        self.mass = (above - below).mul_(_SQRT_HALF_PI)
        # The density at the ends, times a power of them, gives the next moment.
        self._density = scaled.square_().neg_().exp_().div_(self.mass)
        self.mean = self.slope = self._density[0] - self._density[1]
        self._powers = self._ends * self._density
        self._square = 1 + self._step()

    def _step(self) -> Tensor:
        return self._powers[0] - self._powers[1]

    @property
    def var(self) -> Tensor:
        return self._square - self.mean.square()

    @cached_property
    def _third_and_fourth(self) -> tuple[Tensor, Tensor]:
        """Of r about the mode."""
        self._powers.mul_(self._ends)
        third = 2 * self.mean + self._step()
        self._powers.mul_(self._ends)
        return third, 3 * self._square + self._step()

    @property
    def third(self) -> Tensor:
        third, _ = self._third_and_fourth
        return third - self.mean * (3 * self._square - 2 * self.mean.square())

    @property
    def var_square(self) -> Tensor:
        third, fourth = self._third_and_fourth
        square = self.mean.square()
        fourth = fourth - 4 * self.mean * third + square * (6 * self._square - 3 * square)
        return fourth - self.var.square()


class ByRegion:
    """Moments of the density, `ByErf` where ``inside`` and by sums elsewhere."""

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
    """Moments of the density by Gauss-Legendre sums over a window, in the distance r from the mode.

    ``y = x - origin`` is the position in the window, which is x = -1 to 1.
    """

    half: Tensor  # of the width of the window
    mass: Tensor  # the integral of exp(-e) over r
    mean: Tensor  # of r
    slope: Tensor  # of e at the mean of r
    y: Sequence[Tensor]  # E[y^j], j = 1 to 4
    sums: Sequence[Tensor]  # of density (exp(step r) - 1)^i y^j over the window, [5] for each i

    @property
    def var(self) -> Tensor:
        """Variance of r."""
        return self.half.square() * (self.y[1] - self.y[0] * self.y[0])

    @property
    def third(self) -> Tensor:
        """Central moment of r."""
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
    """Moments of the density, and of ``exp(step * r) - 1`` if a step is given."""
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

    p = -e and q = step r are given by three tensors: of float32 the coefficients of a parabola in
    x, of float64 left, half and slope or step. With p alone only i = 0.
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

    A matrix product gives their values at all nodes, faster than erfcx gives the closed forms.
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
    else:  # a sum of three terms would cost float64 its last digit
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
    """``x`` in blocks of the last dimension whose nodes stay in the cache of a CPU."""
    # Their number is one of those values that a trace would hold on to, and compilers fuse.
    return x.split(_BLOCK, -1) if may_look(x) else [x]


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
    value: Tensor, f: Frame, n: Moments, slope: Tensor | float, curvature: Tensor | float
) -> Value:
    """``value`` with the derivatives of ``E[h]``, h the parabola of that slope at the mean of r.

    The density is an exponential family with statistics ``r`` and ``e``: the derivatives of
    ``E[h]`` are ``Cov(h, r) / scale`` in the distance of loc from the end and ``2 Cov(h, e)`` in
    log scale, and what ``h`` itself changes has mean zero or is part of ``value``. With h = -log
    density they are those of the entropy.
    """
    var, third = n.var, n.third
    with_r = slope * var + 0.5 * curvature * third
    square_with_e = n.slope * third + 0.5 * n.var_square
    with_e = slope * (n.slope * var + 0.5 * third) + 0.5 * curvature * square_with_e
    return Value(value, f.sign * with_r / f.scale, 2 * with_e / f.scale)


def mean_e(n: Moments) -> Tensor:
    return n.mean * (n.slope - 0.5 * n.mean) + 0.5 * n.var
