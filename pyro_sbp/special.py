"""Scalar functions of the normal distribution truncated to an interval, right in the far tails.

Every function takes ``(loc, scale, low, high)``: the mean and standard deviation of the normal
before it is cut, and the bounds, either of them possibly infinite. Parameters have any floating
dtype and broadcast against each other; everything is computed, and returned, in float64.

Range: ``loc`` up to 1e5 ``scale`` outside an end, and ``scale`` up to 1e4 times the width of the
interval. Relative errors against mpmath over loc in [-25, 5], log scale in [-10, 5] and bounds
(-20, 0) stay under 1e-12; ``python -m pyro_sbp.experiments.distributions_table`` measures them.
Sums over float32 parameters take fewer nodes and are right to 1e-7.

Gradients in ``loc`` and ``scale`` (and in the value, where there is one) are analytic. They are
once differentiable: a second backward raises. The bounds are constants and get no gradient.

How it is done. The problem is reflected so that the nearer end is at the left, and every length
is counted from the mode (the nearer end if ``loc`` lies outside, else ``loc``) in units of
``scale``. With alpha the signed distance of that end (positive if ``loc`` is outside) the density
is proportional to ``exp(-e(r))``, ``e(r) = max(alpha, 0) r + r^2 / 2``: the term alpha^2 / 2, that
makes the textbook formulas cancel, never appears. Moments are Gauss-Legendre sums over the window
where the density is not negligible.

References:
    [1] K. Neklyudov, D. Molchanov, A. Ashukha, D. Vetrov. Structured Bayesian Pruning via
        Log-Normal Multiplicative Noise. NIPS 2017, arXiv:1705.07283.
    [2] M. Figurnov, S. Mohamed, A. Mnih. Implicit Reparameterization Gradients. NeurIPS 2018,
        arXiv:1805.08498.
    [3] J. P. Mills. Table of the ratio: area to bounding ordinate. Biometrika 18, 1926.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "cdf",
    "entropy",
    "exp_mean",
    "exp_snr",
    "exp_variance",
    "icdf",
    "kl_to_truncated_normal",
    "kl_to_uniform",
    "log_density",
    "log_normalizer",
    "mean",
    "mean_excess",
    "mills_ratio",
    "variance",
]

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
_SQRT_HALF = math.sqrt(0.5)
_SQRT_HALF_PI = math.sqrt(0.5 * math.pi)
# Nodes of a sum, and the log density relative to the mode where its window ends. 40 nodes on the
# window of float64 give 1e-9, 32 give 4e-6; float32 needs less.
_SUM = {torch.float64: (64, 42.0), torch.float32: (36, 26.0)}
_NUM_NEAR_UNIFORM_NODES = 12
# Moments are counted from the origin in the window [-1, 1] that is nearest to the mode, which never
# lies right of the middle: far from the mode their differences would cancel. That costs five
# digits at most, which float32 can spare.
_ORIGINS = {
    64: (-1.0, -0.75, -0.5, -0.25, 0.0),
    36: (-1.0,),
    _NUM_NEAR_UNIFORM_NODES: (-1.0,),
}
_NARROW = 0.25  # below it, in width and in log density, the density is nearly uniform
_NUM_NARROW_NODES = 5


def _gauss_legendre(n: int) -> tuple[list[float], list[float]]:
    """Nodes and weights on [-1, 1], by Newton's method on the Legendre polynomial."""
    nodes, weights = [], []
    for i in range(n):
        x = math.cos(math.pi * (i + 0.75) / (n + 0.5))
        for _ in range(10):
            p0, p1 = 1.0, x
            for k in range(2, n + 1):
                p0, p1 = p1, ((2 * k - 1) * x * p1 - (k - 1) * p0) / k
            slope = n * (x * p1 - p0) / (x * x - 1)
            x -= p1 / slope
        nodes.append(-x)
        weights.append(2 / ((1 - x * x) * slope * slope))
    return nodes, weights


def _sums(n: int) -> Tensor:
    """Nodes [n], and rows that sum ``weight (x - origin)^j``, j = 0 to 4, for each origin."""
    x, weights = torch.tensor(_gauss_legendre(n), dtype=torch.float64, device="cpu")
    powers = [(x - origin) ** j for origin in _ORIGINS[n] for j in range(5)]
    return torch.stack([x, *(weights * y for y in powers)])


