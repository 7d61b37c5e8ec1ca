"""What units cost: against networks that are really cut, by hand, and by enumeration."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock

from pyro_sbp import networks
from pyro_sbp.gates.attention import separate_attention
from pyro_sbp.gates.probing import find_gates
from pyro_sbp.gates.surgery import cut, remaining_gates, surviving_units
from pyro_sbp.pruning.costs import UnitCosts, keep_probability, scales_by_cost
from pyro_sbp.pruning.macs import count_macs


def conv(a, b, size=3, **options):
    return nn.Conv2d(a, b, size, padding=size // 2, **options)


class Residual(nn.Module):
    """A stream that layers read and write, whole and in groups, beside a depthwise convolution,
    and a concatenation whose single features are gated too."""

    def __init__(self, width=12, grouped=True):
        super().__init__()
        self.stem, self.depthwise = conv(3, width), conv(width, width, groups=width)
        self.same = conv(width, width)
        self.in_groups = conv(width, width, groups=max(2, width // 4)) if grouped else None
        self.wide = conv(width, 2 * width, groups=4 if grouped else 1)
        self.both = nn.BatchNorm2d(3 * width)
        self.up = nn.ConvTranspose2d(3 * width, 5, 2, stride=2)
        self.fc, self.head = nn.Linear(5 * 64, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = self.depthwise(self.stem(x)).relu()
        x = x + self.same(x)
        if self.in_groups is not None:
            x = x + self.in_groups(x.flip(1))  # which has units in other groups than it writes
        x = self.both(torch.cat([x, self.wide(x)], 1)).relu()
        return self.head(self.fc(self.up(x).relu().flatten(1)).relu())


class ByFunction(nn.Module):
    """A network that calls no layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x):
        return F.linear(F.linear(x, self.a.weight).relu(), self.b.weight)


def with_gates(net, shape, features=()):
    torch.manual_seed(0)
    x = torch.randn(2, *shape)
    return net.eval(), find_gates(net, x, features), x[:1]


def masks(gates, share, seed):
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.rand(g.size, generator=generator) > share for g in gates}


def cut_to(net, gates, units):
    small = copy.deepcopy(net)
    cut(small, gates, units)
    return small


def physical(units):
    return {name: unit.remaining.float() for name, unit in units.items()}


def resnet():
    """A stage with a convolution and an identity as shortcuts, and three stages of one block."""
    return torchvision.models.ResNet(BasicBlock, [1, 2, 1, 1])


def mobilenet():
    """Blocks with and without a shortcut."""
    # The expansion, the number of channels, the number of blocks, and the stride of each stage.
    blocks = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2]]
    return torchvision.models.MobileNetV2(inverted_residual_setting=blocks)


@pytest.mark.parametrize(
    ("make", "shape", "features"),
    [
        (networks.LeNet5, (1, 28, 28), ["fc1"]),
        (Residual, (3, 4, 4), ["fc"]),
        (resnet, (3, 64, 64), []),
        (mobilenet, (3, 64, 64), []),
    ],
)
def test_whole_units_cost_what_the_cut_network_has(make, shape, features):
    net, gates, x = with_gates(make(), shape, features)
    costs = UnitCosts(net, gates, x)
    assert len(gates) >= 4 and costs.expected({}) == count_macs(net, x)
    counts = set()
    for seed, share in enumerate((0.1, 0.5, 0.9)):
        units = surviving_units(gates, masks(gates, share, seed))
        small = cut_to(net, gates, units)
        counts.add(count_macs(small, x))
        assert costs.expected(physical(units)) == count_macs(small, x)
        # And again of what is left, with a selection before dense layers.
        left = remaining_gates(small, gates, units)
        again = surviving_units(left, masks(left, 0.4, seed))
        found = UnitCosts(small, left, x).expected(physical(again))
        assert found == count_macs(cut_to(small, left, again), x)
    assert len(counts) == 3


def test_a_layer_called_twice_on_what_it_writes():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.same, self.head = nn.Linear(3, 7), nn.Linear(7, 7), nn.Linear(7, 2)

        def forward(self, x):
            return self.head(self.same(self.same(self.stem(x)).relu()).relu())

    net, gates, x = with_gates(Twice(), (3,))
    (gate,) = gates
    p = torch.linspace(0.1, 1, 7, dtype=torch.float64)
    both = p.sum() ** 2 - (p**2).sum() + p.sum()
    expected = 3 * p.sum() + 2 * both + 2 * p.sum()
    assert UnitCosts(net, gates, x).expected({gate.name: p}) == pytest.approx(float(expected))


def test_the_expectation_is_the_sum_over_all_sets_of_units():
    net, gates, x = with_gates(Residual(4), (3, 4, 4))
    costs = UnitCosts(net, gates, x)
    stream, wide = gates[:2]
    assert (stream.size, wide.size) == (4, 8)
    p = torch.rand(8, dtype=torch.float64)

    def of(p):
        return costs.expected({stream.name: p[:4], wide.name: torch.cat([p[4:], p.new_ones(4)])})

    expected = 0.0
    for units in itertools.product((0.0, 1.0), repeat=8):
        there = torch.tensor(units, dtype=torch.float64)
        expected += float(torch.where(there > 0, p, 1 - p).prod()) * of(there)
    assert of(p) == pytest.approx(expected, rel=1e-12)


