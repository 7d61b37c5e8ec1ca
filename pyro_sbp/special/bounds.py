"""Derivatives in the bounds of the truncated normal, which are computed only where asked for.

A bound that moves outwards adds its density of probability there. An expectation ``E[h]`` then
changes by ``h(bound) - E[h]`` times the density.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_sbp.special.blocks import in_blocks
from pyro_sbp.special.derivatives import attach, constant, is_tracked
from pyro_sbp.special.frame import Frame, Value, frame, moments

__all__ = ["bound_pairs", "evaluate"]


def bound_pairs(
    loc: Tensor,
    scale: Tensor,
    low: Tensor,
    high: Tensor,
    at_end: Callable[[Tensor, Tensor], Tensor],
) -> list[tuple[Tensor, Tensor]]:
    """Pairs for `attach` of low and high; none if neither asks for a gradient.

    ``at_end(bound, log density there)`` is ``E[h] - h(bound)``, or minus what else the logarithm
    of the normaliser is multiplied with.
    """
    if not (is_tracked(low) or is_tracked(high)):
        return []
    pairs = []
    f = frame(loc, scale, low, high)
    log_mass = (moments(f).mass * f.scale).log()
    near_low = f.sign > 0
    for bound, sign in ((low, 1.0), (high, -1.0)):
        far = torch.where(f.alpha > 0, f.width, f.beta)
        r = torch.where(near_low == (sign > 0), f.alpha.clamp_max(0), far)
        end, log_q = constant(bound), -r * (f.alpha.clamp_min(0) + 0.5 * r) - log_mass
        derivative = sign * log_q.exp() * at_end(end, log_q)
        pairs.append((bound, torch.where(end.isinf(), 0.0, derivative)))
    return pairs


def evaluate(
    function: Callable[[Frame], Value],
    loc: Tensor,
    scale: Tensor,
    low: Tensor,
    high: Tensor,
    at_end: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """``function`` of the parameters with its gradient; `at_end` takes its value first."""
    with torch.no_grad():
        v = Value(*in_blocks(lambda *p: function(frame(*p)), loc, scale, low, high))
        ends = bound_pairs(
            loc, scale, low, high, lambda end, log_q: at_end(v.value, end, log_q).detach()
        )
    return attach(v.value, (loc, v.d_loc), (scale, v.d_scale), *ends)
