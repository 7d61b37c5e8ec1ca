"""Budgets and the search for the threshold that meets them."""

import pytest
import torch
from torch import nn

import pyro_sbp as sbp
from pyro_sbp.pruning.budgets import Budget, Candidates, MaxErrorIncrease, find_level
from pyro_sbp.pruning.macs import count_parameters


@pytest.fixture
def candidates():
    """Networks of 1 to 20 units: a threshold of k leaves the units k, ..., 20."""
    net = nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 3))
    x = torch.rand(2, 4)
    gates = sbp.find_gates(net, x)

    def network_at(level):
        theta = {"0": (torch.arange(1, 21) >= level).float()}
        return sbp.shrink(net, gates, theta, x)

    levels = torch.arange(1, 21).float()
    return Candidates(net, gates, x, levels, lambda level: {}, network_at, net)


class Width(Budget):
    """At most so many units."""

    name = "width"

    def measurement(self, candidates):
        return lambda level: 1 / len(candidates.network_at(level)[0].weight)

    def is_met(self, value):
        return 1 / value <= self.target

    def describe(self, value):
        return f"the network has {1 / value:.0f} units"


@pytest.mark.parametrize("width", [1, 7, 20])
def test_the_largest_network_within_a_budget_of_ones_own(candidates, width):
    budget = Width(width)
    assert find_level(candidates, budget) == 21 - width
    # Bisection over 20 levels, and the easiest one first.
    assert 1 < len(budget.measured) <= 6


def test_a_budget_that_cannot_be_met_says_what_can(candidates):
    class Impossible(Width):
        least = 0.0

    with pytest.raises(ValueError, match=r"width 0\.5 cannot be met.*20, the network has 1 units"):
        find_level(candidates, Impossible(0.5))


@pytest.mark.parametrize(("increase", "units"), [(0.0, 20), (1.0, 15), (3.9, 5), (4.0, 1)])
def test_the_smallest_network_within_an_error(candidates, increase, units):
    # The error rises by a point for every five units that are removed.
    def error(net):
        return 10.0 + (20 - len(net[0].weight) + 4) // 5

    budget = MaxErrorIncrease(increase, error, 10.0)
    level = find_level(candidates, budget)
    assert len(candidates.network_at(level)[0].weight) == units
    assert "points over the 10.00 % of the dense network" in budget.describe(1.0)


def test_an_error_that_no_network_has(candidates):
    budget = MaxErrorIncrease(0.5, lambda net: 12.0, 10.0)
    with pytest.raises(ValueError, match=r"smallest signal-to-noise ratio, 1, the error is 12\.00"):
        find_level(candidates, budget)


@pytest.mark.parametrize(
    ("target", "words"),
    [(-0.1, "expected a number >= 0"), (float("nan"), ">= 0"), ("1", "expected a number"),
     (True, "expected a number")],
)  # fmt: skip
def test_targets_out_of_range(target, words):
    with pytest.raises(ValueError, match=words):
        MaxErrorIncrease(target, lambda net: 0.0, 0.0)


def test_fewer_parameters():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 3))
    x = torch.rand(2, 4)
    model = sbp.GatedModel(net, sbp.find_gates(net, x), num_data=10)
    guide = sbp.TruncatedLogNormalGuide(model)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(torch.randn_like(parameter))
    small = sbp.prune(model, guide, x, parameters_ratio=2.5)
    dense = count_parameters(net)
    assert dense / count_parameters(small) >= 2.5
    snr = guide.snr()["0"]
    more = sbp.prune(model, guide, x, threshold=float(snr.sort().values[19 - len(small[0].weight)]))
    assert len(more[0].weight) == len(small[0].weight) + 1
    assert dense / count_parameters(more) < 2.5
    with pytest.raises(ValueError, match="macs_ratio or parameters_ratio, not both"):
        sbp.prune(model, guide, x, parameters_ratio=2, macs_ratio=2)
