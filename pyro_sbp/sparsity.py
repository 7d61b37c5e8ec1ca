"""Which units a network of sparse weights still needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pyro_sbp.gates import Gate
from pyro_sbp.layers import most_of_columns, rows_of
from pyro_sbp.surgery import surviving_units

__all__ = ["needed_units", "unit_scores"]


def needed_units(
    net: nn.Module, gates: Sequence[Gate], masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The units of every gate that some weight reads, to a fixed point.

    A unit whose columns are empty is read by nobody: to remove it changes nothing. The rows that
    made it go with it, and with them the last readers of other units.

    Args:
        net: the network.
        gates: its gates, from `find_gates`.
        masks: from layer to a bool tensor of its weight's shape, False where the weight is zero; a
            layer that is not named has none that is.

    Returns:
        From gate name to a float tensor ``[units]``, the theta for `shrink`: 1 for a unit that is
        needed, 0 for another.
    """
    masks = {name: mask.cpu() for name, mask in masks.items()}
    theta = {gate.name: torch.ones(gate.size) for gate in gates}
    while True:
        new = {}
        for gate in gates:
            read = torch.zeros(gate.size, dtype=torch.bool)
            for span in gate.readers:
                columns = torch.ones_like(span.units, dtype=torch.bool)
                if span.layer in masks:
                    columns = most_of_columns(net.get_submodule(span.layer), masks[span.layer])
                read[span.units[columns & (span.units >= 0)]] = True
            new[gate.name] = theta[gate.name] * read
        units = surviving_units(gates, new)
        new = {name: unit.kept.to(torch.float32) for name, unit in units.items()}
        if all(torch.equal(new[name], theta[name]) for name in theta):
            return theta
        theta = new
        for gate in gates:
            # What writes a unit that is gone is gone.
            for span in gate.writers:
                if span.layer in masks:
                    alive = theta[gate.name][span.units.clamp(min=0)].bool() | (span.units < 0)
                    rows = rows_of(net.get_submodule(span.layer), alive)
                    masks[span.layer] = masks[span.layer] & rows


def unit_scores(
    net: nn.Module, gates: Sequence[Gate], scores: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The best score of the weights that read a unit, by gate ``[units]``; layers that are not
    named have none."""
    found = {}
    for gate in gates:
        best = torch.zeros(gate.size)
        for span in gate.readers:
            if span.layer in scores:
                columns = most_of_columns(net.get_submodule(span.layer), scores[span.layer]).cpu()
                there = span.units >= 0
                best = best.scatter_reduce(0, span.units[there], columns[there].float(), "amax")
        found[gate.name] = best
    return found
