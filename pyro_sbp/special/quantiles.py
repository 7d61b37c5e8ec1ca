"""Cumulative distribution function and quantiles of the truncated normal, with gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sbp.special.bounds import bound_pairs
from pyro_sbp.special.derivatives import attach, constant, is_tracked
from pyro_sbp.special.frame import (
    NARROW,
    NARROW_NODES,
    SQRT_HALF,
    Frame,
    frame,
    mills,
    mills_slope,
)
from pyro_sbp.special.integrals import log_density

__all__ = ["cdf", "icdf", "quantile_pairs"]


class _Tails(NamedTuple):
    """The terms of the distribution function and its inverse that depend only on the parameters.

    The near end is the bound nearer to loc, the far end the other bound.
    """

    inside: Tensor  # bool: loc is inside by more than one scale; erfc and ndtri from loc
    narrow: Tensor  # bool: the density is nearly uniform; quadrature from the near end
    alpha: Tensor  # the near end where not inside, else an arbitrary number
    hazard: Tensor  # 1 / R(alpha) at the near end, and the same at the far end
    hazard_beta: Tensor
    excess: Tensor  # the mean excess over the near end, and over the far end
    excess_beta: Tensor
    rho: Tensor  # the tail mass beyond the far end divided by that beyond the near end
    one_minus_rho: Tensor
    whole: tuple[Tensor, Tensor, Tensor]  # where narrow, the partial moments at the far end
    lower: Tensor  # Phi(alpha) and 1 - Phi(beta), where inside
    upper: Tensor
    inner: Tensor  # alpha where inside, else an arbitrary number


def _partial_moments(alpha: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Integrals of ``t^k exp(-(alpha t + t^2 / 2))`` over [0, s] for k = 0, 1, 2, for small s."""
    total = first = second = torch.zeros_like(s)
    for node, weight in NARROW_NODES:
        t = 0.5 * (1 + node) * s
        mass = torch.exp(-t * (alpha + 0.5 * t)) * (0.5 * weight)
        total, first, second = total + mass, first + mass * t, second + mass * t * t
    return s * total, s * first, s * second


def _tails(f: Frame) -> _Tails:
    inside = f.alpha < -1
    alpha = torch.where(inside, 0.0, f.alpha)
    drop = f.width * (alpha + 0.5 * f.width)
    narrow = ~inside & (f.width < NARROW) & (drop < NARROW)
    whole = _partial_moments(alpha, torch.where(narrow, f.width, 0.0))
    beta = alpha + f.width
    ratio, ratio_beta = mills(alpha), mills(beta)
    rho = torch.exp(-drop) * ratio_beta / ratio
    inner = torch.where(inside, f.alpha, -2.0)
    return _Tails(
        inside,
        narrow,
        alpha,
        1 / ratio,
        1 / ratio_beta,
        mills_slope(alpha, ratio) / ratio,
        mills_slope(beta, ratio_beta) / ratio_beta,
        rho,
        torch.where(narrow, whole[0] / ratio, 1 - rho),
        whole,
        0.5 * torch.erfc(-inner * SQRT_HALF),
        0.5 * torch.erfc(f.beta.clamp_min(-1) * SQRT_HALF),
        inner,
    )


def _survival(t: _Tails, p: Tensor, q: Tensor) -> Tensor:
    """The tail mass beyond the quantile divided by that beyond the near end. Nothing cancels."""
    return torch.where(p < 0.5, 1 - p * t.one_minus_rho, t.rho + q * t.one_minus_rho)


