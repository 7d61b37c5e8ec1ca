"""Log density, entropy, KL divergence and moments of the truncated normal and its exponential."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sbp.special.blocks import in_blocks
from pyro_sbp.special.bounds import bound_pairs, evaluate
from pyro_sbp.special.by_erf import density_by_erf, ends_by_erf, kl_by_erf
from pyro_sbp.special.derivatives import (
    attach,
    common_shape,
    constant,
    has_shape,
    is_tracked,
    may_look,
)
from pyro_sbp.special.frame import (
    HALF_LOG_2PI,
    NUM_NEAR_UNIFORM_NODES,
    Frame,
    Moments,
    Value,
    expectation,
    frame,
    integrate,
    mean_e,
    moments,
    rule_on,
)

__all__ = [
    "entropy",
    "exp_mean",
    "exp_snr",
    "exp_variance",
    "kl_to_truncated_normal",
    "kl_to_uniform",
    "log_density",
    "log_normalizer",
    "mean",
    "variance",
]


def log_normalizer(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The log of the normaliser, ``log(Phi((high - loc) / scale) - Phi((low - loc) / scale))``.

    The error is below 1e-12 max(1, abs(value)); values may be as small as -1e10.
    """

    def function(f: Frame) -> Value:
        n = moments(f)
        slope = f.alpha.clamp_min(0)
        return Value(
            n.mass.log() - 0.5 * slope.square() - HALF_LOG_2PI,
            f.sign * n.slope / f.scale,
            (slope.square() + 2 * mean_e(n) - 1) / f.scale,
        )

    return evaluate(function, loc, scale, low, high, lambda v, end, log_q: -torch.ones_like(end))


