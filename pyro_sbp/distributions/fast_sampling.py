"""Samples of a truncated normal for float32: one draw per example and unit at a bearable cost.

erfcx and ndtri, on which `pyro_sbp.special.icdf` rests, are not vectorised on a CPU and cost 15
times what erfinv does. Here loc decides, per unit and not per draw: up to 2.5 scales outside of
the nearer end a draw is an erfinv in float64, exact enough because float32 probabilities keep
2^-25 from zero and one; further out it is one Halley step on the hazard with a rational function.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sbp.special.blocks import BLOCK, in_blocks
from pyro_sbp.special.derivatives import (
    attach,
    common_shape,
    constant,
    may_look,
    without_copies,
)
from pyro_sbp.special.frame import frame
from pyro_sbp.special.quantiles import quantile_pairs

__all__ = ["exp_quantile", "quantile", "uniform"]

_FAR = 2.5
_SQRT_HALF = math.sqrt(0.5)
# exp() of less is slow on CPUs, and so is erfc() beyond: next to nothing takes very long.
_MOST_DROP = 700.0
_MOST = 37.0
# z times the mean excess of a standard normal over z, as P / Q in 1 / z^2, highest power first:
# least maximum error 4e-8 on z >= 2.4, fitted to mpmath.
_P = (15.923883281456086, 47.735189881337767, 15.414943619555744, 0.99999996037288297)
_Q = (60.367223908803125, 72.572763920003203, 17.414899809758346, 1.0)


def uniform(shape: torch.Size, device: torch.device) -> Tensor:
    """Float64 uniforms that keep 2^-25 from zero and one, as `quantile` wants them."""
    u = torch.rand(shape, dtype=torch.float32, device=device).double()
    return u.clamp_max_(1 - 2.0**-24).add_(2.0**-25)


def quantile(u: Tensor, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`pyro_sbp.special.icdf` to the accuracy of float32, at a fraction of the cost.

    Args:
        u: float64 probabilities in [2^-25, 1 - 2^-25]; broadcasts against the parameters.
        loc, scale, low, high: as there.

    Returns:
        Float64, within the bounds; absolute error under 1e-6 for loc in [-25, 5], log scale in
        [-10, 5] and bounds (-20, 0). Gradients in `loc` and `scale` are right to 1e-6 of their
        mean over `u`.
    """
    parameters = loc, scale, low, high
    with torch.no_grad():
        x, d_loc, d_scale = _draws(u, *parameters)
        ends = quantile_pairs(x, u, 1 - u, *parameters)
    return attach(x, (loc, d_loc), (scale, d_scale), *ends)