def _inverse(f: Frame, t: _Tails, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """The quantile at probability p = 1 - q from the near end.

    Returns:
        The quantile as ``z``, the distance from loc (where inside), and as ``s``, the distance from
        the near end (elsewhere), both in units of scale. For ``s``, three Halley steps solve
        ``s (alpha + s / 2) - log(R(alpha + s) / R(alpha)) = target``. The left side is the integral
        of the hazard and has the derivative 1 / R.
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
        ratio = mills(t.alpha + s)
        step = (s * (t.alpha + 0.5 * s) - (ratio * t.hazard).log() - target) * ratio
        s = s - step / (1 - 0.5 * step * (1 / ratio - t.alpha - s))
        s = torch.minimum(s.clamp_min(0), f.width)
    # Where narrow, s still has the absolute error of the logarithm. A Newton step on the mass
    # corrects it.
    mass = _partial_moments(t.alpha, torch.where(t.narrow, s, 0.0))[0]
    step = (mass - p * t.whole[0]) * torch.exp(s * (t.alpha + 0.5 * s))
    s = torch.minimum(torch.where(t.narrow, s - step, s).clamp_min(0), f.width)
    s = torch.where(p == 0, 0.0, torch.where(q == 0, f.width, s))
    return z, s


def _derivatives(
    f: Frame, t: _Tails, p: Tensor, q: Tensor, z: Tensor, s: Tensor
) -> tuple[Tensor, Tensor]:
    """Derivatives of the quantile at fixed probability with respect to loc and scale [2]."""
    # Inside: the textbook formula, in ratios of densities.
    near = torch.where(q > 0, q * torch.exp(0.5 * (z - t.inner) * (z + t.inner)), 0.0)
    far = torch.where(p > 0, p * torch.exp(-0.5 * (f.beta - z) * (f.beta + z)), 0.0)
    inner_loc = 1 - near - far
    inner_scale = (
        z - torch.where(near > 0, t.inner * near, 0.0) - torch.where(far > 0, f.beta * far, 0.0)
    )
    # Outside: differences of the hazard 1 / R(x) = x + excess(x), in which x cancels exactly.
    ratio = mills(t.alpha + s)
    excess = mills_slope(t.alpha + s, ratio) / ratio
    share = torch.where(t.rho > 0, p * t.rho / _survival(t, p, q), 0.0)
    through = torch.where(share > 0, share * (f.width + t.excess_beta - t.excess), 0.0)
    outer_loc = ratio * (s + excess - t.excess - through)
    through = torch.where(share > 0, share * f.width * ratio * t.hazard_beta, 0.0)
    outer_scale = s + t.alpha * outer_loc - through
    # Narrow: -(dF / dparameter) / density. The score of log scale is 2 alpha t + t^2.
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
    """The quantile function of x. For uniform ``u`` it gives reparameterized samples.

    Args:
        u: probabilities in [0, 1]; broadcasts against the parameters.
        loc, scale, low, high: the parameters.
        complement: ``1 - u``, if it is known more accurately than by subtraction.

    Returns:
        Float64, within the bounds, with an absolute error of 1e-11. The gradients with respect to
        ``loc`` and ``scale`` at fixed ``u`` are those of [2]. The gradient with respect to ``u`` is
        the reciprocal of the density.
    """
    with torch.no_grad():
        f = frame(loc, scale, low, high)
        u64 = constant(u)
        v64 = 1 - u64 if complement is None else constant(complement)
        from_low = f.sign > 0
        p, q = torch.where(from_low, u64, v64), torch.where(from_low, v64, u64)
        t = _tails(f)
        z, s = _inverse(f, t, p, q)
        step = f.sign * f.scale
        end = torch.where(from_low, constant(low), constant(high))
        x = torch.where(t.inside, f.loc + step * z, end + step * s)
        x = torch.minimum(torch.maximum(x, constant(low)), constant(high))
        d_loc, d_scale = _derivatives(f, t, p, q, z, s)
        pairs = [(loc, d_loc), (scale, d_scale)]
        if is_tracked(u):
            pairs.append((u, (-log_density(x, loc, scale, low, high)).exp().detach()))
        pairs += quantile_pairs(x, u64, v64, loc, scale, low, high)
    return attach(x, *pairs)


def quantile_pairs(
    x: Tensor, u: Tensor, v: Tensor, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Pairs for `attach`, for the bounds that require a gradient of the quantile x at u = 1 - v."""
    if not (is_tracked(low) or is_tracked(high)):
        return []
    log_q = log_density(x, constant(loc), constant(scale), constant(low), constant(high))
    pairs = bound_pairs(loc, scale, low, high, lambda *_: torch.exp(-log_q))
    # `high` has the opposite sign: quantiles increase when the upper bound increases.
    return [(y, d * v if y is low else -d * u) for y, d in pairs]


def cdf(value: Tensor, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The cumulative distribution function of x at ``value``: 0 below the bounds and 1 above.

    ``value`` broadcasts against the parameters. The absolute error is 1e-14.
    """
    with torch.no_grad():
        f = frame(loc, scale, low, high)
        t = _tails(f)
        x = torch.minimum(torch.maximum(constant(value), constant(low)), constant(high))
        z = f.sign * (x - f.loc) / f.scale
        s = f.sign * (x - torch.where(f.sign > 0, constant(low), constant(high))) / f.scale
        s = torch.where(t.inside, 0.0, s).clamp_min(0)
        # Compute both tails, so that a small one is not computed as 1 minus the other.
        ratio = torch.exp(-s * (t.alpha + 0.5 * s)) * mills(t.alpha + s) * t.hazard
        outer_q = (ratio - t.rho) / t.one_minus_rho
        drop = s * (t.alpha + 0.5 * s) - (mills(t.alpha + s) * t.hazard).log()
        outer_p = -torch.expm1(-drop) / t.one_minus_rho
        share = _partial_moments(t.alpha, torch.where(t.narrow, s, 0.0))[0] / t.whole[0]
        outer_p = torch.where(t.narrow, share, outer_p)
        outer_q = torch.where(t.narrow, 1 - share, outer_q)
        mass = 1 - t.lower - t.upper
        inner_p = (0.5 * torch.erfc(-z * SQRT_HALF) - t.lower) / mass
        inner_q = (0.5 * torch.erfc(z * SQRT_HALF) - t.upper) / mass
        p = torch.where(t.inside, inner_p, outer_p).clamp(0, 1)
        q = torch.where(t.inside, inner_q, outer_q).clamp(0, 1)
        p = torch.where(p < 0.5, p, 1 - q)
        q = torch.where(p < 0.5, 1 - p, q)
        d_loc, d_scale = _derivatives(f, t, p, q, z, s)
        density = torch.exp(log_density(value, loc, scale, low, high)).detach()
        cdf_ = torch.where(f.sign > 0, p, q)
        cdf_ = torch.where(x <= low, 0.0, torch.where(x >= high, 1.0, cdf_))
        ends = bound_pairs(loc, scale, low, high, lambda *_: torch.ones_like(cdf_))
        inside = (x > low) & (x < high)
        above = torch.where(f.sign > 0, q, p)
        ends = [
            (end, torch.where(inside, -d * above if end is low else d * (1 - above), 0.0))
            for end, d in ends
        ]
    pairs = (value, density), (loc, -density * d_loc), (scale, -density * d_scale)
    return attach(cdf_, *pairs, *ends)
