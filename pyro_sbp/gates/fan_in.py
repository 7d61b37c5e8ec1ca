"""Layers that multiply their weight by a power of the number of its columns in every call.

An example is the equalized learning rate (Karras et al., Progressive Growing of GANs, 2018, section
4.1), which divides the weight by the square root of its fan-in. If columns are removed, this factor
changes, and the stored weight must be divided by the change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyro_sbp.gates.calling import call
from pyro_sbp.gates.copies import copy_network, fresh
from pyro_sbp.gates.gate import Gate
from pyro_sbp.gates.loose import LooseTensors, Place
from pyro_sbp.gates.nested import convert
from pyro_sbp.gates.proving import copy_for_measurement, enliven
from pyro_sbp.gates.state import undone
from pyro_sbp.gates.steady import repeatable
from pyro_sbp.gates.surgery import cut, surviving_units
from pyro_sbp.gates.uses import Uses

__all__ = ["powers_of_fan_in"]

#: The powers that are recognised.
_POWERS = (-0.5, -1.0)


class _Factors(TorchFunctionMode):
    """Record by which factor the first element of every weight is multiplied in a call."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.loose = LooseTensors(net)
        self.uses = Uses(net, self.loose)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.uses.of(func, args, kwargs, record=True)
        out = func(*args, **kwargs)
        self.loose.watch(func, args, kwargs, out)
        return out

    def found(self) -> dict[Place, float]:
        """From the place of a weight to the factor, after a call of the network."""
        return {
            place: float(multiple.flatten()[0] / weight.flatten()[0])
            for place, (multiple, weight) in self.uses.multiples.items()
        }


def powers_of_fan_in(
    net: nn.Module, x: Any, gates: Sequence[Gate], training_paths: bool
) -> dict[Place, float]:
    """Measure by which power of the number of columns a network multiplies its weights.

    The network is called before and after half of the units of every gate are removed.

    Args:
        net: the network, which is not changed.
        x: its input.
        gates: gates, which need not be proven.
        training_paths: as for `copy_for_measurement`.

    Returns:
        From the place of a weight to the power, for powers other than 0. It is empty if the network
        cannot be cut by the gates, or cannot be called after the cut.
    """
    x = convert(x, torch.float64)
    dense = copy_for_measurement(net, torch.float64, training_paths)
    enliven(dense, torch.Generator().manual_seed(0))
    small = copy_network(dense)
    theta = {g.name: torch.arange(g.size, device="cpu") < (g.size + 1) // 2 for g in gates}
    units = surviving_units(gates, theta)
    try:
        cut(small, gates, units)
        before, after = _factors(dense, x), _factors(small, x)
    except Exception:  # a network's own code may raise anything; the proof gives the reason
        return {}
    remaining: dict[Place, Tensor] = {}
    for gate in gates:
        for span in gate.readers:
            place = span.layer, span.tensor or "weight"
            columns = units[gate.name].remaining[span.units.clamp(min=0)] | (span.units < 0)
            remaining[place] = columns & remaining.get(place, columns)
    counts = {place: (len(columns), int(columns.sum())) for place, columns in remaining.items()}
    return _fitting(counts, before, after)


def _factors(net: nn.Module, x: Any) -> dict[Place, float]:
    """From the place of each weight that a network multiplies in a call to the factor."""
    with torch.no_grad(), undone(net), repeatable(torch.float64):
        mode = _Factors(net)
        with mode:
            call(net, fresh(x))
    return mode.found()


def _fitting(
    counts: Mapping[Place, tuple[int, int]],
    before: Mapping[Place, float],
    after: Mapping[Place, float],
) -> dict[Place, float]:
    """The powers of the number of columns that explain how the factors changed.

    Args:
        counts: from the place of a weight to its number of columns before and after a cut.
        before, after: from the place of a weight to its factor before and after the cut.
    """
    powers = {}
    for place, (old, new) in counts.items():
        ratio = after.get(place, 0.0) / (before.get(place, 0.0) or 1.0)
        for power in _POWERS:
            if 0 < new < old and math.isclose(ratio, (new / old) ** power, rel_tol=1e-9):
                powers[place] = power
    return powers