def exp_quantile(u: Tensor, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``exp(quantile(...))`` in float32, within the exponentials of the bounds."""
    parameters = loc, scale, low, high
    with torch.no_grad():
        x, d_loc, d_scale = _draws(u, *parameters)
        ends = quantile_pairs(x, u, 1 - u, *parameters)
        # exp rounds differently in vectors than alone, so that it may miss a bound by the last bit.
        least, most = (constant(without_copies(bound)).exp() for bound in (low, high))
        theta = torch.clamp(x.exp(), least, most)
        pairs = [(y, (theta * d).float()) for y, d in ((loc, d_loc), (scale, d_scale), *ends)]
    return attach(theta.float(), *pairs)


def _draws(u: Tensor, *parameters: Tensor) -> list[Tensor]:
    """The draws, and their derivatives in loc and in scale."""
    shape = common_shape(*parameters)
    if u.shape == shape:
        return in_blocks(lambda u, *p: _draw(u, _terms(*p)), u, *parameters)
    terms = _terms(*parameters)
    if not may_look(terms.low) or u.shape[u.ndim - len(shape) :] != shape:
        return list(_draw(u, terms))
    # Several draws: as many at a time as stay in the cache.
    rows = u.reshape(-1, *shape).split(max(1, BLOCK // max(1, shape.numel())))
    found = [_draw(block, terms) for block in rows]
    return [torch.cat(parts).view(u.shape) for parts in zip(*found, strict=True)]


class _Near(NamedTuple):
    """What a draw by erfinv needs of the parameters alone.

    At the lower end: erf, the density and the density times z, with z in scales from loc; and
    what they are more at the upper end.
    """

    mass: Tensor
    mass_rise: Tensor
    density: Tensor
    density_rise: Tensor
    moment: Tensor
    moment_rise: Tensor


class _Far(NamedTuple):
    """What a draw by the hazard needs of the parameters alone, see `special.icdf`."""

    mode: Tensor  # the near end, where far
    step: Tensor  # scale, negative if the near end is high
    sign: Tensor
    rho: Tensor
    one_minus_rho: Tensor
    alpha: Tensor
    hazard: Tensor
    excess: Tensor
    shift_loc: Tensor
    shift_scale: Tensor


class _Terms(NamedTuple):
    """What a draw needs of the parameters alone."""

    loc: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor
    far: Tensor  # which elements are
    of_near: _Near
    of_far: _Far | None  # None if none is


def _terms(*parameters: Tensor) -> _Terms:
    loc, scale, low, high = (constant(without_copies(x)) for x in parameters)
    ends = torch.stack(torch.broadcast_tensors((low - loc) / scale, (high - loc) / scale))
    far = (ends[0] > _FAR) | (ends[1] < -_FAR)
    ends = ends.clamp(-_MOST, _MOST)  # not in place, for which vmap has no rule
    scaled = ends.mul(_SQRT_HALF)
    density = scaled.square().neg_().exp_()
    of_near = (_with_rise(x) for x in (scaled.erf_(), density, ends.mul_(density)))
    near = _Near(*(x for pair in of_near for x in pair))
    is_near = may_look(far) and not far.any()
    of_far = None if is_near else _terms_of_far(*parameters)
    return _Terms(loc, scale, low, high, far, near, of_far)


def _with_rise(ends: Tensor) -> tuple[Tensor, Tensor]:
    below, above = ends.unbind()
    return below, above - below


def _terms_of_far(*parameters: Tensor) -> _Far:
    f = frame(*parameters)
    alpha, width = f.alpha.clamp_min(_FAR), f.width.clamp_max(1e10)  # so that 0 times it is 0
    excess, excess_beta = _excess(alpha), _excess(alpha + width)
    hazard, hazard_beta = alpha + excess, alpha + width + excess_beta
    drop = (width * (alpha + 0.5 * width)).clamp_max(_MOST_DROP)
    rho = torch.exp(-drop) * hazard / hazard_beta
    single = (alpha, hazard, excess, width + excess_beta - excess, width * hazard_beta)
    step = f.sign * f.scale
    return _Far(f.mode, step, f.sign, rho, 1 - rho, *(x.float() for x in single))


def _draw(u: Tensor, t: _Terms) -> tuple[Tensor, Tensor, Tensor]:
    """The draw, and its derivatives in loc and in scale."""
    n = t.of_near
    z = torch.addcmul(n.mass, n.mass_rise, u).erfinv_()
    inverse_density = z.square().exp_()
    z.mul_(math.sqrt(2))
    d_loc = torch.addcmul(n.density, n.density_rise, u).mul_(inverse_density).neg_().add_(1)
    d_scale = z - torch.addcmul(n.moment, n.moment_rise, u).mul_(inverse_density)
    x = torch.addcmul(t.loc, t.scale, z)
    if t.of_far is not None:
        near = (x, d_loc, d_scale)
        x, d_loc, d_scale = map(torch.where, (t.far,) * 3, _draw_far(u, t.of_far), near)
    return torch.clamp(x, t.low, t.high), d_loc, d_scale


def _draw_far(u: Tensor, t: _Far) -> tuple[Tensor, Tensor, Tensor]:
    # Probability of being further from the near end: 1 - u or u.
    q = torch.addcmul(0.5 + 0.5 * t.sign, -t.sign, u)
    # Steps s from the near end, see special.icdf; only the mass needs float64.
    survival = torch.addcmul(t.rho, t.one_minus_rho, q)
    share, target = (1 - q).mul_(t.rho).div_(survival).float(), survival.log_().neg_().float()
    s = torch.addcmul(t.hazard.square(), 2 * t.hazard * t.excess, target).sqrt_().add_(t.hazard)
    s = target.mul(2).div_(s)
    k = _excess(t.alpha + s)
    h = t.alpha + s + k
    step = (s * (t.alpha + 0.5 * s) + (h / t.hazard).log_() - target).div_(h)
    s.sub_(step.div_(1 - 0.5 * step * k)).clamp_min_(0)
    k = _excess(t.alpha + s)
    h = t.alpha + s + k
    d_loc = (s + k - t.excess - share * t.shift_loc) / h
    d_scale = s + t.alpha * d_loc - share * t.shift_scale / h
    return torch.addcmul(t.mode, t.step, s.double()), d_loc.double(), t.sign * d_scale.double()


def _excess(z: Tensor) -> Tensor:
    """Mean of a standard normal above ``z`` less ``z``, for ``z >= 2.4``."""
    v = 1 / (z * z)
    p = v * _P[0] + _P[1]
    q = v * _Q[0] + _Q[1]
    for i in (2, 3):
        p.mul_(v).add_(_P[i])
        q.mul_(v).add_(_Q[i])
    return p.div_(q).div_(z)