_NODES = {(n, torch.device("cpu")): _sums(n) for n in _ORIGINS}
_NARROW_NODES = tuple(zip(*_gauss_legendre(_NUM_NARROW_NODES), strict=True))


def _nodes(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes [n] and summing rows [5 a origin, n] on ``device``, copied there once."""
    if (n, device) not in _NODES:
        _NODES[n, device] = _NODES[n, torch.device("cpu")].to(device)
    return _NODES[n, device][0], _NODES[n, device][1:]


# Gradients that are known in closed form


class _Attach(torch.autograd.Function):
    """The first argument, with the gradients of the others given instead of traced."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, *inputs_and_derivatives: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.num_inputs = (len(inputs) - 1) // 2
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad):
        inputs = ctx.saved_tensors[: ctx.num_inputs]
        derivatives = ctx.saved_tensors[ctx.num_inputs :]
        if torch.is_grad_enabled():  # a graph of the gradient is asked for
            derivatives = [_OnceDifferentiable.apply(d, *inputs) for d in derivatives]
        return (None, *(grad * d for d in derivatives), *(None,) * ctx.num_inputs)


class _OnceDifferentiable(torch.autograd.Function):
    """The first argument, that depends on the others in a way that is not known."""

    generate_vmap_rule = True

    @staticmethod
    def forward(derivative: Tensor, *inputs: Tensor) -> Tensor:
        return derivative.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("pyro_sbp.special is once differentiable: no second derivatives")


def attach(value: Tensor, *pairs: tuple[Tensor, Tensor]) -> Tensor:
    """``value`` as a function of inputs, from pairs (input, derivative of value in it).

    Inputs expand to the shape of the value; their gradients add up over the copies.
    """
    inputs = [x.to(torch.float64).expand(value.shape) for x, _ in pairs]
    return _Attach.apply(value, *inputs, *(d.expand(value.shape) for _, d in pairs))


# Mills ratio


def _mills(x: Tensor) -> Tensor:
    return _SQRT_HALF_PI * torch.special.erfcx(x * _SQRT_HALF)


def _mills_slope(x: Tensor, mills: Tensor) -> Tensor:
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
        x64 = x.to(torch.float64)
        ratio = _mills(x64)
        slope = _mills_slope(x64, ratio)
    return attach(ratio, (x, -slope))


def mean_excess(x: Tensor) -> Tensor:
    """Mean of ``z - x`` for a standard normal ``z > x``, which is ``1 / R(x) - x``.

    Args:
        x: Any shape, from -1 to 1e150. Relative error 1e-13.

    Returns:
        Float64, the shape of ``x``; no gradient.
    """
    with torch.no_grad():
        return _mean_excess(x.to(torch.float64))


def _mean_excess(x: Tensor) -> Tensor:
    ratio = _mills(x)
    return _mills_slope(x, ratio) / ratio


# The reflected problem


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
    loc, scale, low, high = torch.broadcast_tensors(
        *(x.to(torch.float64) for x in (loc, scale, low, high))
    )
    low, high = low.detach(), high.detach()
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


def _mode(f: Frame) -> Tensor:
    return torch.where(f.alpha > 0, f.end, f.loc)


class _Nodes(NamedTuple):
    """Gauss-Legendre nodes, along the first dimension, and the moments of the density there.

    ``r`` is the distance from the mode, ``y = x - origin`` the position in the window, which is
    x = -1 to 1.
    """

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
        return _window_sums(x, self.origin)


def _window_sums(x: Tensor, origin: Tensor) -> Tensor:
    n = x.shape[0]
    rows = _nodes(n, x.device)[1]
    *others, sums = (rows @ x.reshape(n, -1)).reshape(-1, 5, *x.shape[1:])
    for at, other in zip(_ORIGINS[n], others, strict=False):
        sums = torch.where(origin == at, other, sums)
    return sums


