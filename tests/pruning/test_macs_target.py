"""Networks with a given ratio of MACs, and weights of the KL divergence that lead to it."""

import pytest
import torch
from torch import nn

from pyro_sbp.gates.copies import copy_network
from pyro_sbp.gates.probing import find_gates
from pyro_sbp.gates.surgery import cut
from pyro_sbp.networks import LeNet5
from pyro_sbp.pruning.budgets import MacsRatio
from pyro_sbp.pruning.choosing import choose_units
from pyro_sbp.pruning.costs import UnitCosts
from pyro_sbp.pruning.macs import count_macs
from pyro_sbp.pruning.macs_control import KLControl, soft_keep
from pyro_sbp.pruning.macs_target import CLOSE, choose_by_macs, largest_ratio


def lenet5():
    torch.manual_seed(0)
    net, x = LeNet5(), torch.rand(2, 1, 28, 28)
    return net, find_gates(net, x, ("fc1",)), x


def macs_of(net, gates, units, x):
    small = copy_network(net)
    cut(small, gates, units)
    return count_macs(small, x)


@pytest.mark.parametrize("ratio", [3.0, 11.0, 30.0])
def test_a_network_is_closer_to_a_ratio_of_macs_than_by_a_threshold(ratio):
    net, gates, x = lenet5()
    costs, dense = UnitCosts(net, gates, x[:1]), count_macs(net, x[:1])
    mean = {gate.name: torch.ones(gate.size) for gate in gates}
    # All units of a layer have nearly the same score, so a threshold removes a layer at once.
    steps = {"conv1": 2.0, "conv2": 3.0, "fc1_input": 1.0, "fc1": 4.0}
    score = {name: steps[name] + 0.01 * torch.rand(len(one)) for name, one in mean.items()}
    by_threshold = choose_units(net, gates, mean, score, x, budget=MacsRatio(ratio))
    choice, _ = choose_by_macs(
        net, gates, mean, score, x, costs,
        criterion="snr", ratio=ratio, threshold=1.0, dense=net, dense_macs=float(dense),
    )  # fmt: skip
    found = dense / macs_of(net, gates, choice.units, x[:1])
    alone = dense / macs_of(net, gates, by_threshold.units, x[:1])
    assert ratio <= found <= alone
    assert found <= CLOSE * ratio
    if alone > CLOSE * ratio:
        assert found < alone


@pytest.mark.parametrize(
    ("large", "small", "exchanged"),
    [(1.5, 2.0, True), (0.4, 2.0, False), (1.5, 5.0, False)],
    ids=["similar scores", "a much weaker unit", "much stronger units"],
)
def test_a_unit_with_a_large_share_of_the_macs_is_kept_in_place_of_small_ones(
    large, small, exchanged
):
    """LeNet-5 with 2-8-118-119 units has 32.9 times fewer MACs, and with 1-8-118-119 units 51."""
    net, gates, x = lenet5()
    costs, dense = UnitCosts(net, gates, x[:1]), count_macs(net, x[:1])
    mean = {gate.name: torch.ones(gate.size) for gate in gates}
    score = {name: torch.full_like(one, -torch.inf) for name, one in mean.items()}
    for name, kept in (("conv1", 2), ("conv2", 8), ("fc1", 119)):
        score[name][:kept] = small + 0.01 * torch.arange(kept)
    score["fc1_input"][: 7 * 16 + 6] = small + 0.01 * torch.arange(7 * 16 + 6)
    score["fc1_input"][20 * 16] = 9.0  # cannot be kept, because its channel is removed
    score["conv1"][0] = large

    by_threshold = choose_units(net, gates, mean, score, x, threshold=min(large, 1.0))
    assert dense / macs_of(net, gates, by_threshold.units, x[:1]) == pytest.approx(32.93, abs=0.01)
    budget = choose_units(net, gates, mean, score, x, budget=MacsRatio(35.0))
    assert dense / macs_of(net, gates, budget.units, x[:1]) > 50
    choice, reached = choose_by_macs(
        net, gates, mean, score, x, costs,
        criterion="snr", ratio=35.0, threshold=1.0, dense=net, dense_macs=float(dense),
    )  # fmt: skip
    if not exchanged:
        assert choice.units == budget.units
        return
    assert 35.0 <= dense / macs_of(net, gates, choice.units, x[:1]) <= 35.0 * CLOSE
    assert reached.ratio_by_threshold == pytest.approx(32.93, abs=0.01)
    assert int(choice.units["conv1"].kept.sum()) == 2
    # The worst of the other units, a channel of conv2 and a unit of fc1, are removed first.
    assert not choice.units["conv2"].kept[0]
    assert not choice.units["fc1"].kept[0]
    for name in score:
        assert bool((choice.units[name].kept <= by_threshold.units[name].kept).all())


def test_the_largest_ratio_is_that_of_one_unit_in_every_gate():
    net, gates, x = lenet5()
    small = nn.Sequential(
        nn.Conv2d(1, 1, 5), nn.MaxPool2d(2), nn.Conv2d(1, 1, 5), nn.MaxPool2d(2), nn.Flatten()
    )
    # One channel, and one of its 16 features, then a layer with one unit, then ten classes.
    macs = count_macs(small, x[:1]) + 1 + 10
    ones = {gate.name: 1.0 for gate in gates}
    found = largest_ratio(net, gates, UnitCosts(net, gates, x[:1]), ones, x)
    assert found == pytest.approx(count_macs(net, x[:1]) / macs)


