"""The truncated normal by erf, for float32 parameters with loc inside or near the bounds.

Where loc is inside the bounds, or outside by at most three scales, and the interval is wider than
one scale, differences of erf in float64 are more accurate than float32. The frame of the nearer
bound, its quadrature and the selection by region are then not needed, and a value and its
derivatives take about thirty elementwise operations.

Lengths are in units of ``sqrt(2) scale``, the argument of erf. For bounds ``a < b`` in these units
let ``d(u) = 2 / sqrt(pi) exp(-u^2)``, the derivative of erf, ``E = erf(b) - erf(a)`` and
``M[k] = (a^k d(a) - b^k d(b)) / E``. The moments of the density are polynomials in the M[k]:
``E[u] = M0 / 2``, ``2 E[u^2] = 1 + M1``, ``4 E[u^3] = 2 (M0 + M2)`` and
``4 E[u^4] = 3 (1 + M1) + 2 M3``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sbp.special.derivatives import constant, may_look, without_copies
from pyro_sbp.special.frame import MOST_SCALES, OUTSIDE, SQRT_HALF, WIDE, Value

__all__ = ["Ends", "density_by_erf", "ends_by_erf", "kl_by_erf", "scaled_ends"]


_LOG_TWO_OVER_ROOT_PI = torch.tensor(
    math.log(2 / math.sqrt(math.pi)), dtype=torch.float64, device="cpu"
)


class Ends(NamedTuple):
    """The bounds in units of ``sqrt(2) scale``, and the normaliser.

    `density_by_erf` and `kl_by_erf` overwrite them, because new memory is slower than memory that
    is in the cache.
    """

    loc: Tensor
    per_unit: Tensor  # 1 / (sqrt(2) scale)
    at: Tensor  # the distances of the lower and the upper bound from loc, [2, ...]
    slope: Tensor  # the derivative of erf there
    mass: Tensor  # the rise of erf between them


def scaled_ends(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """``1 / (sqrt(2) scale)``, and the distances of the bounds from loc in these units, [2, ...].

    The arguments are float64. The results broadcast against each other and against values.
    """
    per_unit = scale.new_full((), SQRT_HALF) / scale
    if low.numel() == high.numel() == 1:
        bounds = torch.stack([low.reshape(()), high.reshape(())])
    else:
        bounds = torch.stack(torch.broadcast_tensors(low, high))
    num_dims = max(loc.ndim, scale.ndim)
    shape = bounds.shape[1:]
    bounds = bounds.view(2, *(1,) * (num_dims - len(shape)), *shape)
    at = bounds - loc
    in_place = may_look(at) and may_look(per_unit) and at.shape[1:] == per_unit.shape
    return per_unit, at.mul_(per_unit) if in_place else at * per_unit


def ends_by_erf(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Ends | None:
    """The terms of erf, or None if it is not accurate for every element."""
    tensors = loc, scale, low, high
    if torch.float64 in (loc.dtype, scale.dtype) or not all(map(may_look, tensors)):
        return None
    loc, scale, low, high = (constant(without_copies(x)) for x in tensors)
    if not loc.numel() or not scale.numel():
        return None
    per_unit, at = scaled_ends(loc, scale, low, high)
    # Extreme values are found several times faster than elements of a mask are counted.
    limit = OUTSIDE * SQRT_HALF
    if not (float(at[0].max()) < limit and float(at[1].min()) > -limit):
        return None
    if not float(per_unit.min() * (high - low).min()) > WIDE * SQRT_HALF:
        return None
    # Further from loc there is no mass in float64, and subnormal numbers are slow.
    at.clamp_(-MOST_SCALES * SQRT_HALF, MOST_SCALES * SQRT_HALF)
    below, above = at.erf()
    slope = torch.addcmul(_LOG_TWO_OVER_ROOT_PI, at, at, value=-1).exp_()
    return Ends(loc, per_unit, at, slope, above.sub_(below))


def density_by_erf(x: Tensor, ends: Ends) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The log density at ``x`` within the bounds, and its derivatives in ``x``, loc and scale."""
    # The density is d(u) / (sqrt(2) scale E).
    per_mass = ends.per_unit / ends.mass
    first = ends.at.mul_(ends.slope)
    rise_of_first, rise = first[1].sub_(first[0]), ends.slope[1].sub_(ends.slope[0])
    u = x - ends.loc
    u = u.mul_(ends.per_unit) if u.shape == ends.per_unit.shape else u * ends.per_unit
    v = u * ends.per_unit
    in_loc = torch.add(rise.mul_(per_mass), v, alpha=2)
    in_scale = rise_of_first.mul_(per_mass).sub_(ends.per_unit)
    in_scale = torch.addcmul(in_scale, u, v, value=2).mul_(math.sqrt(2))
    log_q = per_mass.log_() - torch.addcmul(-_LOG_TWO_OVER_ROOT_PI, u, u)
    return log_q, v.mul_(-2), in_loc, in_scale


def kl_by_erf(low: Tensor, high: Tensor, ends: Ends) -> Value:
    """The KL divergence to the uniform distribution on the bounds, as `kl_to_uniform`."""
    # It is log((high - low) / (sqrt(2) scale) / E) + log(2 / sqrt(pi)) - E[u^2].
    powers = ends.slope.div_(ends.mass)
    moments = [powers[0] - powers[1]]
    for _ in range(3):
        powers.mul_(ends.at)
        moments.append(powers[0] - powers[1])
    m0, m1, m2, m3 = moments
    width = constant(high) - constant(low)
    value = (ends.per_unit * (width * (2 / math.sqrt(math.pi))) / ends.mass).log_()
    value.sub_(m1, alpha=0.5).sub_(0.5)
    # The derivatives are -Cov(u^2, u) and -Var(u^2) in units of scale.
    rest = 1 - m1
    in_loc = m2.addcmul_(m0, rest, value=0.5).mul_(ends.per_unit).neg_()
    in_scale = m3.add_(1).addcmul_(m1, rest, value=0.5).mul_(ends.per_unit).mul_(-math.sqrt(2))
    return Value(value, in_loc, in_scale)
