"""Choose the units to keep by their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sbp.gates.gate import Gate
from pyro_sbp.gates.nested import same
from pyro_sbp.gates.surgery import shrink, surviving_units
from pyro_sbp.gates.units import Units
from pyro_sbp.pruning.budgets import Budget, Candidates, find_level
from pyro_sbp.pruning.unit_mask import UnitMask
from pyro_sbp.recipes.criteria import find_criterion

__all__ = [
    "Choice",
    "check_settings",
    "check_threshold",
    "choose_units",
    "held_gates",
    "nothing_reaches",
]


def check_threshold(threshold: float, criterion: str = "snr") -> None:
    """Raise ValueError unless this is a valid threshold for the scores of a criterion."""
    _check_number("threshold", threshold)
    find_criterion(criterion).check(float(threshold))


def check_settings(
    criterion: str,
    threshold: float | None,
    budget: Budget | None,
    round_to: int,
    min_units: int,
) -> None:
    """Raise ValueError unless these are valid settings of `choose_units`."""
    found = find_criterion(criterion)
    for name, value, least in (("round_to", round_to, 1), ("min_units", min_units, 0)):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name} is {value!r}; expected an integer >= {least}")
    if threshold is not None and budget is not None:
        raise ValueError(f"give a threshold or a {budget.name}, not both")
    if threshold is not None:
        check_threshold(threshold, criterion)
    if budget is not None:
        found.check_budget()


def _check_number(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a number or a tensor with one number."""
    tensor = isinstance(value, Tensor) and value.numel() == 1
    if isinstance(value, bool) or not (tensor or isinstance(value, Real)):
        raise ValueError(f"{name} is {value!r}; expected a number")


@dataclass(frozen=True, eq=False)
class Choice:
    """The units to keep in every gate. Two choices are equal if all their attributes are equal.

    Attributes:
        theta: from gate name to theta, ``[units]``; 0 for a removed unit.
        units: the kept units, by gate.
        threshold: the threshold for the scores. `round_to`, `min_units` and a target of MACs can
            keep units under it, and a target can remove units over it.
        held: the gates in which no unit reaches the threshold. They keep the smallest allowed
            number of units.
    """

    theta: dict[str, Tensor]
    units: dict[str, Units]
    threshold: float
    held: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        return same(self, other)


def choose_units(
    net: nn.Module,
    gates: Sequence[Gate],
    mean: Mapping[str, Tensor],
    score: Mapping[str, Tensor],
    example_input: Any,
    *,
    criterion: str = "snr",
    threshold: float | None = None,
    budget: Budget | None = None,
    round_to: int = 1,
    min_units: int = 1,
    dense: nn.Module | None = None,
) -> Choice:
    """Choose the units to keep, by a threshold on their scores or by a budget.

    Args:
        net: the network.
        gates: its gates.
        mean, score: from gate name to E[theta] and to the scores of the units, ``[units]``.
        example_input: an input of the network. MACs are counted for its shape.
        criterion: the criterion of the scores: "snr", "bmrs-n" or "bmrs-u"
            (`pyro_sbp.pruning.criteria`).
        threshold: units with score >= threshold are kept. Without a budget, the default is 1 for
            "snr" and 0.919 for the others.
        budget: a condition that the smaller network must meet, instead of a threshold.
        round_to: every gate keeps a multiple of this number of units. The best units under the
            threshold are kept to reach it. A gate with fewer units keeps all.
        min_units: every gate keeps at least this many units, its best ones, also if none of its
            units reaches the threshold. If two gates meet at a layer (channels and their flattened
            features), the later gate keeps its best units among those that the earlier gate still
            supplies. With 0, a gate may lose all units. A residual branch then adds only a
            constant, and one column of zeros remains because the layer needs a column.
        dense: the network with which a budget compares, if `net` is already pruned.

    Raises:
        ValueError: the criterion is unknown; a setting is out of range; the threshold removes all
            units of all gates, and `min_units` is 0; there is a budget, and the criterion does not
            rank units; or the budget cannot be met. The message then says which value can be met.
    """
    check_settings(criterion, threshold, budget, round_to, min_units)
    scale = find_criterion(criterion)
    threshold = scale.threshold if threshold is None else threshold
    if not gates:
        raise ValueError("the network has no gate, so no units can be chosen")
    score = {gate.name: score[gate.name].detach().cpu() for gate in gates}
    usable = {gate.name: mean[gate.name].detach().cpu() != 0 for gate in gates}
    levels = torch.cat([score[gate.name] for gate in gates]).unique()

    def chosen(level: float) -> Choice:
        reached = {gate.name: score[gate.name] >= level for gate in gates}
        held = held_gates(score, level) if min_units else ()
        found = UnitMask(gates, reached, score, usable, round_to, min_units)
        found.extend()
        theta = {name: mean[name] * mask.to(mean[name]) for name, mask in found.mask.items()}
        units = surviving_units(gates, theta, min_units=min_units, round_to=round_to, score=score)
        return Choice(theta, units, level, held)

    if budget is None:
        if threshold > float(levels[-1]) and not min_units:
            raise ValueError(
                f"threshold {threshold:g} with min_units 0 removes every unit of every gate; "
                f"the largest {scale.title} is {float(levels[-1]):.4g}"
            )
        return chosen(threshold)

    def network_at(level: float) -> nn.Module:
        choice = chosen(level)
        return shrink(net, gates, choice.theta, example_input, choice.units)

    candidates = Candidates(
        net,
        gates,
        example_input,
        levels,
        lambda level: chosen(level).units,
        network_at,
        net if dense is None else dense,
        scale,
    )
    return chosen(find_level(candidates, budget))


def held_gates(score: Mapping[str, Tensor], threshold: float) -> tuple[str, ...]:
    """The gates in which no unit reaches a threshold; `score` maps a gate name to ``[units]``."""
    return tuple(name for name, values in score.items() if not (values >= threshold).any())


def nothing_reaches(
    threshold: float, element: str, score: Mapping[str, Tensor], criterion: str = "snr"
) -> str:
    """The text of the warning that no element ("unit" or "weight") of any site reaches a
    threshold.
    """
    largest = max(float(values.max()) for values in score.values())
    return (
        f"no {element} reaches the threshold {threshold:g}, so almost nothing is left of the "
        f"network; the largest {find_criterion(criterion).title} is {largest:.4g}"
    )
