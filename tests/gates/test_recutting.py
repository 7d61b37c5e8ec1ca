"""A network that was cut is cut again: its gates are known without probing it anew."""

import copy

import pytest
import torch
import torchvision
from test_awkward_networks import CASES, Net, conv, grouped, image
from torch import nn
from torchvision.models.resnet import BasicBlock

from pyro_sbp import networks
from pyro_sbp.deployment import loading, saving
from pyro_sbp.gates.calling import call
from pyro_sbp.gates.gated_network import GatedNetwork
from pyro_sbp.gates.layers import Select, is_channelwise
from pyro_sbp.gates.nested import convert
from pyro_sbp.gates.probing import find_gates
from pyro_sbp.gates.surgery import (
    relative_difference,
    remaining_gates,
    shrink,
    surviving_units,
)
from pyro_sbp.gates.units import Units


def lenet5():
    return networks.LeNet5(), image(1, 28, 28), ["fc1"]


def lenet_of_pixels():
    return networks.LeNet300_100(in_features=36), image(36), ["fc1", "fc3"]


def features_of_a_concatenation():
    """Features of two layers, one of which is read elsewhere too, behind a dense layer's input."""

    def forward(n, x):
        a, b = n.a(x).relu(), n.b(x).relu()
        return n.head(torch.cat([a.flatten(1), b.flatten(1)], 1)) + n.other(a).mean((2, 3))

    layers = {"a": conv(2, 4), "b": conv(2, 3, 3), "head": nn.Linear(7 * 9, 2), "other": conv(4, 2)}
    return Net(forward, **layers), image(2, 3, 3), ["head"]


def resnet():
    """A stage with a convolution and an identity as shortcuts, and three stages of one block."""
    net = torchvision.models.ResNet(BasicBlock, [1, 2, 1, 1], num_classes=5)
    return net, image(3, 32, 32), []


def mobilenet():
    """Blocks with and without a shortcut."""
    # The expansion, the number of channels, the number of blocks, and the stride of each stage.
    blocks = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2]]
    net = torchvision.models.MobileNetV2(5, width_mult=0.35, inverted_residual_setting=blocks)
    return net, image(3, 32, 32), []


FEATURED = [lenet5, lenet_of_pixels, features_of_a_concatenation, resnet, mobilenet]
#: Networks of which no gate is found, or not the same on every input.
WITHOUT = {"tied_weights", "nothing_to_gate", "branches_on_data"}
ALL = [*FEATURED, *(make for make in CASES if make.__name__ not in WITHOUT)]
EACH = pytest.mark.parametrize("make", ALL, ids=lambda make: make.__name__)


def prepared(make):
    torch.manual_seed(3)
    net, x, features = make()
    net, x = net.double().eval(), convert(x, torch.float64)
    features = features if make in FEATURED else []
    return net, x, find_gates(net, x, features)


def random_theta(gates, share):
    return {
        gate.name: (0.5 + torch.rand(gate.size, dtype=torch.float64))
        * (torch.rand(gate.size) > share)
        for gate in gates
    }


def recut(net, gates, theta, x):
    units = surviving_units(gates, theta)
    small = shrink(net, gates, theta, x, units)
    return small, remaining_gates(small, gates, units), units


def spans(gate, kind):
    return {span.layer: (span.units.tolist(), span.groups) for span in getattr(gate, kind)}


@EACH
def test_the_gates_that_remain_are_those_that_probing_finds(make):
    net, x, gates = prepared(make)
    small, remaining, units = recut(net, gates, random_theta(gates, 0.3), x)
    features = [gate.readers[0].layer for gate in remaining if not gate.writers]
    found = {gate.name: gate for gate in find_gates(small, x, features)}
    names = {}
    for gate in remaining:
        assert gate.size == int(units[gate.name].remaining.sum())
        writer = gate.writers[0].layer if gate.writers else f"{gate.readers[0].layer}_input"
        names[gate.name] = writer
        assert writer in found, f"probing does not find {writer}"
        for kind in ("writers", "readers", "channelwise", "selects"):
            assert spans(gate, kind) == spans(found[writer], kind), (gate.name, kind)
    assert list(names.values()) == list(found)  # all of them, in the same order


