"""Budgets: the condition that selects one of the networks that a posterior gives.

A posterior ranks the units. Every threshold on their scores gives a network, and a higher threshold
gives a smaller network. A budget selects the threshold.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sbp.gates.copies import copy_network, to_precision
from pyro_sbp.gates.gate import Gate
from pyro_sbp.gates.hooks import without_idle_hooks
from pyro_sbp.gates.nested import convert
from pyro_sbp.gates.surgery import cut
from pyro_sbp.gates.units import Units
from pyro_sbp.pruning.macs import count_macs, count_parameters
from pyro_sbp.recipes.criteria import CRITERIA, Criterion

__all__ = [
    "Budget",
    "Candidates",
    "MacsRatio",
    "MaxErrorIncrease",
    "ParametersRatio",
    "find_level",
    "ratio_budget",
]


@dataclass(frozen=True, eq=False)
class Candidates:
    """The networks among which a budget selects, each given by a threshold.

    Attributes:
        net, gates, example_input: the network to prune, its gates, and an input.
        levels: the thresholds that give different networks, in ascending order, ``[levels]``.
        units_at: from a threshold to the remaining units, by gate.
        network_at: from a threshold to the smaller network.
        dense: the dense network. It differs from `net` if `net` is already pruned.
        criterion: the criterion of the thresholds.
    """

    net: nn.Module
    gates: Sequence[Gate]
    example_input: Any
    levels: Tensor
    units_at: Callable[[float], Mapping[str, Units]]
    network_at: Callable[[float], nn.Module]
    dense: nn.Module
    criterion: Criterion = CRITERIA["snr"]


class Budget(ABC):
    """A condition on the smaller network.

    `find_level` chooses a threshold whose network meets the condition. A subclass defines
    `measurement`, which returns the value of a network that is compared with the target.

    Args:
        target: the bound.

    Attributes:
        measured: from a threshold to the value of its network, in the order of measurement.
        level: the threshold that was found.

    Raises:
        ValueError: the target is not a number, or out of range.
    """

    #: The name of the budget in requests.
    name: str
    #: Whether the measured value must be at least the target. The budget then selects the largest
    #: network that meets it. Otherwise it selects the smallest one with at most the target.
    at_least = True
    #: The smallest target that is allowed.
    least = 1.0

    def __init__(self, target: float) -> None:
        tensor = isinstance(target, Tensor) and target.numel() == 1
        if isinstance(target, bool) or not (tensor or isinstance(target, Real)):
            raise ValueError(f"{self.name} is {target!r}; expected a number")
        if not self.least <= target < math.inf:
            raise ValueError(f"{self.name} is {target}; expected a number >= {self.least:g}")
        self.target = float(target)
        self.measured: dict[float, float] = {}
        self.level = math.nan

    @abstractmethod
    def measurement(self, candidates: Candidates) -> Callable[[float], float]:
        """A function from a threshold to the measured value of its network."""

    @abstractmethod
    def describe(self, value: float) -> str:
        """A value in words, such as "the network has 2.00 times fewer MACs"."""

    def is_met(self, value: float) -> bool:
        """Whether a network with this value meets the budget."""
        return value >= self.target if self.at_least else value <= self.target

    def confirm(self, candidates: Candidates, index: int) -> int:
        """The index of the level to use after bisection has found `index`. Budgets whose
        measurements vary override it.

        Raises:
            ValueError: no level from `index` on is confirmed.
        """
        return index

    def report(self, level: float) -> str:
        """The measured value of the network of a level, in words."""
        return self.describe(self.measured[level])

    def refusal(self, candidates: Candidates, level: float) -> ValueError:
        """The error to raise if no network meets the target.

        Args:
            candidates: the networks.
            level: the threshold of the network that is closest to the target.
        """
        end = "largest" if self.at_least else "smallest"
        return ValueError(
            f"{self.name} {self.target:g} cannot be met: with a threshold at the {end} "
            f"{candidates.criterion.title}, {level:.4g}, {self.report(level)}"
        )


class MacsRatio(Budget):
    """At least `target` times fewer multiply-accumulates (MACs) than the dense network."""

    name = "macs_ratio"

    def measurement(self, candidates: Candidates) -> Callable[[float], float]:
        """The ratio of the MACs, counted on the meta device if the network can run there."""
        return _ratio(candidates, lambda net, x: count_macs(net, x))

    def describe(self, value: float) -> str:
        """The ratio in words."""
        return f"the network has {value:.2f} times fewer MACs"


class ParametersRatio(Budget):
    """At least `target` times fewer parameters than the dense network."""

    name = "parameters_ratio"

    def measurement(self, candidates: Candidates) -> Callable[[float], float]:
        """The ratio of the numbers of parameters."""
        return _ratio(candidates, lambda net, x: count_parameters(net))

    def describe(self, value: float) -> str:
        """The ratio in words."""
        return f"the network has {value:.2f} times fewer parameters"


class MaxErrorIncrease(Budget):
    """An error of at most `target` percentage points over that of the dense network.

    The budget selects the smallest such network. The error is measured before any fine-tuning. It
    does not have to increase with the threshold everywhere. The search by bisection can therefore
    miss a smaller network that also meets the budget.

    Args:
        target: the largest increase in percentage points.
        error: from a network to its error in percent. It is measured on images that are neither
            training nor test images.
        dense_error: the error of the dense network on the same images.
    """

    name = "max_error_increase"
    at_least = False
    least = 0.0

    def __init__(
        self, target: float, error: Callable[[nn.Module], float], dense_error: float
    ) -> None:
        super().__init__(target)
        self.error, self.dense_error = error, dense_error

    def measurement(self, candidates: Candidates) -> Callable[[float], float]:
        """The increase of the error."""
        return lambda level: self.error(candidates.network_at(level)) - self.dense_error

    def describe(self, value: float) -> str:
        """The error in words."""
        error = self.dense_error + value
        return (
            f"the error is {error:.2f} %, {value:+.2f} points over the {self.dense_error:.2f} % of "
            "the dense network"
        )

    def is_met(self, value: float) -> bool:
        """Whether the increase is at most the target, up to rounding of the difference."""
        return value <= self.target + 1e-9


def ratio_budget(
    macs_ratio: float | None = None, parameters_ratio: float | None = None
) -> Budget | None:
    """The budget with a given ratio; None if no ratio is given.

    Raises:
        ValueError: both are given, or one is out of range.
    """
    if macs_ratio is not None and parameters_ratio is not None:
        raise ValueError("give macs_ratio or parameters_ratio, not both")
    if macs_ratio is not None:
        return MacsRatio(macs_ratio)
    return None if parameters_ratio is None else ParametersRatio(parameters_ratio)


def find_level(candidates: Candidates, budget: Budget) -> float:
    """The threshold of the network that a budget selects, found by bisection.

    Raises:
        ValueError: no threshold meets the budget. The message says which value can be met.
    """
    value = budget.measurement(candidates)
    budget.measured = {}

    def met(index: int) -> bool:
        level = float(levels[index])
        if level not in budget.measured:
            budget.measured[level] = value(level)
        return budget.is_met(budget.measured[level])

    levels = candidates.levels if budget.at_least else candidates.levels.flip(0)
    # From the best network to the one that meets the budget most easily.
    low, high = 0, len(levels) - 1
    if not met(high):
        raise budget.refusal(candidates, float(levels[high]))
    while low < high:
        middle = (low + high) // 2
        if met(middle):
            high = middle
        else:
            low = middle + 1
    if budget.at_least:
        high = budget.confirm(candidates, high)
    budget.level = float(levels[high])
    return budget.level


def _ratio(
    candidates: Candidates, count: Callable[[nn.Module, Any], int]
) -> Callable[[float], float]:
    """A function from a threshold to the ratio of a count of the dense to that of the smaller
    network.
    """
    net, x = candidates.net, candidates.example_input
    device, plain = torch.device("meta"), without_idle_hooks(net, x)
    while True:
        shape = to_precision(copy_network(plain).to(device), torch.float32)
        example = convert(x, torch.float32, device)
        try:
            dense = count(shape, example)
            if candidates.dense is not net:
                whole = copy_network(candidates.dense).to(device)
                dense = count(to_precision(whole, torch.float32), example)
            break
        except Exception:  # the forward pass of some networks depends on values
            if device.type == "cpu":
                raise
            device = torch.device("cpu")

    def ratio(level: float) -> float:
        small = copy_network(shape)
        cut(small, candidates.gates, candidates.units_at(level))
        return dense / count(small, example)

    return ratio
