"""Gate a network, cut it with random masks, and compare it with the masked network."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sbp.experiments.survey.collections import Surveyed
from pyro_sbp.gates.attention import has_attention, separate_attention
from pyro_sbp.gates.calling import call
from pyro_sbp.gates.copies import copy_network, fresh
from pyro_sbp.gates.decisions import Decisions
from pyro_sbp.gates.gate import Gate, Span
from pyro_sbp.gates.gated_network import GatedNetwork
from pyro_sbp.gates.nested import convert
from pyro_sbp.gates.probing import Gates, find_gates
from pyro_sbp.gates.proving import enliven
from pyro_sbp.gates.state import undone
from pyro_sbp.gates.steady import repeatable
from pyro_sbp.gates.surgery import relative_difference, shrink_in_place, surviving_units
from pyro_sbp.pruning.costs import UnitCosts
from pyro_sbp.pruning.macs import count_macs, count_parameters, macs_by_module

__all__ = ["Prepared", "block_names", "in_float64", "measure", "random_masks", "short_reason"]

#: Short texts for the reasons why layers are not prunable, by a part of the long ones.
REASONS = {
    "several": "its units are mixed",
    "output of the network": "is an output",
    "cutting it": "cannot be cut exactly",
    "is not called": "is not called",
    "is not used": "is not used",
    "no layer reads": "is read by no layer",
    "which is not prunable": "has or meets units of these",
    "meets no units": "meets no units",
    "no separate part": "meets units as a whole",
    "has one unit": "has one unit",
    "depends on the data": "is reached by choice of the data",
    "fails on NaN": "the network fails on NaN",
    "could read its units": "a layer is not called on the example",
}


def in_float64(surveyed: Surveyed) -> tuple[nn.Module, Any]:
    """A network and its input in float64, in evaluation mode, with random parameters only."""
    net = surveyed.net.double().eval().requires_grad_(False)
    enliven(net, torch.Generator().manual_seed(0))
    return net, convert(surveyed.x, torch.float64)


class Prepared:
    """A network as it is measured: in float64, with its gates and random masks.

    Args:
        surveyed: the network.
    """

    def __init__(self, surveyed: Surveyed) -> None:
        net, self.x = in_float64(surveyed)
        self.net: nn.Module = separate_attention(net) if has_attention(net) else net
        start = time.process_time()
        self.gates: Gates = find_gates(self.net, fresh(self.x), ignore=surveyed.ignore)
        self.seconds = time.process_time() - start
        self.theta = random_masks(self.gates)

    def masked(self, theta: Mapping[str, Tensor], decisions: Decisions) -> Any:
        """The output of the network with its activations multiplied by masks."""
        each = {name: value[None] for name, value in theta.items()}
        with torch.no_grad(), undone(self.net), repeatable(torch.float64), decisions.recorded():
            return GatedNetwork(self.net, self.gates)(fresh(self.x), each)

    def difference(self, small: nn.Module, masked: Any, decisions: Decisions) -> float:
        """The relative difference of the output of a cut network from that of the masked one."""
        with torch.no_grad(), undone(small), repeatable(torch.float64), decisions.repeated():
            return relative_difference(masked, call(small, fresh(self.x)))


def random_masks(gates: Iterable[Gate]) -> dict[str, Tensor]:
    """Random theta, which is zero for a third of the units of each gate."""
    generator = torch.Generator().manual_seed(1)
    theta = {}
    for gate in gates:
        values = 0.5 + torch.rand(gate.size, generator=generator, dtype=torch.float64)
        gone = max(1, round(gate.size / 3)) if gate.size > 1 else 0
        values[torch.randperm(gate.size, generator=generator)[:gone]] = 0
        theta[gate.name] = values
    return theta


def measure(surveyed: Surveyed, prepared: Prepared) -> dict[str, Any]:
    """The record of a network: its gates, the size after a cut, and the difference of its outputs.

    MACs are those of one call on the input. ``blocks`` has those of every block before and after
    the cut. ``attention`` has the number of attention layers with gated heads, and of all attention
    layers.
    """
    net, gates, x = prepared.net, prepared.gates, prepared.x
    decisions = Decisions()
    expected = prepared.masked(prepared.theta, decisions)
    units = surviving_units(gates, prepared.theta)
    small = copy_network(net)
    with torch.no_grad():
        shrink_in_place(small, gates, prepared.theta, units)
    physical = {name: unit.remaining.double() for name, unit in units.items()}
    with repeatable(torch.float64):  # networks with a cast to float32 fail in float64
        dense, left = macs_by_module(net, fresh(x)), macs_by_module(small, fresh(x))
        costs = UnitCosts(net, gates, fresh(x)).expected(physical)
    blocks = {}
    for block in block_names(net, surveyed.blocks):
        before, after = (
            sum(n for name, n in macs.items() if f"{name}.".startswith(f"{block}."))
            for macs in (dense, left)
        )
        if before:
            blocks[block] = [before, after]
    reasons: dict[str, list[float]] = {}
    for name, reason in gates.not_prunable.items():
        count, share = reasons.get(short_reason(reason), (0, 0.0))
        reasons[short_reason(reason)] = [count + 1, share + gates.shares.get(name, 0.0)]
    return {
        "family": surveyed.family,
        "gates": len(gates),
        "units": sum(gate.size for gate in gates),
        "zeroed": sum(int(unit.zeroed.sum()) for unit in units.values()),
        "parameters": count_parameters(net),
        "parameters_left": count_parameters(small) / max(count_parameters(net), 1),
        "macs": dense.total(),
        "macs_left": left.total() / max(dense.total(), 1),
        "macs_by_unit_costs": costs / max(dense.total(), 1),
        "blocks": blocks,
        "attention": list(_gated_attention(net, gates)),
        "max_rel_diff": prepared.difference(small, expected, decisions),
        "cpu_seconds": round(prepared.seconds, 2),
        "not_prunable": {why: [count, round(share, 4)] for why, (count, share) in reasons.items()},
    }


def short_reason(reason: str) -> str:
    """A few words for the reason why a layer is not prunable."""
    return next((words for key, words in REASONS.items() if key in reason), reason)


def block_names(net: nn.Module, pattern: str | None) -> list[str]:
    """The names of the blocks of a network.

    Args:
        net: the network.
        pattern: a regular expression for them. With None, a block is the innermost module around an
            attention layer whose name is a number.
    """
    names = [name for name, _ in net.named_modules()]
    if pattern is not None:
        return [name for name in names if re.fullmatch(pattern, name)]
    found: dict[str, None] = {}
    for name in _attention_layers(net):
        path = name.split(".")
        while path and not path[-1].isdigit():
            path.pop()
        if path:
            found[".".join(path)] = None
    # A block inside another one is counted as part of it.
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def _attention_layers(net: nn.Module) -> list[str]:
    """The innermost modules whose class name contains "attention" and that have a weight matrix."""
    found = [
        name
        for name, module in net.named_modules()
        if re.search(r"Attention|Attn|Attend", type(module).__name__)
        and any(parameter.ndim > 1 for parameter in module.parameters())
    ]
    return [
        name
        for name in found
        if not any(other != name and f"{other}.".startswith(f"{name}.") for other in found)
    ]


def _gated_attention(net: nn.Module, gates: Iterable[Gate]) -> tuple[int, int]:
    """The number of attention layers whose heads are units, and of all attention layers."""
    layers = _attention_layers(net)
    gated = {
        layer
        for gate in gates
        for span in gate.writers
        if _rows_per_unit(span, gate.size) > 1
        for layer in layers
        if f"{span.layer}.".startswith(f"{layer}.")
    }
    return len(gated), len(layers)


def _rows_per_unit(span: Span, size: int) -> int:
    return int(torch.bincount(span.units[span.units >= 0], minlength=size).max())


def macs_left(net: nn.Module, small: nn.Module, x: Any) -> float:
    """The share of MACs that a cut network has."""
    return count_macs(small, fresh(x)) / max(count_macs(net, fresh(x)), 1)