def log_density(
    value: Tensor,
    loc: Tensor,
    scale: Tensor,
    low: Tensor,
    high: Tensor,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The log density at ``value`` in nats, which is minus infinity outside the bounds.

    ``value`` broadcasts against the parameters. The function is twice differentiable. The result is
    computed in float64, and rounded to ``dtype``.
    """
    with torch.no_grad():
        # The derivative with respect to the value is often not needed.
        in_value = is_tracked(value) or not may_look(value)
        function = _density_of if in_value else _density_of_constant
        inputs = value, loc, scale, low, high
        # Gradients that are summed over values stay in float64.
        shape = common_shape(*inputs)
        summed = not all(has_shape(x, shape) for x in inputs[:3])
        exact = torch.float64 if summed else dtype
        log_q, *derivatives = in_blocks(function, *inputs, dtype=exact)
        if not in_value:
            derivatives.insert(0, log_q.new_zeros(()))
        ends = bound_pairs(
            loc,
            scale,
            low,
            high,
            lambda *_: torch.where((value < low) | (value > high), 0.0, 1.0).double(),
        )
        # The second derivatives always take the bounds as inputs.
        ends = ends or [(end, end.new_zeros(())) for end in (low, high)]
    pairs = *zip((value, loc, scale), derivatives, strict=True), *ends
    return attach(log_q, *pairs, second=_second_of_log_density).to(dtype)


def _density_of(
    value: Tensor, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, ...]:
    """The log density, and its derivatives with respect to value, loc and scale."""
    within = may_look(value) and may_look(low) and may_look(high) and _are_within(value, low, high)
    ends = ends_by_erf(loc, scale, low, high) if within else None
    if ends is not None:
        return density_by_erf(constant(value), ends)
    d = _density(constant(value), low, high, _terms(*_integrated(loc, scale, low, high)))
    return d.log_q, d.in_value, d.in_loc, d.in_scale


def _density_of_constant(*inputs: Tensor) -> tuple[Tensor, ...]:
    log_q, _, in_loc, in_scale = _density_of(*inputs)
    return log_q, in_loc, in_scale


def _are_within(value: Tensor, low: Tensor, high: Tensor) -> bool:
    """Whether all values are known to be within the bounds, from the extreme values."""
    if not (value.numel() and low.numel() and high.numel()):
        return True
    least, most = (float(x) for x in value.detach().aminmax())
    return least >= float(low.max()) and most <= float(high.min())


def _second_of_log_density(
    value: Tensor, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor
) -> list[list[Tensor]]:
    """Second derivatives of the log density with respect to value, loc, scale, low and high."""
    f, n = _integrated(loc, scale, low, high)
    terms = _terms(f, n)
    d = _density(constant(value), low, high, terms)
    curvature = torch.where(d.outside, 0.0, f.scale.square().reciprocal())
    cov = n.slope * n.var + 0.5 * n.third  # covariances of r and e
    var_e = n.slope * (cov + 0.5 * n.third) + 0.25 * n.var_square
    in_value_scale = -2 * d.in_value / f.scale
    in_loc_scale = -2 * (d.in_loc / f.scale + f.sign * cov * curvature)
    in_scale = -3 * d.in_scale / f.scale - 4 * var_e * curvature
    rows = [
        [-curvature, curvature, in_value_scale],
        [curvature, -n.var * curvature, in_loc_scale],
        [in_value_scale, in_loc_scale, in_scale],
    ]
    # The derivative with respect to a bound is plus or minus the density at the bound.
    first: list[Tensor] = []
    for end, sign in ((low, 1.0), (high, -1.0)):
        at_end = _density(constant(end), low, high, terms)
        density = torch.where(d.outside, 0.0, at_end.log_q.exp())
        first.append(sign * density)
        columns = (at_end.in_loc, at_end.in_scale, at_end.in_value)
        in_loc, in_scale, in_end = (torch.where(density > 0, first[-1] * x, 0.0) for x in columns)
        row = [torch.zeros_like(density), in_loc, in_scale]
        row += [first[-1] * x for x in first]
        row[-1] = row[-1] + in_end
        for above, x in zip(rows, row, strict=False):
            above.append(x)
        rows.append(row)
    return rows


class _Density(NamedTuple):
    """The log density at a value, and its derivatives."""

    beyond: Tensor  # the distance of the value from the bounds, positive outside
    log_q: Tensor
    in_value: Tensor
    in_loc: Tensor
    in_scale: Tensor

    @property
    def outside(self) -> Tensor:
        return self.beyond > 0


class _Terms(NamedTuple):
    """The terms of the log density that depend only on the parameters."""

    mode: Tensor
    step: Tensor  # scale, negative where the nearer bound is high
    slope: Tensor  # the slope of e at the mode
    log_total: Tensor  # log of the integral of exp(-e) over x
    mean: Tensor  # the mean of r
    mean_e: Tensor


def _integrated(*parameters: Tensor) -> tuple[Frame, Moments]:
    f = frame(*parameters)
    return f, moments(f)


def _terms(f: Frame, n: Moments) -> _Terms:
    slope, log_total = f.alpha.clamp_min(0), (n.mass * f.scale).log()
    return _Terms(f.mode, f.sign * f.scale, slope, log_total, n.mean, mean_e(n))


def _density(x: Tensor, low: Tensor, high: Tensor, t: _Terms) -> _Density:
    beyond = torch.maximum(low - x, x - high)
    r = (x - t.mode) / t.step
    e = r * (t.slope + 0.5 * r)
    found: tuple[Tensor, ...] = (
        -e - t.log_total,
        -(t.slope + r) / t.step,
        (r - t.mean) / t.step,
        2 * (e - t.mean_e) / t.step.abs(),
    )
    if not (may_look(beyond) and beyond.numel() and bool(beyond.max() <= 0)):
        rest = (-math.inf, 0.0, 0.0, 0.0)
        found = tuple(map(torch.where, (beyond > 0,) * 4, rest, found))
    return _Density(beyond, *found)


def entropy(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The differential entropy in nats. The error is below 1e-12 max(1, abs(value))."""

    def function(f: Frame) -> Value:
        n = moments(f)
        return expectation((n.mass * f.scale).log() + mean_e(n), f, n, n.slope, 1.0)

    return evaluate(function, loc, scale, low, high, lambda v, end, log_q: v + log_q - 1)


def kl_to_uniform(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The KL divergence in nats from the truncated normal to the uniform on [low, high] [1].

    It is never negative, and infinite if a bound is infinite. The relative error is 1e-12, also for
    nearly uniform densities. It equals the KL divergence from the truncated log-normal to the
    truncated log-uniform distribution.
    """

    def function(f: Frame) -> Value:
        n = moments(f)
        value = (f.width / n.mass).log() - mean_e(n)
        near_uniform = _kl_near_uniform if f.precision == torch.float64 else _kl_series
        least = _NEAR_UNIFORM[f.precision]
        if not (may_look(value) and value.numel() and bool(value.min() > least)):
            value = torch.where(value > least, value, near_uniform(f))
        return expectation(value, f, n, -n.slope, -1.0)

    def at_end(value: Tensor, end: Tensor, log_q: Tensor) -> Tensor:
        # KL = log(width) - entropy. The last term is the derivative of log(width) divided by the
        # density. The others are minus `at_end` of the entropy.
        log_width = (high.detach().double() - low.detach()).log()
        return 1 + value - log_width - log_q - torch.exp(-log_q - log_width)

    def by_erf(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Value | None:
        ends = ends_by_erf(loc, scale, low, high)
        return None if ends is None else kl_by_erf(low, high, ends)

    return evaluate(function, loc, scale, low, high, at_end, by_erf)


#: The value of the KL divergence below which its sums would cancel.
_NEAR_UNIFORM = {torch.float64: 0.01, torch.float32: 1e-6}


def _kl_series(f: Frame) -> Tensor:
    """KL divergences below 1e-6, to a relative error of 1e-9.

    On [-1, 1] the exponent is the parabola ``c x + k (x^2 - 1/3)``. If ``cumulant[n]`` are its
    cumulants under the uniform distribution, the KL divergence is the sum of
    ``(-1)^n cumulant[n] (n - 1) / n!`` over n >= 2.
    """
    c, k = 0.25 * f.width * (f.alpha + f.beta), 0.125 * f.width.square()
    c2, k2 = c * c, k * k
    second = c2 / 3 + 4 / 45 * k2
    third = k * (4 / 15 * c2 + 16 / 945 * k2)
    fourth = 32 / 315 * c2 * k2 - 2 / 15 * c2 * c2 - 32 / 4725 * k2 * k2
    return second / 2 - third / 3 + fourth / 8


def _kl_near_uniform(f: Frame) -> Tensor:
    """KL divergences below 0.01, to the last digits of float64.

    Let ``d = mean(e) - e`` under the uniform distribution and ``T(d) = (exp(d) - 1 - d) / d^2``.
    The KL divergence is ``mean(d^2 + d^3 T) / (1 + m) - log(1 + m)`` with ``m = mean(d^2 T)``. All
    terms are of second order, so nothing cancels.
    """
    slope = f.alpha.clamp_min(0)
    first = f.alpha.clamp_min(-4).clamp_max(0)
    half = 0.5 * f.width.clamp_max(8)
    rule = rule_on(NUM_NEAR_UNIFORM_NODES, half.device)
    x = rule.nodes.reshape(-1, *(1,) * half.ndim)
    r = torch.addcmul(first, half, 1 + x)
    weights = 0.5 * rule.rows[0]

    def uniform_mean(x: Tensor) -> Tensor:
        return (weights @ x.reshape(NUM_NEAR_UNIFORM_NODES, slope.numel())).reshape(slope.shape)

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
    """The KL divergence in nats to the truncated normal with the parameters ``*_q``.

    It is infinite where the bounds of the first distribution are not within those of the second.
    The error is below 1e-12 max(1, value) where both have the same bounds, or where the mass of the
    first distribution lies within 1e3 ``scale_q`` of the mode of the second.
    """
    p, q = (loc, scale, low, high), (loc_q, scale_q, low_q, high_q)
    with torch.no_grad():
        value, *derivatives = _kl_between(*p, *q)
        contained = (low >= low_q) & (high <= high_q)

        def at_end(end: Tensor, log_p: Tensor) -> Tensor:
            log_q = _density(end, low_q, high_q, _terms(*_integrated(*q))).log_q
            return torch.where(contained, value + log_q - log_p + 1, 0.0)

        ends = [
            *bound_pairs(*p, at_end),
            *bound_pairs(*q, lambda *_: torch.where(contained, -1.0, 0.0)),
        ]
    inputs = loc, scale, loc_q, scale_q
    return attach(value, *zip(inputs, derivatives, strict=True), *ends)


def _kl_between(*parameters: Tensor) -> tuple[Tensor, ...]:
    """The KL divergence, and its derivatives with respect to loc, scale, loc_q and scale_q."""
    f, n = _integrated(*parameters[:4])
    g, m = _integrated(*parameters[4:])
    _, _, low, high, _, _, low_q, high_q = parameters
    # The exponent of q is a parabola in r of p. These are its slope and its value at the mean of r.
    ratio = g.sign * f.sign * f.scale / g.scale
    r = g.sign * (f.mode - g.mode) / g.scale + ratio * n.mean
    slope = g.alpha.clamp_min(0) + r
    mean_of_e = r * (slope - 0.5 * r) + 0.5 * ratio.square() * n.var
    value = mean_of_e - mean_e(n) + (m.mass * g.scale / (n.mass * f.scale)).log()
    contained = (low >= low_q) & (high <= high_q)
    value = torch.where(contained, value.clamp_min(0), math.inf)
    of_p = expectation(value, f, n, slope * ratio - n.slope, ratio.square() - 1)
    return *of_p, g.sign * (m.mean - r) / g.scale, 2 * (mean_e(m) - mean_of_e) / g.scale


def mean(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The mean of x. The error is below 1e-12 of the larger of abs(mean) and standard deviation."""

    def function(f: Frame) -> Value:
        n = moments(f)
        step = f.sign * f.scale
        return expectation(f.mode + step * n.mean, f, n, step, 0.0)

    return evaluate(function, loc, scale, low, high, lambda v, end, log_q: v - end)


def variance(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The variance of x. The relative error is 1e-12."""

    def function(f: Frame) -> Value:
        n = moments(f)
        square = f.scale.square()
        return expectation(square * n.var, f, n, 0.0, 2 * square)

    def at_end(value: Tensor, end: Tensor, log_q: Tensor) -> Tensor:
        return value - (end - mean(loc, scale, low, high)).square()

    return evaluate(function, loc, scale, low, high, at_end)


class _Rise(NamedTuple):
    """Moments of the variable ``exp(x) / exp(mode) - 1``, with their derivatives."""

    mean: Value
    var: Value
    at_mode: Tensor  # exp(mode)


def _rise(f: Frame) -> _Rise:
    n = integrate(f, step=f.sign * f.scale)
    total, (y1, y2, *_) = n.sums[0][0], n.y

    def value(m0: Tensor, m1: Tensor, m2: Tensor) -> Value:
        """A value and its derivatives, from E[h y^j]: the covariances of h with r and with e."""
        with_y = m1 - m0 * y1
        with_square = m2 - m0 * y2 - 2 * y1 * with_y  # with (y - mean)^2
        with_e = n.half * (n.slope * with_y + 0.5 * n.half * with_square)
        return Value(m0, f.sign * n.half * with_y / f.scale, 2 * with_e / f.scale)

    first, second = ((sums[:3] / total).unbind() for sums in n.sums[1:])
    mean_ = first[0]
    powers: tuple[Tensor | float, ...] = (1.0, y1, y2)
    central = [
        s - 2 * mean_ * m + mean_ * mean_ * x for s, m, x in zip(second, first, powers, strict=True)
    ]
    return _Rise(value(*first), value(*central), f.mode.exp())


def exp_mean(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The mean of ``theta = exp(x)``. For finite bounds, the relative error is 1e-12."""

    def function(f: Frame) -> Value:
        rise = _rise(f)
        value, d_loc, d_scale = (rise.at_mode * x for x in rise.mean)
        return Value(rise.at_mode + value, d_loc, d_scale)

    return evaluate(function, loc, scale, low, high, lambda v, end, log_q: v - end.exp())


def exp_variance(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The variance of ``theta = exp(x)``. For finite bounds, the relative error is 1e-12."""

    def function(f: Frame) -> Value:
        rise = _rise(f)
        return Value(*(rise.at_mode.square() * x for x in rise.var))

    def at_end(value: Tensor, end: Tensor, log_q: Tensor) -> Tensor:
        return value - (end.exp() - exp_mean(loc, scale, low, high)).square()

    return evaluate(function, loc, scale, low, high, at_end)


def exp_snr(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The signal-to-noise ratio ``E[theta] / sd[theta]`` of ``theta = exp(x)`` [1].

    For finite bounds, the relative error is 1e-12. The factor exp(mode) cancels, so that nothing
    underflows.
    """

    def function(f: Frame) -> Value:
        mean_, var, _ = _rise(f)
        snr = (1 + mean_.value) * var.value.rsqrt()
        # The derivatives of the log of the ratio follow from those of log E and log Var.
        in_mean, in_var = snr / (1 + mean_.value), -0.5 * snr / var.value
        d_loc = in_mean * mean_.d_loc + in_var * var.d_loc
        return Value(snr, d_loc, in_mean * mean_.d_scale + in_var * var.d_scale)

    def at_end(value: Tensor, end: Tensor, log_q: Tensor) -> Tensor:
        # With t = exp(end) / E, the relative change of E is 1 - t, of Var 1 - (snr (t - 1))^2.
        below = 1 - end.exp() / exp_mean(loc, scale, low, high)
        return value * (below - 0.5 * (1 - (value * below).square()))

    return evaluate(function, loc, scale, low, high, at_end)