def _integrate(f: Frame, tilt: Tensor | None = None) -> _Nodes:
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
    r = _spread(num_nodes, left, half)
    density = torch.add(-slope, r, alpha=-0.5).mul_(r).exp_()
    origins = _ORIGINS[num_nodes]
    origin = (-left / half - 1).mul_(4).round_().mul_(0.25).clamp(origins[0], origins[-1])
    total, *y = _window_sums(density, origin)
    y1, y2, y3, y4 = (x / total for x in y)
    square = y1 * y1
    var = y2 - square
    third = y3 - y1 * (3 * y2 - 2 * square)
    fourth = y4 - 4 * y1 * y3 + square * (6 * y2 - 3 * square)
    mean_ = left + half * (1 + origin) + half * y1
    half_square = half.square()
    return _Nodes(
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


def _spread(n: int, left: Tensor, half: Tensor) -> Tensor:
    x = _nodes(n, left.device)[0].reshape(n, *(1,) * left.ndim)
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


class _Value(NamedTuple):
    """A function of the parameters with its derivatives."""

    value: Tensor
    d_loc: Tensor
    d_scale: Tensor


def _expectation(
    value: Tensor, f: Frame, n: _Nodes, slope: Tensor | float, curvature: Tensor | float
) -> _Value:
    """``value`` with the derivatives of ``E[h]``, h the parabola of that slope at the mean of r.

    The density is an exponential family with statistics ``r`` and ``e``: the derivatives of
    ``E[h]`` are ``Cov(h, r) / scale`` in the distance of loc from the end and ``2 Cov(h, e)`` in
    log scale, and what ``h`` itself changes has mean zero or is part of ``value``. With h = -log
    density they are those of the entropy.
    """
    with_r = slope * n.var + 0.5 * curvature * n.third
    square_with_e = n.slope * n.third + 0.5 * n.var_square
    with_e = slope * (n.slope * n.var + 0.5 * n.third) + 0.5 * curvature * square_with_e
    return _Value(value, f.sign * with_r / f.scale, 2 * with_e / f.scale)


def _evaluate(
    function: Callable[[Frame], _Value], loc: Tensor, scale: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """``function`` of the parameters with its gradient."""
    with torch.no_grad():
        v = function(frame(loc, scale, low, high))
    return attach(v.value, (loc, v.d_loc), (scale, v.d_scale))


def _mean_e(n: _Nodes) -> Tensor:
    return n.mean * (n.slope - 0.5 * n.mean) + 0.5 * n.var


# Normalizer, density, entropy, divergence


def log_normalizer(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``log Z = log(Phi((high - loc) / scale) - Phi((low - loc) / scale))``.

    Error 1e-12 of max(1, value), though the value reaches -1e10.
    """

    def function(f: Frame) -> _Value:
        n = _integrate(f)
        slope = f.alpha.clamp_min(0)
        return _Value(
            n.log_mass - 0.5 * slope.square() - _HALF_LOG_2PI,
            f.sign * n.slope / f.scale,
            (slope.square() + 2 * _mean_e(n) - 1) / f.scale,
        )

    return _evaluate(function, loc, scale, low, high)


def log_density(value: Tensor, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Log density at ``value``, in nats per unit of ``value``; minus infinity outside the bounds.

    ``value`` broadcasts against the parameters.
    """
    with torch.no_grad():
        f = frame(loc, scale, low, high)
        n = _integrate(f)
        slope = f.alpha.clamp_min(0)
        x = value.to(torch.float64)
        outside = (x < low) | (x > high)
        r = f.sign * (x - _mode(f)) / f.scale
        e = r * (slope + 0.5 * r)
        log_q = torch.where(outside, -math.inf, -e - n.log_mass - f.scale.log())
        d_value = torch.where(outside, 0.0, -f.sign * (slope + r) / f.scale)
        d_loc = torch.where(outside, 0.0, f.sign * (r - n.mean) / f.scale)
        d_scale = torch.where(outside, 0.0, 2 * (e - _mean_e(n)) / f.scale)
    return attach(log_q, (value, d_value), (loc, d_loc), (scale, d_scale))


def entropy(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Differential entropy in nats. Error 1e-12 of max(1, value)."""

    def function(f: Frame) -> _Value:
        n = _integrate(f)
        return _expectation(n.log_mass + f.scale.log() + _mean_e(n), f, n, n.slope, 1.0)

    return _evaluate(function, loc, scale, low, high)


def kl_to_uniform(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """KL divergence from the truncated normal to the uniform on [low, high], as [1].

    In nats, never negative, relative error 1e-12 down to the nearly uniform; infinite if a bound
    is. This is the KL between truncated log-normal and truncated log-uniform, too.
    """

    def function(f: Frame) -> _Value:
        n = _integrate(f)
        value = f.width.log() - n.log_mass - _mean_e(n)
        value = torch.where(value > 0.01, value, _kl_near_uniform(f))
        return _expectation(value, f, n, -n.slope, -1.0)

    return _evaluate(function, loc, scale, low, high)


def _kl_near_uniform(f: Frame) -> Tensor:
    """The KL where it is less than 0.01, so that the sums above would cancel.

    With ``d = mean(e) - e`` under the uniform, and ``T(d) = (exp(d) - 1 - d) / d^2``, the KL is
    ``mean(d^2 + d^3 T) / (1 + m) - log(1 + m)`` with ``m = mean(d^2 T)``: all of second order.
    """
    slope = f.alpha.clamp_min(0)
    first = f.alpha.clamp_min(-4).clamp_max(0)
    r = _spread(_NUM_NEAR_UNIFORM_NODES, first, 0.5 * f.width.clamp_max(8))
    weights = 0.5 * _nodes(_NUM_NEAR_UNIFORM_NODES, r.device)[1][0]

    def uniform_mean(x: Tensor) -> Tensor:
        return (weights @ x.reshape(len(weights), -1)).reshape(slope.shape)

    e = torch.add(slope, r, alpha=0.5).mul_(r)
    d = e.neg_().sub_(uniform_mean(e)).clamp(-1, 1)
    series = torch.full_like(d, 1 / math.factorial(14))
    for k in range(13, 1, -1):
        series.mul_(d).add_(1 / math.factorial(k))
    square = d * d
    m = uniform_mean(series.mul_(square))
    second = uniform_mean(square) + uniform_mean(series.mul_(d))
    return second / (1 + m) - m.log1p()


def kl_to_truncated_normal(
    loc: Tensor,
    scale: Tensor,
    low: Tensor,
    high: Tensor,
    loc_q: Tensor,
    scale_q: Tensor,
    low_q: Tensor,
    high_q: Tensor,
) -> Tensor:
    """KL divergence to the truncated normal with the parameters ``_q``, in nats.

    Error 1e-12 of max(1, value) where both have the same bounds, or the mass of the first lies
    within 1e3 ``scale_q`` of the mode of the second; infinite where the bounds of the first are
    not within those of the second.
    """
    with torch.no_grad():
        f, g = frame(loc, scale, low, high), frame(loc_q, scale_q, low_q, high_q)
        n, m = _integrate(f), _integrate(g)
        # The exponent of q is a parabola in the r of p: its slope and mean at the mean of r.
        ratio = g.sign * f.sign * f.scale / g.scale
        r = g.sign * (_mode(f) - _mode(g)) / g.scale + ratio * n.mean
        slope = g.alpha.clamp_min(0) + r
        mean_e = r * (slope - 0.5 * r) + 0.5 * ratio.square() * n.var
        value = mean_e - _mean_e(n) + m.log_mass - n.log_mass + (g.scale / f.scale).log()
        contained = (low >= low_q) & (high <= high_q)
        value = torch.where(contained, value.clamp_min(0), math.inf)
        v = _expectation(value, f, n, slope * ratio - n.slope, ratio.square() - 1)
        d_loc_q = g.sign * (m.mean - r) / g.scale
        d_scale_q = 2 * (_mean_e(m) - mean_e) / g.scale
    pairs = (loc, v.d_loc), (scale, v.d_scale), (loc_q, d_loc_q), (scale_q, d_scale_q)
    return attach(v.value, *pairs)


# Moments


def mean(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Mean of x. Relative error 1e-12 of the larger of its size and the standard deviation."""

    def function(f: Frame) -> _Value:
        n = _integrate(f)
        step = f.sign * f.scale
        return _expectation(_mode(f) + step * n.mean, f, n, step, 0.0)

    return _evaluate(function, loc, scale, low, high)


def variance(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Variance of x. Relative error 1e-12."""

    def function(f: Frame) -> _Value:
        n = _integrate(f)
        square = f.scale.square()
        return _expectation(square * n.var, f, n, 0.0, 2 * square)

    return _evaluate(function, loc, scale, low, high)


class _Rise(NamedTuple):
    """The variable ``exp(x) / exp(mode) - 1``, and what its moments do with the parameters."""

    mean: _Value
    var: _Value
    at_mode: Tensor  # exp(mode)


def _rise(f: Frame) -> _Rise:
    step = f.sign * f.scale
    n = _integrate(f, tilt=2 * step)
    rise = n.r.mul_(step).expm1_()
    weighted = rise * n.density
    total, *y = n.sums(n.density)[:3]
    y1, y2 = (x / total for x in y)

    def value(m0: Tensor, m1: Tensor, m2: Tensor) -> _Value:
        """From E[h y^j]: the covariances of h with r, and with e, a parabola in r."""
        with_y = m1 - m0 * y1
        with_square = m2 - m0 * y2 - 2 * y1 * with_y  # with (y - mean)^2
        with_e = n.half * (n.slope * with_y + 0.5 * n.half * with_square)
        return _Value(m0, f.sign * n.half * with_y / f.scale, 2 * with_e / f.scale)

    first = [x / total for x in n.sums(weighted)[:3]]
    second = [x / total for x in n.sums(weighted.mul_(rise))[:3]]
    mean_ = first[0]
    central = [
        s - 2 * mean_ * m + mean_ * mean_ * x
        for s, m, x in zip(second, first, (1.0, y1, y2), strict=True)
    ]
    return _Rise(value(*first), value(*central), _mode(f).exp())


def exp_mean(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Mean of ``theta = exp(x)``. Relative error 1e-12 on finite bounds."""

    def function(f: Frame) -> _Value:
        rise = _rise(f)
        value, d_loc, d_scale = (rise.at_mode * x for x in rise.mean)
        return _Value(rise.at_mode + value, d_loc, d_scale)

    return _evaluate(function, loc, scale, low, high)


def exp_variance(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Variance of ``theta = exp(x)``. Relative error 1e-12 on finite bounds."""

    def function(f: Frame) -> _Value:
        rise = _rise(f)
        return _Value(*(rise.at_mode.square() * x for x in rise.var))

    return _evaluate(function, loc, scale, low, high)


def exp_snr(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Signal-to-noise ratio ``E[theta] / sd[theta]`` of ``theta = exp(x)``, as [1].

    Relative error 1e-12 on finite bounds; the scale exp(mode) drops out, so nothing underflows.
    """

    def function(f: Frame) -> _Value:
        mean_, var, _ = _rise(f)
        snr = (1 + mean_.value) * var.value.rsqrt()
        # The log of the ratio has the derivatives of the logs of E and of Var, both expectations.
        in_mean, in_var = snr / (1 + mean_.value), -0.5 * snr / var.value
        d_loc = in_mean * mean_.d_loc + in_var * var.d_loc
        return _Value(snr, d_loc, in_mean * mean_.d_scale + in_var * var.d_scale)

    return _evaluate(function, loc, scale, low, high)


# Distribution function, its inverse, and the gradients of samples


class _Tails(NamedTuple):
    """What the distribution function and its inverse need of the parameters alone."""

    inside: Tensor  # loc is inside by more than one scale: count from loc by erfc and ndtri
    narrow: Tensor  # the density is nearly uniform: count from the end by quadrature
    alpha: Tensor  # the nearer end where not inside, else a harmless number
    hazard: Tensor  # 1 / R(alpha), and the same of the far end
    hazard_beta: Tensor
    excess: Tensor  # mean excess over alpha, and over the far end
    excess_beta: Tensor
    rho: Tensor  # tail mass beyond the far end over that beyond the near end
    one_minus_rho: Tensor
    whole: tuple[Tensor, Tensor, Tensor]  # where narrow, the partial moments at the far end
    lower: Tensor  # Phi(alpha) and 1 - Phi(beta), where inside
    upper: Tensor
    inner: Tensor  # alpha where inside, else a harmless number


def _partial_moments(alpha: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Integrals of ``t^k exp(-(alpha t + t^2 / 2))`` over [0, s] for k = 0, 1, 2, if narrow."""
    total = first = second = torch.zeros_like(s)
    for node, weight in _NARROW_NODES:
        t = 0.5 * (1 + node) * s
        mass = torch.exp(-t * (alpha + 0.5 * t)) * (0.5 * weight)
        total, first, second = total + mass, first + mass * t, second + mass * t * t
    return s * total, s * first, s * second


def _tails(f: Frame) -> _Tails:
    inside = f.alpha < -1
    alpha = torch.where(inside, 0.0, f.alpha)
    drop = f.width * (alpha + 0.5 * f.width)
    narrow = ~inside & (f.width < _NARROW) & (drop < _NARROW)
    whole = _partial_moments(alpha, torch.where(narrow, f.width, 0.0))
    beta = alpha + f.width
    ratio, ratio_beta = _mills(alpha), _mills(beta)
    rho = torch.exp(-drop) * ratio_beta / ratio
    inner = torch.where(inside, f.alpha, -2.0)
    return _Tails(
        inside,
        narrow,
        alpha,
        1 / ratio,
        1 / ratio_beta,
        _mills_slope(alpha, ratio) / ratio,
        _mills_slope(beta, ratio_beta) / ratio_beta,
        rho,
        torch.where(narrow, whole[0] / ratio, 1 - rho),
        whole,
        0.5 * torch.erfc(-inner * _SQRT_HALF),
        0.5 * torch.erfc(f.beta.clamp_min(-1) * _SQRT_HALF),
        inner,
    )


def _survival(t: _Tails, p: Tensor, q: Tensor) -> Tensor:
    """Tail mass beyond the quantile over that beyond the near end, without cancellation."""
    return torch.where(p < 0.5, 1 - p * t.one_minus_rho, t.rho + q * t.one_minus_rho)


def _inverse(f: Frame, t: _Tails, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Quantile at probability p = 1 - q from the near end, as ``z`` (inside) and steps from alpha.

    Outside, solve ``s (alpha + s / 2) - log(R(alpha + s) / R(alpha)) = target``, the integral of
    the hazard, by three Halley steps; the left side has the derivative 1 / R.
    """
    mass = 1 - t.lower - t.upper
    below, above = t.lower + p * mass, t.upper + q * mass
    z = torch.special.ndtri(torch.minimum(below, above))
    z = torch.where(below <= above, z, -z)
    z = torch.minimum(torch.maximum(z, t.inner), f.beta)

    target = torch.where(
        p < 0.5, -torch.log1p(-p * t.one_minus_rho), -(t.rho + q * t.one_minus_rho).log()
    ).clamp_max(800.0)
    s = t.hazard.square() + 2 * t.hazard * t.excess * target
    s = 2 * target / (t.hazard + s.sqrt())
    for _ in range(3):
        ratio = _mills(t.alpha + s)
        step = (s * (t.alpha + 0.5 * s) - (ratio * t.hazard).log() - target) * ratio
        s = s - step / (1 - 0.5 * step * (1 / ratio - t.alpha - s))
        s = torch.minimum(s.clamp_min(0), f.width)
    # Where narrow, s still has the absolute error of the logarithm: one Newton step on the mass.
    mass = _partial_moments(t.alpha, torch.where(t.narrow, s, 0.0))[0]
    step = (mass - p * t.whole[0]) * torch.exp(s * (t.alpha + 0.5 * s))
    s = torch.minimum(torch.where(t.narrow, s - step, s).clamp_min(0), f.width)
    s = torch.where(p == 0, 0.0, torch.where(q == 0, f.width, s))
    return z, s


def _derivatives(
    f: Frame, t: _Tails, p: Tensor, q: Tensor, z: Tensor, s: Tensor
) -> tuple[Tensor, Tensor]:
    """Derivatives of the quantile at fixed probability in loc and in scale, as [2]."""
    # Inside: the textbook form, in ratios of densities.
    near = torch.where(q > 0, q * torch.exp(0.5 * (z - t.inner) * (z + t.inner)), 0.0)
    far = torch.where(p > 0, p * torch.exp(-0.5 * (f.beta - z) * (f.beta + z)), 0.0)
    inner_loc = 1 - near - far
    inner_scale = (
        z - torch.where(near > 0, t.inner * near, 0.0) - torch.where(far > 0, f.beta * far, 0.0)
    )
    # Outside: differences of the hazard 1 / R(x) = x + excess(x), of which x cancels exactly.
    ratio = _mills(t.alpha + s)
    excess = _mills_slope(t.alpha + s, ratio) / ratio
    share = torch.where(t.rho > 0, p * t.rho / _survival(t, p, q), 0.0)
    through = torch.where(share > 0, share * (f.width + t.excess_beta - t.excess), 0.0)
    outer_loc = ratio * (s + excess - t.excess - through)
    through = torch.where(share > 0, share * f.width * ratio * t.hazard_beta, 0.0)
    outer_scale = s + t.alpha * outer_loc - through
    # Narrow: -(dF / dparameter) / density, with the score 2 alpha t + t^2 of log scale.
    _, *moments = _partial_moments(t.alpha, torch.where(t.narrow, s, 0.0))
    rise = torch.exp(s * (t.alpha + 0.5 * s))
    narrow_loc, square = (rise * (p * w - m) for w, m in zip(t.whole[1:], moments, strict=True))
    outer_loc = torch.where(t.narrow, narrow_loc, outer_loc)
    outer_scale = torch.where(t.narrow, 2 * t.alpha * narrow_loc + square, outer_scale)
    d_loc = torch.where(t.inside, inner_loc, outer_loc)
    return d_loc, f.sign * torch.where(t.inside, inner_scale, outer_scale)


def icdf(
    u: Tensor,
    loc: Tensor,
    scale: Tensor,
    low: Tensor,
    high: Tensor,
    complement: Tensor | None = None,
) -> Tensor:
    """Quantile function of x, and reparameterised sample if ``u`` is uniform.

    Args:
        u: Probabilities in [0, 1]; broadcasts against the parameters.
        complement: ``1 - u`` if it is known better than by that subtraction.

    Returns:
        Float64, absolute error 1e-11, inside the bounds. Gradients in ``loc`` and ``scale`` at
        fixed ``u`` are those of [2], and the one in ``u`` is the inverse density.
    """
    with torch.no_grad():
        f = frame(loc, scale, low, high)
        u64 = u.to(torch.float64)
        v64 = 1 - u64 if complement is None else complement.to(torch.float64)
        from_low = f.sign > 0
        p, q = torch.where(from_low, u64, v64), torch.where(from_low, v64, u64)
        t = _tails(f)
        z, s = _inverse(f, t, p, q)
        x = torch.where(t.inside, f.loc + f.sign * f.scale * z, f.end + f.sign * f.scale * s)
        x = torch.minimum(torch.maximum(x, low), high)
        d_loc, d_scale = _derivatives(f, t, p, q, z, s)
        pairs = [(loc, d_loc), (scale, d_scale)]
        if u.requires_grad:
            pairs.append((u, (-log_density(x, loc, scale, low, high)).exp()))
    return attach(x, *pairs)


def cdf(value: Tensor, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Distribution function of x: 0 below the bounds, 1 above. Absolute error 1e-14.

    ``value`` broadcasts against the parameters.
    """
    with torch.no_grad():
        f = frame(loc, scale, low, high)
        t = _tails(f)
        x = torch.minimum(torch.maximum(value.to(torch.float64), low), high)
        z = f.sign * (x - f.loc) / f.scale
        s = f.sign * (x - f.end) / f.scale
        s = torch.where(t.inside, 0.0, s).clamp_min(0)
        # Both tails, each without a subtraction from one where it is small.
        ratio = torch.exp(-s * (t.alpha + 0.5 * s)) * _mills(t.alpha + s) * t.hazard
        outer_q = (ratio - t.rho) / t.one_minus_rho
        drop = s * (t.alpha + 0.5 * s) - (_mills(t.alpha + s) * t.hazard).log()
        outer_p = -torch.expm1(-drop) / t.one_minus_rho
        share = _partial_moments(t.alpha, torch.where(t.narrow, s, 0.0))[0] / t.whole[0]
        outer_p = torch.where(t.narrow, share, outer_p)
        outer_q = torch.where(t.narrow, 1 - share, outer_q)
        mass = 1 - t.lower - t.upper
        inner_p = (0.5 * torch.erfc(-z * _SQRT_HALF) - t.lower) / mass
        inner_q = (0.5 * torch.erfc(z * _SQRT_HALF) - t.upper) / mass
        p = torch.where(t.inside, inner_p, outer_p).clamp(0, 1)
        q = torch.where(t.inside, inner_q, outer_q).clamp(0, 1)
        p = torch.where(p < 0.5, p, 1 - q)
        q = torch.where(p < 0.5, 1 - p, q)
        d_loc, d_scale = _derivatives(f, t, p, q, z, s)
        density = torch.exp(log_density(value, loc, scale, low, high))
        cdf_ = torch.where(f.sign > 0, p, q)
        cdf_ = torch.where(x <= low, 0.0, torch.where(x >= high, 1.0, cdf_))
    return attach(cdf_, (value, density), (loc, -density * d_loc), (scale, -density * d_scale))