def test_the_cost_of_a_unit_now_is_what_its_removal_saves_now():
    """Against networks that are really cut, of which every second unit is removed first."""
    net, gates, x = lenet5()
    costs = UnitCosts(net, gates, x[:1])
    ones = {gate.name: torch.ones(gate.size) for gate in gates}
    half = {name: one.clone() for name, one in ones.items()}
    for name in ("conv1", "fc1"):
        half[name][::2] = 0
    mean = dict(ones)

    def macs(keep):
        units = choose_units(net, gates, mean, keep, x, threshold=0.5).units
        return macs_of(net, gates, units, x[:1])

    now = costs.per_unit(half)
    for name in ("conv1", "conv2", "fc1"):
        fewer = {n: value.clone() for n, value in half.items()}
        unit = 1
        fewer[name][unit] = 0
        assert now[name] == pytest.approx(macs(half) - macs(fewer))
    # The second convolution reads half the channels, the first one still reads the image.
    assert now["conv2"] < costs.per_unit()["conv2"]
    relative = costs.relative(half)
    mean_cost = sum(now[n] * float(half[n].sum()) for n in now)
    mean_cost /= sum(float(value.sum()) for value in half.values())
    assert relative == {n: pytest.approx(now[n] / mean_cost) for n in now}


def test_the_smooth_count_is_that_of_a_threshold_for_clear_units():
    snr = torch.tensor([0.0, 0.33, 2.0, 4.0, 8.0, torch.inf])
    found = soft_keep(snr, 2.0)
    assert found[2] == 0.5
    assert found[[0, 1]].tolist() == pytest.approx([0, 0], abs=1e-4)
    assert found[[4, 5]].tolist() == pytest.approx([1, 1], abs=1e-3)
    assert bool((found.diff() > 0).all())


class Plant:
    """Units whose signal-to-noise ratio falls if the weight of their KL divergence exceeds what
    they bear, and rises otherwise."""

    def __init__(self, gates, speed):
        torch.manual_seed(0)
        self.bears = {gate.name: torch.logspace(-3, 2, gate.size) for gate in gates}
        self.log_snr = {gate.name: torch.full((gate.size,), 5.5) for gate in gates}
        self.speed = speed

    def snr(self):
        return {name: value.exp() for name, value in self.log_snr.items()}

    def step(self, weights):
        for name, value in self.log_snr.items():
            pull = (self.bears[name] / (weights[name] + 1e-12)).log().clamp(-1, 1)
            self.log_snr[name] = (value + self.speed * pull).clamp(-1, 6)


def test_the_strength_raises_the_cost_of_macs_or_lowers_all_weights():
    net, gates, x = lenet5()
    costs = UnitCosts(net, gates, x[:1])
    scales = {gate.name: 2.0 for gate in gates}
    far = {gate.name: torch.full((gate.size,), 100.0) for gate in gates}
    relative = costs.relative()
    control = KLControl(scales, 1.0, 1.0, costs, 20.0)
    for position in (0.3, 0.5, 0.7):  # no unit is removed, so the reference runs ahead
        found = control.update(costs, far, position)
    assert control.factor > 1 and control.macs_weight == pytest.approx(2 * control.factor - 1)
    factor, weight = 2 * control.factor, control.macs_weight
    expected = {name: factor * (1 + weight * cost) for name, cost in relative.items()}
    assert found == {name: pytest.approx(value, rel=1e-6) for name, value in expected.items()}
    near = {name: value.clone() for name, value in far.items()}
    near["conv1"][1:] = near["conv2"][1:] = near["fc1"][1:] = 0.0
    control = KLControl(scales, 1.0, 1.0, costs, 20.0)
    for position in (0.3, 0.5, 0.7):  # far more is removed than the reference asks for
        found = control.update(costs, near, position)
    assert control.ratio > 20 and 0 < control.factor < 1 and control.macs_weight == 1
    # In the parts of training in which the KL divergence is smaller, the strength stays.
    before = control.standing()
    assert control.update(costs, near, None) == pytest.approx(found)
    assert control.standing() == before


def test_the_state_of_the_controller_continues_it():
    net, gates, x = lenet5()
    costs = UnitCosts(net, gates, x[:1])
    scales = {gate.name: 1.0 for gate in gates}
    runs = [KLControl(scales, 1.0, 1.0, costs, 8.0) for _ in range(2)]
    plant = Plant(gates, speed=0.3)
    for step in range(40):
        found = runs[0].update(costs, plant.snr(), step / 60)
        if step == 25:
            runs[1].load_state_dict(runs[0].state_dict())
        elif step > 25:
            assert runs[1].update(costs, plant.snr(), step / 60) == found
        plant.step(found)
    assert runs[0].standing() == runs[1].standing() and "reference" in runs[0].standing()


def test_without_a_target_the_weights_follow_the_current_costs():
    net, gates, x = lenet5()
    costs = UnitCosts(net, gates, x[:1])
    control = KLControl({"conv1": 2.0, "conv2": 1.0, "fc1_input": 1.0, "fc1": 1.0}, 3.0, 1.0, costs)
    snr = {gate.name: torch.full((gate.size,), 100.0) for gate in gates}
    relative = costs.relative()
    found = control.update(costs, snr, 0.5)
    expected = {name: 1 + 3 * cost for name, cost in relative.items()}
    expected["conv1"] *= 2
    assert found == {name: pytest.approx(weight, rel=1e-6) for name, weight in expected.items()}
    snr["conv1"][1:] = 0.0
    # With a single channel of the first convolution, a unit of the second one costs little.
    assert control.update(costs, snr, 0.5)["conv2"] < expected["conv2"]
    assert set(control.standing()) == {"macs_ratio", "macs_weight"}