def test_what_a_unit_of_lenet_5_costs():
    net, gates, x = with_gates(networks.LeNet5(), (1, 28, 28), ["fc1"])
    costs = UnitCosts(net, gates, x)
    assert costs.per_unit() == {
        "conv1": 24**2 * 25 + 8**2 * 25 * 50,
        "conv2": 8**2 * 25 * 20 + 16 * 500,
        "fc1_input": 500,
        "fc1": 800 + 10,
    }
    mean = (20 * 94_400 + 50 * 40_000 + 800 * 500 + 500 * 810) / 1370
    assert costs.relative()["conv1"] == pytest.approx(94_400 / mean)
    ratios = {name: float(f"{ratio:.3g}") for name, ratio in costs.relative().items()}
    assert ratios == {"conv1": 27.6, "conv2": 11.7, "fc1_input": 0.146, "fc1": 0.236}


def test_a_unit_costs_what_goes_with_it():
    net, gates, x = with_gates(Residual(), (3, 4, 4), ["fc"])
    costs = UnitCosts(net, gates, x)
    for gate in gates:
        without = 1 - torch.eye(gate.size)
        lost = [costs.expected({}) - costs.expected({gate.name: keep}) for keep in without]
        assert costs.per_unit()[gate.name] == pytest.approx(sum(lost) / gate.size)


def test_the_weights_of_the_kl():
    net, gates, x = with_gates(networks.LeNet5(), (1, 28, 28), ["fc1"])
    costs = UnitCosts(net, gates, x)
    scale = {"conv1": 3.0, "conv2": 1.0, "fc1_input": 1.0, "fc1": 0.0}
    assert scales_by_cost(scale, costs, 0.0) == scale
    ones = scales_by_cost(dict.fromkeys(scale, 1.0), costs, 2.0)
    # The average unit weighs 1 + 2, and none less than before.
    total = sum(ones[gate.name] * gate.size for gate in gates)
    assert total == pytest.approx(3 * sum(gate.size for gate in gates))
    assert min(ones.values()) >= 1
    weighed = scales_by_cost(scale, costs, 2.0)
    assert weighed == {name: pytest.approx(scale[name] * ones[name]) for name in scale}
    assert weighed["conv1"] == pytest.approx(3 * (1 + 2 * costs.relative()["conv1"]))


def test_products_outside_of_layers_cost_what_they_are():
    net, gates, x = with_gates(ByFunction(), (4,))
    costs = UnitCosts(net, gates, x)
    assert costs.per_unit() == {"a": 6.0}  # a row of 4 weights, and a column of 2
    p = torch.tensor([0, 0.5, 1, 1, 0.25])
    assert costs.expected({}) == count_macs(net, x) == 30
    assert costs.expected({"a": p}) == pytest.approx(6 * 2.75)


def test_heads_cost_their_part_of_the_products_inside_attention():
    """7 tokens, 3 heads of 4 dimensions: by hand, and against networks that are cut."""
    block = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)
    two = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
    net = separate_attention(nn.Sequential(nn.Linear(5, 12), two, nn.Linear(12, 2)))
    net, gates, x = with_gates(net, (7, 5))
    costs = UnitCosts(net, gates, x)
    assert [gate.size for gate in gates] == [3, 20, 3, 20]
    # 4 rows of 12 columns in 3 layers, 4 columns of 12 rows; queries by keys, weights by values.
    head, neuron = 7 * 4 * 12 * 4 + 2 * 7 * 7 * 4, 7 * 2 * 12
    assert list(costs.per_unit().values()) == pytest.approx([head, neuron] * 2)
    for seed, share in enumerate((0.2, 0.5, 0.8)):
        units = surviving_units(gates, masks(gates, share, seed))
        small = cut_to(net, gates, units)
        assert costs.expected(physical(units)) == pytest.approx(count_macs(small, x))
        left = remaining_gates(small, gates, units)
        again = surviving_units(left, masks(left, 0.4, seed))
        found = UnitCosts(small, left, x).expected(physical(again))
        assert found == pytest.approx(count_macs(cut_to(small, left, again), x))


def test_units_without_macs_cannot_weigh():
    net, gates, x = with_gates(ByFunction(), (4,))
    costs = UnitCosts(net, gates, x[:0])
    with pytest.raises(ValueError, match="no unit has MACs, so units cannot be weighted"):
        scales_by_cost({"a": 1.0}, costs, 1.0)


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        ({"b": torch.ones(5)}, "keep names 'b'; the gates are a"),
        ({"a": torch.ones(4)}, r"keep of gate 'a' has shape \[4\]; expected \[5\]"),
        ({"a": torch.ones(1, 5)}, r"has shape \[1, 5\]; expected \[5\]"),
        ({"a": torch.full((5,), 1.1)}, r"keep of gate 'a' has a value outside of \[0, 1\]"),
        ({"a": torch.full((5,), -0.1)}, r"a value outside of \[0, 1\]"),
        ({"a": torch.full((5,), torch.nan)}, r"a value outside of \[0, 1\]"),
    ],
)
def test_what_is_no_probability_is_refused(keep, words):
    net, gates, x = with_gates(ByFunction(), (4,))
    with pytest.raises(ValueError, match=words):
        UnitCosts(net, gates, x).expected(keep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_probability_to_keep_a_unit(dtype):
    mean, deviation = torch.tensor([0.3, 0.9, 1e-3], dtype=dtype), torch.tensor(0.3, dtype=dtype)
    p = keep_probability(mean / deviation)
    point = mean / p  # a unit that is there with p, and then is this, has mean and deviation
    torch.testing.assert_close(point**2 * p * (1 - p), (deviation**2).expand(3))
    ends = torch.tensor([0.0, 1.0, 1e30, torch.inf], dtype=dtype)
    assert keep_probability(ends).tolist() == [0.0, 0.5, 1.0, 1.0]
    assert keep_probability(ends).dtype == dtype
