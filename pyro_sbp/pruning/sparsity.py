"""Set single weights to zero, and remove the units that no remaining weight reads."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_sbp.gates.copies import copy_network
from pyro_sbp.gates.gate import Gate
from pyro_sbp.gates.layers import most_of_columns, rows_of
from pyro_sbp.gates.probing import find_gates
from pyro_sbp.gates.surgery import surviving_units
from pyro_sbp.gates.units import Units, set_units
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
    """The number of weights that are kept.

    Attributes:
        layers: for every layer with noise, the number of its kept weights and of all its weights.
        kept: the number of kept weights, including all weights of layers without noise.
        total: the number of all weights.
    """

    layers: Mapping[str, tuple[int, int]]
    kept: int
    total: int

    @classmethod
    def of(cls, layers: Mapping[str, tuple[int, int]], total: int) -> KeptWeights:
        """The counts for a network with `total` weights."""
        kept, noisy = (sum(counts) for counts in zip(*layers.values(), strict=True))
        return cls(layers, kept + total - noisy, total)

    @property
    def compression(self) -> float | None:
        """The number of all weights divided by that of kept weights, as in the paper; None if no
        weight is kept.
        """
        return self.total / self.kept if self.kept else None


def needed_units(
    net: nn.Module, gates: Sequence[Gate], masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The units of every gate that at least one weight reads.

    If all weights in the columns of a unit are zero, no layer reads the unit, and removing it
    changes nothing. The rows that compute the unit are then removed too. These rows may be the last
    readers of other units, so the computation is repeated until nothing changes.

    Args:
        net: the network.
        gates: its gates, from `find_gates`.
        masks: from layer name to a bool tensor of the shape of its weight, False where the weight
            is zero. A layer that is not named has no zeros.

    Returns:
        From gate name to theta for `shrink`, a float tensor ``[units]``: 1 for a unit that is
        needed, else 0.
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
            # The rows that compute a removed unit are removed.
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
    """The units of every gate that remain if weights under a threshold are set to zero.

    Args:
        net, gates: the network and its gates.
        snr: the signal-to-noise ratio of every weight, by layer.
        threshold: the smallest signal-to-noise ratio of a weight that is kept.
        round_to, min_units: as for `choose_units`. Units that remain only because of these settings
            have columns of zeros.
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
    """A network with sparse weights, without the units that no weight reads.

    Attributes:
        small: the network.
        equivalence: its difference from the original network with the weights under the threshold
            set to zero.
        units: the remaining units of every gate.
        kept: for every layer, the number of weights that reach the threshold and of all weights.
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
    """Set weights under a threshold to zero, and remove the units that no other weight reads.

    Args:
        net: the network; it is not changed.
        gates, snr, threshold, round_to, min_units: as for `remaining_units`.
        example_input: an input of the network, on which the result is compared with `net`.

    Raises:
        EquivalenceError: the result differs from the network with these weights set to zero.
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
    # The reference is the sparse network without a mask, in which no layer reads these units.
    small, equivalence = checked_shrink(sparse, gates, theta, example_input, units, reference={})
    return Sparse(small, equivalence, units, kept)


def prune_weights(
    model: SparseModel,
    guide: AdditiveNormalGuide,
    example_input: Any,
    threshold: float = THRESHOLD,
    input_features: Sequence[str] = (),
) -> nn.Module:
    """Prune single weights by their posterior (Molchanov et al. 2017, arXiv 1701.05369).

    Weights under the threshold are set to zero, and units that no other weight reads are removed.
    If no weight reaches the threshold, all weights with noise are set to zero, with a
    `UserWarning`.

    Args:
        model: the network with noise on its weights.
        guide: its posterior.
        example_input: a batch of the network's inputs.
        threshold: the smallest signal-to-noise ratio of a weight that is kept; by default that of
            log alpha = 3.
        input_features: dense layers whose input features can be removed, as for `find_gates`.

    Returns:
        A plain network, in the training mode of the original. Its attribute `units` lists the kept
        units of every gate, as for `prune`.

    Raises:
        ValueError: the threshold is negative or not finite.
        EquivalenceError: the `relative_difference` of the result from the network with these
            weights set to zero is more than 1e-10 in float64.
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
    """The largest score of the weights that read each unit, ``[units]`` by gate."""
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
