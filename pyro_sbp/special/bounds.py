"""Derivatives with respect to the bounds of the truncated normal, computed only if required.

If a bound moves outwards, probability is added at the bound, in proportion to the density there.
The derivative of an expectation ``E[h]`` is therefore ``h(bound) - E[h]`` times the density.
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
    """Pairs (input, derivative) for `attach`, for the bounds that require a gradient.

    Args:
        loc, scale, low, high: the parameters.
        at_end: from a bound and the log density there to ``E[h] - h(bound)``. For a function that
            is not an expectation, it is the derivative with respect to the bound divided by the
            density there, with the opposite sign for ``high``.
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
    by_erf: Callable[..., Value | None] | None = None,
) -> Tensor:
    """The value of ``function`` with its gradient.

    Args:
        function: from the frame to the value and its derivatives. With `by_erf`, it is used only
            if that returns None.
        loc, scale, low, high: the parameters.
        at_end: as for `bound_pairs`, with the value as first argument.
        by_erf: from the parameters to the value and its derivatives.
    """

    def value_of(*parameters: Tensor) -> Value:
        found = by_erf(*parameters) if by_erf is not None else None
        return function(frame(*parameters)) if found is None else found

    with torch.no_grad():
        v = Value(*in_blocks(value_of, loc, scale, low, high))
        ends = bound_pairs(
            loc, scale, low, high, lambda end, log_q: at_end(v.value, end, log_q).detach()
        )
    return attach(v.value, (loc, v.d_loc), (scale, v.d_scale), *ends)
