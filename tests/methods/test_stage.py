"""What turns of noise on gates leave: the stage after a cut, and the posterior of all units."""

import pytest
import torch
from torch.distributions import kl_divergence

from pyro_sbp.gates.probing import find_gates
from pyro_sbp.gates.units import Units
from pyro_sbp.methods import SBP
from pyro_sbp.methods.stage import Stage, over_all_units
from pyro_sbp.networks import LeNet300_100
from pyro_sbp.pruning.choosing import Choice
from pyro_sbp.pruning.exactness import Equivalence, checked_shrink
from pyro_sbp.recipes.method_recipes import SBPRecipe


def cut(stage, x, removed, snr=5.0, held=()):
    """The stage after units were removed, where all units had the same signal-to-noise ratio."""
    theta = {gate.name: torch.ones(gate.size) for gate in stage.gates}
    for name, units in removed.items():
        theta[name][units] = 0
    units = {name: Units(value > 0, value > 0) for name, value in theta.items()}
    net, equivalence = checked_shrink(stage.net, stage.gates, theta, x, units)
    before = {name: torch.full_like(value, snr) for name, value in theta.items()}
    return stage.after(Choice(theta, units, 1.0, held), before, net, equivalence)


@pytest.fixture
def dense():
    torch.manual_seed(0)
    x = torch.rand(4, 6)
    net = LeNet300_100(in_features=6).eval()
    return Stage.dense(net, find_gates(net, x)), x


def test_units_have_the_numbers_of_the_dense_network_after_two_cuts(dense):
    stage, x = dense
    stage = cut(stage, x, {"fc1": [0, 2]})
    stage = cut(stage, x, {"fc1": [0, 296], "fc2": [1]})
    # The first and the last of the 298 units that remained are 1 and 298.
    assert torch.nonzero(stage.units["fc1"].removed).flatten().tolist() == [0, 1, 2, 298]
    assert torch.nonzero(stage.units["fc2"].removed).flatten().tolist() == [1]
    assert [gate.size for gate in stage.gates] == [296, 99]
    assert (stage.net.fc1.out_features, stage.net.fc2.out_features) == (296, 99)
    assert len(stage.score["fc1"]) == 296 and float(stage.score["fc1"].min()) == 5.0


def test_differences_and_gates_without_a_good_unit_add_up(dense):
    stage, x = dense
    stage = cut(stage, x, {"fc1": [0]}, held=("fc2",))
    worst = Equivalence(1.0, 0.0)
    stage = Stage(stage.net, stage.gates, stage.units, stage.score, stage.held, worst)
    after = cut(stage, x, {"fc1": [0]}, held=("fc1",))
    assert after.held == ("fc1", "fc2")
    assert after.equivalence.max_rel_diff_float64 == 1.0


def test_rounding_takes_the_weakest_units_of_gates_that_have_lost_some(dense):
    stage, x = dense
    assert stage.beyond_multiples(7, stage.score) == {}
    stage = cut(stage, x, {"fc1": [0]})
    stage.score["fc1"][[3, 200]] = torch.tensor([1.0, 2.0])
    assert stage.beyond_multiples(1, stage.score) == {}
    (found,) = stage.beyond_multiples(3, stage.score).values()  # 299 is 2 more than a multiple of 3
    assert found.tolist() == [3, 200]


@pytest.mark.parametrize("prior_scale", [3.0, None])
def test_a_removed_unit_has_the_prior(prior_scale):
    there = torch.tensor([True, False, True])
    loc, scale = torch.tensor([-1.0, -2.0]), torch.tensor([0.1, 0.2])
    locs, scales = over_all_units(loc, scale, there, prior_scale)
    assert torch.equal(locs[there], loc) and torch.equal(scales[there], scale)
    q, prior = SBP.distributions(locs, scales, SBPRecipe(prior_scale=prior_scale))
    kl = kl_divergence(q, prior)
    assert float(kl[1]) < 1e-3 < 1 < float(kl[there].min())


def test_a_network_without_gates_is_refused():
    with pytest.raises(
        ValueError,
        match="no layer of Linear is prunable: the network: reaches an output of the network",
    ):
        SBP(torch.nn.Linear(3, 2), torch.rand(2, 3), SBPRecipe(), 10)
