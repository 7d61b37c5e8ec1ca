"""choose_units: what every gate keeps where its units are under the threshold."""

import pytest
import torch
from torch import nn

import pyro_sbp as sbp
from pyro_sbp.pruning.choosing import choose_units
from pyro_sbp.pruning.exactness import checked_shrink


class Concatenated(nn.Module):
    """Two convolutions whose features, side by side, are a third gate."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 6, 3), nn.Conv2d(1, 5, 3)
        self.fc, self.out = nn.Linear(11 * 16, 7), nn.Linear(7, 3)

    def forward(self, x):
        features = torch.cat([self.a(x).flatten(1), self.b(x).flatten(1)], 1).sigmoid()
        return self.out(self.fc(features).sigmoid())


def grouped():
    """A chain of grouped convolutions: each unit needs units of its own group elsewhere."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.Sigmoid(),
        nn.Conv2d(8, 8, 1, groups=4), nn.Sigmoid(),
        nn.Conv2d(8, 8, 1, groups=2), nn.Sigmoid(),
        nn.Flatten(), nn.Linear(8 * 16, 3),
    )  # fmt: skip


NETWORKS = {
    "lenet5": (sbp.networks.LeNet5, (2, 1, 28, 28), ["fc1"]),
    "concatenated": (Concatenated, (2, 1, 6, 6), ["fc"]),
    "grouped": (grouped, (2, 1, 6, 6), ["7"]),
}


def made(name, seed=0):
    torch.manual_seed(seed)
    make, shape, features = NETWORKS[name]
    net, x = make(), torch.rand(shape)
    with torch.no_grad():  # a single ReLU of negative input would make the output constant
        for parameter in net.parameters():
            parameter.abs_()
    gates = sbp.find_gates(net, x, input_features=features)
    assert len(gates) >= 4
    mean = {gate.name: 0.5 + torch.rand(gate.size) for gate in gates}
    return net, gates, mean, x


def check(net, gates, mean, x, choice, least=1):
    small, _ = checked_shrink(net, gates, choice.theta, x, choice.units)
    for gate in gates:
        assert choice.units[gate.name].kept.sum() >= min(least, gate.size), gate
    small, x = small.double().requires_grad_(False), torch.rand_like(x, dtype=torch.float64)
    first, second = small(x[:1]), small(3 * x[1:])
    assert float((first - second).abs().max()) > 1e-9 * float(first.abs().max())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", range(4))
def test_gates_that_meet_keep_units_that_reach_each_other(name, seed):
    net, gates, mean, x = made(name, seed)
    for least in (1, 3):
        for share in (0.0, 0.02, 0.3):  # of the units of a gate that reach the threshold
            snr = {}
            for gate in gates:
                over = torch.rand(gate.size) < share * torch.randint(2, ())
                snr[gate.name] = torch.rand(gate.size) + over
            choice = choose_units(net, gates, mean, snr, x, min_units=least)
            check(net, gates, mean, x, choice, least)


def test_the_best_channel_is_kept_with_its_best_feature():
    net, gates, mean, x = made("lenet5")
    snr = {gate.name: torch.rand(gate.size) for gate in gates}
    snr["conv1"] += 1
    choice = choose_units(net, gates, mean, snr, x)
    channel = int(snr["conv2"].argmax())
    assert choice.units["conv2"].kept.nonzero().flatten().tolist() == [channel]
    features = snr["fc1_input"].view(50, 16)[channel]
    kept = choice.units["fc1_input"].kept.nonzero().flatten().tolist()
    assert kept == [16 * channel + int(features.argmax())]
    assert not any(units.zeroed.any() for units in choice.units.values())
    assert set(choice.held) == {"conv2", "fc1_input", "fc1"}


@pytest.mark.parametrize("name", ["lenet5", "concatenated"])
def test_of_units_that_are_tied_one_is_kept(name):
    net, gates, mean, x = made(name)
    snr = {gate.name: torch.full((gate.size,), 0.1) for gate in gates}
    choice = choose_units(net, gates, mean, snr, x)
    # Of the features every channel gate needs one.
    counts = {name: int(units.kept.sum()) for name, units in choice.units.items()}
    features = 2 if name == "concatenated" else 1
    assert counts == {n: features if n.endswith("_input") else 1 for n in counts}
    assert choice.threshold == 1.0 and set(choice.held) == set(counts)


def test_nothing_is_left_only_without_a_least_number_of_units():
    net, gates, mean, x = made("lenet5")
    snr = {gate.name: torch.rand(gate.size) for gate in gates}
    with pytest.raises(ValueError, match="with min_units 0 removes every unit"):
        choose_units(net, gates, mean, snr, x, min_units=0)
