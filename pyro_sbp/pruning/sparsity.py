"""From weights to keep to a smaller network: which units it still needs, and without the others."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_sbp.gates.copies import copy_network
from pyro_sbp.gates.folding import Gate
from pyro_sbp.gates.layers import most_of_columns, rows_of
from pyro_sbp.gates.probing import find_gates
from pyro_sbp.gates.surgery import Units, surviving_units
from pyro_sbp.gates.units import set_units
from pyro_sbp.models.sparse_guide import AdditiveNormalGuide
from pyro_sbp.models.sparse_model import SparseModel
from pyro_sbp.pruning.choosing import check_threshold, held_gates, nothing_reaches
from pyro_sbp.pruning.exactness import Equivalence, checked_shrink

__all__ = [
    "THRESHOLD",
    "KeptWeights",
    "Sparse",
    "needed_units",
    "prune_weights",
    "remaining_units",
    "shrink_sparse",
]

#: The signal-to-noise ratio of a log alpha of 3 (arXiv 1701.05369, section 5).
THRESHOLD = math.exp(-1.5)


@dataclass(frozen=True)
class KeptWeights:
    """The single weights that are kept.

    Attributes:
        layers: for every layer with noise, its weights that are kept, and all of them.
        kept: the weights that are kept, with those of layers without noise.
        total: all weights.
    """

    layers: Mapping[str, tuple[int, int]]
    kept: int
    total: int

    @classmethod
    def of(cls, layers: Mapping[str, tuple[int, int]], total: int) -> KeptWeights:
        """Those of a network that has `total` weights in all."""
        kept, noisy = (sum(counts) for counts in zip(*layers.values(), strict=True))
        return cls(layers, kept + total - noisy, total)

    @property
    def compression(self) -> float | None:
        """All weights over those that are kept, as the paper counts it; None where none is kept."""
        return self.total / self.kept if self.kept else None


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
    theta = {gate.name: torch.ones(gate.size, device="cpu") for gate in gates}
    while True:
        new = {}
        for gate in gates:
            read = torch.zeros(gate.size, dtype=torch.bool, device="cpu")
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


def remaining_units(
    net: nn.Module,
    gates: Sequence[Gate],
    snr: Mapping[str, Tensor],
    threshold: float,
    round_to: int = 1,
    min_units: int = 1,
) -> dict[str, Units]:
    """What remains of every gate's units if weights under a threshold are zero.

    Args:
        net, gates: the network.
        snr: the signal-to-noise ratio of every weight, by layer.
        threshold: the least ratio of a weight that is kept.
        round_to, min_units: as for `choose_units`. Units that have to remain besides those needed
            are columns of zeros, as their weights are.
    """
    masks = {name: value >= threshold for name, value in snr.items()}
    return surviving_units(
        gates,
        needed_units(net, gates, masks),
        min_units=min_units,
        round_to=round_to,
        score=_unit_scores(net, gates, snr),
    )


class Sparse(NamedTuple):
    """A network of sparse weights, smaller by the units that nobody reads.

    Attributes:
        small: the network.
        equivalence: how far it is from the network with its weights under the threshold zero.
        units: what remains of every gate.
        kept: how many weights of every layer reach the threshold, and of how many.
    """

    small: nn.Module
    equivalence: Equivalence
    units: dict[str, Units]
    kept: dict[str, tuple[int, int]]


def shrink_sparse(
    net: nn.Module,
    gates: Sequence[Gate],
    snr: Mapping[str, Tensor],
    example_input: Any,
    threshold: float,
    round_to: int = 1,
    min_units: int = 1,
) -> Sparse:
    """Put weights under a threshold to zero, and remove the units that no other weight reads.

    Args:
        net: the network; it is not changed.
        gates, snr, threshold, round_to, min_units: as for `remaining_units`.
        example_input: an input of the network, on which the result is compared with `net`.

    Raises:
        EquivalenceError: the result differs from the network with these weights zero.
    """
    units = remaining_units(net, gates, snr, threshold, round_to, min_units)
    sparse, kept = copy_network(net), {}
    with torch.no_grad():
        for name, value in snr.items():
            mask = value >= threshold
            sparse.get_parameter(f"{name}.weight").mul_(mask)
            kept[name] = (int(mask.sum()), mask.numel())
    like = next(sparse.parameters())
    theta = {name: unit.kept.to(like) for name, unit in units.items()}
    # Not compared with what theta masks, which removes the same units.
    small, equivalence = checked_shrink(sparse, gates, theta, example_input, units, reference={})
    return Sparse(small, equivalence, units, kept)


def prune_weights(
    model: SparseModel,
    guide: AdditiveNormalGuide,
    example_input: Any,
    threshold: float = THRESHOLD,
    input_features: Sequence[str] = (),
) -> nn.Module:
    """Make the smaller network that the posterior of weights asks for (arXiv 1701.05369).

    Weights under the threshold are zero, and units that no other weight reads are removed. If no
    weight reaches the threshold, all are zero, and a `UserWarning` says so.

    Args:
        model: the network with noise on its weights.
        guide: its posterior.
        example_input: a batch of the network's inputs.
        threshold: the least signal-to-noise ratio of a weight; by default that of log alpha = 3.
        input_features: dense layers that may lose single input features, as for `find_gates`.

    Returns:
        A plain network, in the training mode of the original. Its attribute `units` says what
        became of the units of every gate, as of `prune`.

    Raises:
        ValueError: the threshold is negative or not finite.
        EquivalenceError: the `relative_difference` of the result from the network with these
            weights zero is more than 1e-10 in float64.
    """
    check_threshold(threshold)
    net = model.noisy.net
    gates, snr = find_gates(net, example_input, input_features), guide.snr()
    if len(held_gates(snr, threshold)) == len(snr):
        warnings.warn(nothing_reaches(threshold, "weight", snr), stacklevel=2)
    found = shrink_sparse(net, gates, snr, example_input, threshold)
    set_units(found.small, found.units)
    return found.small


def _unit_scores(
    net: nn.Module, gates: Sequence[Gate], scores: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The best score of the weights that read a unit, by gate ``[units]``."""
    found = {}
    for gate in gates:
        best = torch.zeros(gate.size, device="cpu")
        for span in gate.readers:
            if span.layer in scores:
                columns = most_of_columns(net.get_submodule(span.layer), scores[span.layer]).cpu()
                there = span.units >= 0
                best = best.scatter_reduce(0, span.units[there], columns[there].float(), "amax")
        found[gate.name] = best
    return found
