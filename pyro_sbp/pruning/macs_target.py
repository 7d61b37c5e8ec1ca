"""Choose units for a given ratio of MACs, with a smaller deviation than a threshold alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sbp.gates.gate import Gate
from pyro_sbp.gates.surgery import Units, surviving_units
from pyro_sbp.pruning.budgets import MacsRatio
from pyro_sbp.pruning.choosing import Choice, choose_units
from pyro_sbp.pruning.costs import UnitCosts

__all__ = ["TargetReached", "check_target", "choose_by_macs", "largest_ratio"]

#: Units are added, or exchanged, until the ratio is this close to the target.
CLOSE = 1.05
#: A unit whose score is at least this share of the threshold can be exchanged for units whose score
#: is at most `STRONG` times the threshold.
WEAK, STRONG = 0.5, 4.0
#: The posterior is far from the target if the threshold alone gives a ratio that differs by more
#: than this factor.
FAR = 1.25


class _Target(MacsRatio):
    """A ratio of MACs that messages call by the name of the target."""

    name = "target_macs_ratio"


@dataclass(frozen=True)
class TargetReached:
    """How a network with a target of MACs was chosen.

    Attributes:
        macs_ratio: the target.
        threshold: the threshold that the target required.
        ratio_by_threshold: the ratio of MACs that the threshold of the recipe or of the `Pruner`
            alone would give.
    """

    macs_ratio: float
    threshold: float
    ratio_by_threshold: float

    @property
    def far(self) -> bool:
        """Whether the posterior is far from the target."""
        times = self.ratio_by_threshold / self.macs_ratio
        return not 1 / FAR <= times <= FAR

    def warning(self, threshold: float) -> str:
        """One line for a posterior that is far from the target.

        Args:
            threshold: the threshold of the recipe or of the `Pruner`.
        """
        change = "larger" if self.ratio_by_threshold < self.macs_ratio else "smaller"
        return (
            f"the posterior is far from target_macs_ratio {self.macs_ratio:g}: the threshold "
            f"{threshold:g} alone gives {self.ratio_by_threshold:.2f} times fewer MACs, and the "
            f"target needs the threshold {self.threshold:.4g}; train for longer, or with a "
            f"{change} noise_learning_rate or kl_scale"
        )


def ratio_of(costs: UnitCosts, units: Mapping[str, Units], dense: float) -> float:
    """The ratio of the MACs of the dense network to those of the network with these units."""
    return dense / costs.expected({name: unit.remaining.double() for name, unit in units.items()})


def largest_ratio(
    net: nn.Module,
    gates: Sequence[Gate],
    costs: UnitCosts,
    kl_scale: Mapping[str, float],
    example_input: Any,
) -> float:
    """The ratio of the MACs of a network to those of the network with one unit in every gate.

    Gates whose weight of the KL divergence is 0 keep all units.
    """
    ones = {gate.name: torch.ones(gate.size, device="cpu") for gate in gates}
    score = {
        name: torch.zeros_like(one) if kl_scale[name] else torch.full_like(one, torch.inf)
        for name, one in ones.items()
    }
    choice = choose_units(net, gates, ones, score, example_input)
    return ratio_of(costs, choice.units, costs.expected({}))


def check_target(
    ratio: float,
    net: nn.Module,
    gates: Sequence[Gate],
    costs: UnitCosts,
    kl_scale: Mapping[str, float],
    example_input: Any,
) -> None:
    """Raise ValueError if no pruning of a network, or no training, can reach a ratio of MACs.

    Args:
        ratio: the target, `target_macs_ratio` in the message.
        net, gates, example_input: as for `choose_units`.
        costs: the costs of the units of `net`.
        kl_scale: the weights of the KL divergence without costs, by gate.
    """
    if not any(kl_scale.values()):
        raise ValueError(
            f"target_macs_ratio is {ratio:g}, but kl_scale is 0 for all gates, so no units would "
            "be removed; set kl_scale"
        )
    most = largest_ratio(net, gates, costs, kl_scale, example_input)
    if ratio > most:
        some = "" if all(kl_scale.values()) else " whose kl_scale is not 0"
        raise ValueError(
            f"target_macs_ratio is {ratio:g}; expected at most {math.floor(100 * most) / 100:.2f}, "
            f"the ratio of {type(net).__name__} with one unit in every gate{some}"
        )


def choose_by_macs(
    net: nn.Module,
    gates: Sequence[Gate],
    mean: Mapping[str, Tensor],
    score: Mapping[str, Tensor],
    example_input: Any,
    costs: UnitCosts,
    *,
    criterion: str,
    ratio: float,
    threshold: float,
    dense: nn.Module,
    dense_macs: float,
    round_to: int = 1,
    min_units: int = 1,
) -> tuple[Choice, TargetReached]:
    """Choose the units of a large network with at most 1 / `ratio` of the dense MACs.

    The budget `MacsRatio` selects a threshold. In a small network, one unit can have a large share
    of the MACs, so the ratio at this threshold can be far over `ratio`. Units under the threshold
    are then kept too, the best ones first, as long as the MACs do not exceed the limit. If the
    ratio is still far over `ratio`, the best of the removed units is kept, and units with fewer
    MACs are removed in its place, the worst ones first. Its score must be at least half of the
    threshold, and theirs at most four times the threshold. With `round_to` or `min_units` other
    than 1, only the budget selects.

    Args:
        net, gates, mean, score, example_input, criterion, dense, round_to, min_units: as for
            `choose_units`.
        costs: the costs of the units of `net`.
        ratio: the ratio of MACs.
        threshold: the threshold to which the posterior was trained, for a comparison.
        dense_macs: the MACs of the dense network.

    Returns:
        The choice, and a comparison with the units that the threshold alone would keep.

    Raises:
        ValueError: as for `choose_units`.
    """
    choose = partial(choose_units, net, gates, mean, score, example_input, criterion=criterion)
    choice = choose(budget=_Target(ratio), round_to=round_to, min_units=min_units, dense=dense)
    alone = ratio_of(costs, choose(threshold=threshold).units, dense_macs)
    reached = TargetReached(ratio, choice.threshold, alone)
    if not round_to == min_units == 1:
        return choice, reached
    selection = _Selection(gates, mean, score, costs, dense_macs, choice.theta, choice.units)
    selection = selection.extended(ratio).exchanged(ratio, threshold)
    return replace(choice, theta=selection.theta, units=selection.units), reached


@dataclass(frozen=True, eq=False)
class _Selection:
    """Units of a network, and the ratio of the dense MACs to those of the network with them.

    Attributes:
        gates, mean, score, costs, dense_macs: as for `choose_by_macs`.
        theta, units: as in `Choice`.
    """

    gates: Sequence[Gate]
    mean: Mapping[str, Tensor]
    score: Mapping[str, Tensor]
    costs: UnitCosts
    dense_macs: float
    theta: dict[str, Tensor]
    units: dict[str, Units]

    @cached_property
    def ratio(self) -> float:
        """The ratio of MACs."""
        return ratio_of(self.costs, self.units, self.dense_macs)

    def extended(self, ratio: float) -> _Selection:
        """With more units, the best ones first, until the ratio is close to `ratio`."""
        found = self
        for name, unit in self._ranked(kept=False):
            if found.ratio <= CLOSE * ratio:
                break
            more = found._changed(name, unit, keep=True)
            if more.units[name].kept[unit] and more.ratio >= ratio:
                found = more
        return found

    def exchanged(self, ratio: float, threshold: float) -> _Selection:
        """With the best removed unit in place of units with fewer MACs, the worst ones first.

        Unchanged if the ratio is close to `ratio` already, or if it cannot come close in this way.
        """
        found = None if self.ratio <= CLOSE * ratio else self._with_best(WEAK * threshold)
        if found is None:
            return self
        for name, unit in reversed(self._ranked(kept=True)):
            if self.score[name][unit] > STRONG * threshold:
                return self
            less = found._changed(name, unit, keep=False)
            alive = all(bool(left.kept.any()) for left in less.units.values())
            if not alive or less.ratio > CLOSE * ratio:
                continue
            found = less
            if found.ratio >= ratio:
                return found
        return self

    def _with_best(self, least: float) -> _Selection | None:
        """With the best of the removed units that can be kept; None if there is none. A unit cannot
        be kept if a unit of another gate that it needs is removed.

        Args:
            least: the smallest score of the unit.
        """
        for name, unit in self._ranked(kept=False):
            if self.score[name][unit] < least:
                return None
            found = self._changed(name, unit, keep=True)
            if found.units[name].kept[unit]:
                return found
        return None

    def _changed(self, name: str, unit: int, *, keep: bool) -> _Selection:
        """With one unit kept or removed."""
        theta = {**self.theta, name: self.theta[name].clone()}
        theta[name][unit] = self.mean[name][unit] if keep else 0
        units = surviving_units(self.gates, theta, score=self.score)
        return replace(self, theta=theta, units=units)

    def _ranked(self, *, kept: bool) -> list[tuple[str, int]]:
        """The kept or the removed units, in descending order of their scores."""
        found = [
            (float(value), name, unit)
            for name, scores in self.score.items()
            for unit, value in enumerate(scores.tolist())
            if bool(self.units[name].kept[unit]) == kept and value > -torch.inf
        ]
        found.sort(key=lambda entry: -entry[0])
        return [(name, unit) for _, name, unit in found]
