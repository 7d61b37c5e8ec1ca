"""Shrink networks, and compare the result with the masked network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sbp.gates.calling import call, evaluating
from pyro_sbp.gates.copies import copy_network, fresh, to_precision
from pyro_sbp.gates.decisions import Decisions
from pyro_sbp.gates.gate import Gate
from pyro_sbp.gates.gated_network import GatedNetwork
from pyro_sbp.gates.hooks import drop_broken_hooks, without_idle_hooks
from pyro_sbp.gates.nested import convert, tensors_of
from pyro_sbp.gates.state import undone
from pyro_sbp.gates.steady import repeatable
from pyro_sbp.gates.surgery import (
    EXACT,
    cut,
    relative_difference,
    shrink_in_place,
    surviving_units,
)
from pyro_sbp.gates.units import Units

__all__ = ["Equivalence", "EquivalenceError", "checked_shrink"]


class EquivalenceError(RuntimeError):
    """A pruned network does not compute the same function as the masked network."""


@dataclass(frozen=True)
class Equivalence:
    """The difference between a pruned network and the masked network.

    Attributes:
        max_rel_diff_float64: the `relative_difference` of their outputs in float64.
        max_abs_diff: the largest absolute difference of their outputs in the network's own
            precision.
    """

    max_rel_diff_float64: float
    max_abs_diff: float


def checked_shrink(
    net: nn.Module,
    gates: Sequence[Gate],
    theta: Mapping[str, Tensor],
    example_input: Any,
    units: Mapping[str, Units] | None = None,
    reference: Mapping[str, Tensor] | None = None,
) -> tuple[nn.Module, Equivalence]:
    """Shrink a network, and compare the result with the masked network.

    The masked network multiplies activations by theta, so the comparison does not rely on the
    folding of theta into weights. The network is shrunk in float64, and the outputs are compared in
    float64. The returned network has the weights that were compared, in its own precision.

    Args:
        net, gates, theta, example_input, units: as for `shrink`.
        reference: the theta of the masked network, if it differs from `theta`. It is empty if no
            layer reads the units that theta removes.

    Returns:
        The smaller network, and its difference from the masked one.

    Raises:
        EquivalenceError: the `relative_difference` of their outputs in float64 is more than 1e-10.
    """
    reference = theta if reference is None else reference
    # Make the copies one after the other, to need less memory.
    with torch.no_grad():
        net_eval = copy_network(without_idle_hooks(net, example_input)).eval()
        own = torch.get_default_dtype()
        # Both networks break ties in the same way, because ties are not a difference of the units.
        decisions = Decisions()
        with undone(net_eval), repeatable(own):
            masked = _masked(net_eval, gates, reference, fresh(example_input))
        exact = to_precision(net_eval, torch.float64)
        theta64 = convert(dict(theta), torch.float64)
        with undone(exact), repeatable(torch.float64), decisions.recorded():
            reference64 = convert(dict(reference), torch.float64)
            masked64 = _masked(exact, gates, reference64, convert(example_input, torch.float64))
        shrink_in_place(exact, gates, theta64, units)
        with undone(exact), repeatable(torch.float64), decisions.repeated():
            relative = relative_difference(
                masked64, call(exact, convert(example_input, torch.float64))
            )
    state = exact.state_dict()
    del exact, net_eval
    small = copy_network(net)
    cut(small, gates, surviving_units(gates, theta) if units is None else units)
    small.load_state_dict(state)
    del state
    drop_broken_hooks(small, example_input)
    with torch.no_grad(), undone(small), evaluating(small), repeatable(own):
        pruned = call(small, fresh(example_input))
    pairs = zip(tensors_of(masked), tensors_of(pruned), strict=True)
    absolute = max(_largest_difference(a, b) for a, b in pairs)
    if not relative <= EXACT:
        raise EquivalenceError(
            f"the pruned network differs from the masked one by {relative:.1e} in float64, "
            f"relative to the size of the outputs; at most {EXACT:.0e} is allowed"
        )
    return small, Equivalence(relative, absolute)


def _masked(net: nn.Module, gates: Sequence[Gate], theta: Mapping[str, Tensor], x: Any) -> Any:
    """The output with activations multiplied by theta. Theta is expanded to all examples, because a
    single theta would be folded into weights.
    """
    return GatedNetwork(net, gates)(x, {name: value[None] for name, value in theta.items()})


def _largest_difference(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference of two tensors; NaN counts as 0."""
    wide = torch.complex128 if a.is_complex() else torch.float64
    differences = (a.to(wide) - b.to(wide)).abs().nan_to_num()
    return float(differences.max()) if differences.numel() else 0.0
