"""The network between two turns of training, and the noise that both turns train."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_sbp.distributions import TruncatedLogNormal
from pyro_sbp.gates.gate import Gate
from pyro_sbp.gates.surgery import remaining_gates
from pyro_sbp.gates.units import Units
from pyro_sbp.models.gated_guide import LOG_SCALE_RANGE
from pyro_sbp.models.gated_model import LOG_HIGH, LOG_LOW, theta_prior
from pyro_sbp.pruning.choosing import Choice
from pyro_sbp.pruning.exactness import Equivalence

__all__ = ["Carried", "Stage", "Turn", "over_all_units"]


class Turn(NamedTuple):
    """A part of training in which some gates have noise.

    Attributes:
        name: the name of its phase.
        gates: the names of the gates that have noise.
        epochs: the number of epochs.
        continues: whether the next turn continues to train the same noise. Between the two turns,
            only units far under the threshold are removed.
    """

    name: str
    gates: tuple[str, ...]
    epochs: int
    continues: bool = False


class Carried(NamedTuple):
    """The noise of the remaining units, which the next turn continues to train.

    Attributes:
        posteriors: by gate, the location and the log scale of log theta, ``[units]`` each.
        kl_scale: by gate, the weight of the KL divergence.
    """

    posteriors: Mapping[str, tuple[Tensor, Tensor]]
    kl_scale: Mapping[str, float]


@dataclass(frozen=True)
class Stage:
    """The network after some turns.

    Attributes:
        net: the network.
        gates: its gates, with the units that remain.
        units: for every gate of the dense network, which of its units remain.
        score: by gate, the score with which the remaining units were kept: infinity before the turn
            of their gate, and minus infinity for a unit that remains as a column of zeros.
        held: the gates in which no unit reached the threshold, so that only the best was kept.
        equivalence: the largest differences over all cuts.
        carried: the noise that the next turn continues to train; None if it starts with new noise.
    """

    net: nn.Module
    gates: Sequence[Gate]
    units: dict[str, Units]
    score: dict[str, Tensor]
    held: tuple[str, ...]
    equivalence: Equivalence
    carried: Carried | None = None

    @classmethod
    def dense(cls, net: nn.Module, gates: Sequence[Gate]) -> Stage:
        """The stage before the first cut."""
        whole = {gate.name: torch.ones(gate.size, dtype=torch.bool, device="cpu") for gate in gates}
        score = {gate.name: torch.full((gate.size,), torch.inf, device="cpu") for gate in gates}
        units = {name: Units(every, every) for name, every in whole.items()}
        return cls(net, gates, units, score, (), Equivalence(0.0, 0.0))

    def there(self, gate: str) -> Tensor:
        """The units of a gate that do not remain as a column of zeros, bool ``[units]``."""
        return self.score[gate] > -torch.inf

    def theta(self) -> dict[str, Tensor]:
        """The theta of the gates without noise: 1, because the mean is folded into the weights, or
        0 for a unit that remains as a column of zeros."""
        like = next(self.net.parameters())
        return {name: self.there(name).to(like) for name in self.score}

    def beyond_multiples(self, round_to: int, score: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By gate, the indices of the units with the smallest scores, for gates that have lost
        units. Without these units, the number of units of the gate is a multiple of `round_to`.
        """
        return {
            gate.name: score[gate.name].argsort()[: gate.size % round_to]
            for gate in self.gates
            if 1 < round_to <= gate.size < len(self.units[gate.name].kept)
        }

    def after(
        self,
        choice: Choice,
        score: Mapping[str, Tensor],
        net: nn.Module,
        equivalence: Equivalence,
        carried: Carried | None = None,
    ) -> Stage:
        """The stage after a cut.

        Args:
            choice: the units that were kept.
            score: by gate, the scores of the units before the cut.
            net: the smaller network.
            equivalence: the differences between the smaller and the masked network of this cut.
            carried: the noise before the cut, if the next turn continues to train it.
        """
        left = {
            name: torch.where(unit.kept, score[name].detach().cpu(), -torch.inf)[unit.remaining]
            for name, unit in choice.units.items()
        }
        return Stage(
            net,
            remaining_gates(net, self.gates, choice.units),
            {name: self.units[name].then(unit) for name, unit in choice.units.items()},
            left,
            tuple(name for name in self.units if name in {*self.held, *choice.held}),
            Equivalence(
                max(self.equivalence.max_rel_diff_float64, equivalence.max_rel_diff_float64),
                max(self.equivalence.max_abs_diff, equivalence.max_abs_diff),
            ),
            None if carried is None else _left_of(carried, choice.units),
        )


def _left_of(carried: Carried, units: Mapping[str, Units]) -> Carried:
    """The noise of the remaining units."""
    posteriors = {}
    for name, values in carried.posteriors.items():
        there = units[name].remaining.nonzero().flatten().to(values[0].device)
        loc, log_scale = (value[there] for value in values)
        posteriors[name] = loc, log_scale
    return Carried(posteriors, carried.kl_scale)


def over_all_units(
    loc: Tensor, scale: Tensor, there: Tensor, prior_scale: float | None
) -> tuple[Tensor, Tensor]:
    """Location and scale of log theta for all units of a gate in the dense network.

    Args:
        loc, scale: the location and the scale of the remaining units, ``[remaining]``.
        there: which units remain, bool ``[units]``.
        prior_scale: as for `GatedModel`. The other units get this prior. The log-uniform prior is
            replaced by a nearly uniform distribution in the family of the posterior, with the
            location -10 and the log scale 5.

    Returns:
        Location and scale, ``[units]`` each.
    """
    there = there.to(loc.device)
    prior = theta_prior(prior_scale, len(there), loc)
    if isinstance(prior, TruncatedLogNormal):
        locs, scales = prior.loc.to(loc).clone(), prior.scale.to(scale).clone()
    else:
        locs = loc.new_full(there.shape, (LOG_LOW + LOG_HIGH) / 2)
        scales = scale.new_full(there.shape, math.exp(LOG_SCALE_RANGE[1]))
    locs[there], scales[there] = loc, scale
    return locs, scales