@EACH
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_three_cuts_in_a_row_are_exact(make, share):
    net, x, gates = prepared(make)
    small, now = net, gates
    everything = {gate.name: torch.ones(gate.size, dtype=torch.bool) for gate in gates}
    so_far = {name: Units(units, units) for name, units in everything.items()}
    whole = {gate.name: torch.ones(gate.size, dtype=torch.float64) for gate in gates}
    for step in range(3):
        # One gate after the other, as recursive pruning does, and the rest at once.
        theta = random_theta(now[step : step + 1] if step < 2 else now, share)
        masked = GatedNetwork(small, now)(x, {name: value[None] for name, value in theta.items()})
        small, now, units = recut(small, now, theta, x)
        assert relative_difference(masked, call(small, x)) <= 1e-10
        for name, value in theta.items():
            whole[name][so_far[name].remaining] *= value
        so_far = {name: so_far[name].then(unit) for name, unit in units.items()}
        assert [gate.size for gate in now] == [int(u.remaining.sum()) for u in so_far.values()]
    # The same as all of it at once.
    for name, value in whole.items():
        value[~so_far[name].remaining] = 0
    masked = GatedNetwork(net, gates)(x, {name: value[None] for name, value in whole.items()})
    assert relative_difference(masked, call(small, x)) <= 1e-10


def test_a_select_before_a_layer_that_has_one_becomes_one_of_both(tmp_path):
    net, x, gates = prepared(lenet5)
    theta = {gate.name: torch.ones(gate.size).double() for gate in gates}
    theta["fc1_input"][::3] = 0
    small, now, first = recut(net, gates, theta, x)
    assert small.fc1.select.index.tolist() == [i for i in range(800) if i % 3]
    # Of the channels that flow into the Select some go, and of the features that it lets through.
    channels = torch.ones(50).double()
    channels[[4, 7]] = 0
    features = torch.ones(now[2].size).double()
    features[5:9] = 0
    smaller, then, second = recut(small, now, {"conv2": channels, "fc1_input": features}, x)
    kept = torch.nonzero(first["fc1_input"].then(second["fc1_input"]).remaining).flatten().tolist()
    arriving = [16 * c + i for c in range(50) if c not in (4, 7) for i in range(16)]
    assert [arriving[i] for i in smaller.fc1.select.index.tolist()] == kept
    assert isinstance(smaller.fc1.layer, nn.Linear) and isinstance(smaller.fc1.select, Select)
    assert [gate.name for gate in then] == ["conv1", "conv2", "fc1_input", "fc1"]
    saving.save(smaller, tmp_path / "net", constructor=networks.LeNet5)
    loaded = loading.load(tmp_path / "net")
    assert torch.equal(loaded(x), smaller(x))


def test_a_convolution_that_comes_to_one_channel_a_group_is_cut_again():
    net, x, _ = grouped()
    net, x = net.double().eval(), x.double()
    gates = find_gates(net, x)
    theta = {gate.name: torch.ones(gate.size).double() for gate in gates}
    theta["a"] = torch.tensor([1.0, 0, 0] * 4).double()
    theta["b"] = torch.tensor([1.0, 0, 0, 0, 0, 0] * 4).double()
    small, now, _ = recut(net, gates, theta, x)
    assert is_channelwise(small.b) and small.b.groups == 4
    theta = {"a": torch.tensor([1.0, 0, 2, 3]).double(), "b": torch.tensor([1.0, 0, 1, 1]).double()}
    masked = GatedNetwork(copy.deepcopy(small), now)(x, {n: v[None] for n, v in theta.items()})
    smaller, _, _ = recut(small, now, theta, x)
    assert relative_difference(masked, smaller(x)) <= 1e-10
    assert smaller.b.groups == smaller.b.in_channels == smaller.b.out_channels == 3
