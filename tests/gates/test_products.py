"""Weights that no layer holds are readers and writers, in products linear in their columns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from exact_cuts import check, theta_of
from torch import Tensor, nn

import pyro_sbp as sbp
from pyro_sbp.gates.gated_network import GatedNetwork
from pyro_sbp.gates.probing import find_gates
from pyro_sbp.gates.surgery import shrink

POINTS = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class TwoWeights(nn.Module):
    """Two products in one module, by a function of the input, a weight, and a bias."""

    #: The function, and whether the weights are ``[in, out]``.
    KINDS = {  # noqa: RUF012
        "matmul": (lambda x, w, b: x @ w + b, True),
        "transposed": (lambda x, w, b: x @ w.T + b, False),
        "from the left": (lambda x, w, b: (w @ x.T).T + b, False),
        "linear": (lambda x, w, b: F.linear(x, w, b), False),
        "linear of a transpose": (lambda x, w, b: F.linear(input=x, weight=w.t(), bias=b), True),
        "addmm": (lambda x, w, b: torch.addmm(b, x, w), True),
        "mm": (lambda x, w, b: x.mm(w).add(b), True),
    }

    def __init__(self, kind: str = "matmul") -> None:
        super().__init__()
        self.function, turned = self.KINDS[kind]
        sizes = [(5, 8), (8, 3)] if turned else [(8, 5), (3, 8)]
        self.first, self.second = (nn.Parameter(torch.randn(size)) for size in sizes)
        self.first_bias, self.second_bias = (nn.Parameter(torch.randn(n)) for n in (8, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.function(x, self.first, self.first_bias).relu()
        return self.function(x, self.second, self.second_bias)


class ScaledHeads(nn.Module):
    """Two heads of three numbers, whose number is an attribute of the network itself."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.inner, self.out = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        heads = F.normalize(self.inner(x).view(len(x), self.heads, -1), dim=-1)
        return self.out(heads.flatten(1))


class OwnForward(nn.Linear):
    """A dense layer that multiplies by its weight instead of calling `F.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class GraphConvolution(nn.Module):
    def __init__(self, features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = features, out_features
        self.weight = nn.Parameter(torch.randn(features, out_features))
        self.bias = nn.Parameter(torch.randn(out_features))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return edges @ (x @ self.weight) + self.bias


class Graph(nn.Module):
    """Convolutions over a graph whose edges are an input, or a buffer of the network."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = GraphConvolution(5, 8), GraphConvolution(8, 6), nn.Linear(6, 2)
        self.register_buffer("edges", torch.rand(3, 3) if inside else None)

    def forward(self, x: Tensor, edges: Tensor | None = None) -> Tensor:
        edges = self.edges if edges is None else edges
        return self.c(self.b(self.a(x, edges).relu(), edges).relu())


class Filters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.bias = nn.Parameter(torch.randn(8))
        self.norm, self.second = nn.BatchNorm2d(8), nn.Parameter(torch.randn(8, 4, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(F.conv2d(x, self.first, self.bias, padding=1)).relu()
        return F.conv_transpose2d(x, self.second, stride=2)


@pytest.mark.parametrize("kind", TwoWeights.KINDS)
def test_products_of_parameters(kind):
    torch.manual_seed(0)
    small = check(TwoWeights(kind), POINTS, first=8)
    assert sorted(small.first.shape) == [5, 5] and sorted(small.second.shape) == [3, 5]
    assert small.first_bias.shape == (5,)


def test_tensors_and_sizes_of_the_network_itself_are_named_without_a_dot():
    (gate,) = find_gates(TwoWeights(), POINTS)
    assert repr(gate) == (
        "Gate('first'; 8 units; writers: first[1]; readers: second[0]; channelwise: first_bias[0])"
    )
    (gate,) = find_gates(ScaledHeads(), POINTS)
    assert repr(gate) == "Gate('inner'; 2 units; writers: inner; readers: out; sizes: heads)"


@pytest.mark.parametrize("inside", [False, True])
def test_graph_convolutions(inside):
    torch.manual_seed(0)
    net = Graph(inside)
    small = check(net, POINTS if inside else (POINTS, torch.rand(3, 3)), a=8, b=6)
    assert (small.a.out_features, small.b.in_features, small.b.out_features) == (5, 5, 4)


def test_convolutions_with_parameters():
    torch.manual_seed(0)
    small = check(Filters(), IMAGES, first=8)
    assert small.norm.num_features == 5 and small.second.shape == (5, 4, 2, 2)


def test_noise_per_example():
    torch.manual_seed(0)
    net = TwoWeights("transposed")
    gates, theta = find_gates(net, POINTS), torch.rand(3, 8)
    out = GatedNetwork(net, gates)(POINTS, {"first": theta})
    for one in range(3):
        expected = GatedNetwork(net, gates)(POINTS[one : one + 1], {"first": theta[one]})
        torch.testing.assert_close(out[one : one + 1], expected)


def test_a_weight_that_is_used_in_two_ways_is_no_reader():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.last = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 2)
            self.first = nn.Linear(5, 8)

        def forward(self, x):
            x = self.first(x).relu()
            return self.last(x @ self.weight + x @ self.weight.T)

    torch.manual_seed(0)
    gates = find_gates(Tied(), POINTS)
    assert gates == [] and "weight" in gates.not_prunable


def test_macs_and_costs():
    torch.manual_seed(0)
    net = Graph(True)
    gates = find_gates(net, POINTS)
    theta = {gate.name: torch.ones(gate.size) for gate in gates}
    theta["a"][:3] = 0
    costs = sbp.UnitCosts(net, gates, POINTS)
    small = shrink(net, gates, theta, POINTS)
    rows, columns = 3, 5
    of_weights = rows * (5 * columns + columns * 6 + 6 * 2)
    assert sbp.count_macs(small, POINTS) == of_weights + rows * rows * (columns + 6)
    assert costs.expected(theta) <= sbp.count_macs(net, POINTS)
    assert costs.per_unit()["a"] > costs.per_unit()["b"] > 0


def test_cut_weights_are_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    net = TwoWeights()
    gates = find_gates(net, POINTS)
    theta = {name: value.float() for name, value in theta_of(gates).items()}
    small = shrink(net, gates, theta, POINTS)
    sbp.save(small, tmp_path / "small", constructor=TwoWeights)
    loaded = sbp.load(tmp_path / "small", constructor=TwoWeights)
    assert torch.equal(loaded(POINTS), small(POINTS))


def test_a_dense_layer_with_a_forward_of_its_own_is_a_layer():
    torch.manual_seed(0)
    net = nn.Sequential(OwnForward(5, 8), nn.Tanh(), OwnForward(8, 6), nn.ReLU(), nn.Linear(6, 2))
    small = check(net, POINTS, **{"0": 8, "2": 6})
    assert (small[2].in_features, small[2].out_features) == (5, 4)
