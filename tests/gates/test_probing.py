"""find_gates: which units reach which columns, measured."""

import pytest
import torch
from torch import nn

from pyro_sbp import networks
from pyro_sbp.gates.classes import codes
from pyro_sbp.gates.gated_network import GatedNetwork
from pyro_sbp.gates.probing import find_gates
from pyro_sbp.gates.surgery import shrink


def sizes(gates):
    return {gate.name: gate.size for gate in gates}


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (networks.LeNet500_300(), {"fc1_input": 784, "fc1": 500, "fc2": 300}),
        (networks.LeNet300_100(), {"fc1_input": 784, "fc1": 300, "fc2": 100}),
        (networks.LeNet5(), {"conv1": 20, "conv2": 50, "fc1_input": 800, "fc1": 500}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_gates_of_the_papers_in_the_order_of_data_flow(net, expected):
    gates = find_gates(net, torch.randn(2, 1, 28, 28), input_features=["fc1"])
    assert list(sizes(gates).items()) == list(expected.items())


def test_vgg_like_has_all_its_gates_and_their_batch_norms():
    gates = find_gates(networks.VGGLike(), torch.randn(1, 3, 32, 32))
    assert [gate.size for gate in gates] == [64, 64, 128, 128] + [256] * 3 + [512] * 7
    assert all(len(gate.channelwise) == 1 for gate in gates)


def test_flattened_channels_are_blocks_of_columns():
    gates = find_gates(networks.LeNet5(), torch.randn(1, 1, 28, 28))
    conv2 = gates[1]
    assert conv2.readers[0].layer == "fc1"
    assert torch.equal(conv2.readers[0].units, torch.arange(800) // 16)


@pytest.mark.parametrize("size", [1, 2, 3, 64, 100])
def test_codes_tell_all_units_apart(size):
    patterns = codes(size)
    assert len({tuple(column.tolist()) for column in patterns.T}) == size
    ones, zeros = patterns[0::2], patterns[1::2]
    assert torch.equal(ones, ~zeros)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 5, 1), nn.Conv2d(5, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.b(self.a(x).relu())
        return self.head(x.mean((2, 3)))


def test_units_that_are_added_belong_together():
    gates = find_gates(Residual(), torch.randn(2, 3, 4, 4))
    assert sizes(gates) == {"stem": 6, "a": 5}
    assert {span.layer for span in gates[0].writers} == {"stem", "b"}
    assert {span.layer for span in gates[0].readers} == {"a", "head"}


class Concatenation(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(3, 2), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(torch.cat([self.a(x), self.b(x)], -1).relu())


def test_concatenated_units_keep_their_own_columns():
    gates = find_gates(Concatenation(), torch.randn(2, 3))
    assert gates[0].readers[0].units.tolist() == [0, 1, 2, 3, -1, -1]
    assert gates[1].readers[0].units.tolist() == [-1, -1, -1, -1, 0, 1]


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.head = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.norm(self.a(x)))


@pytest.mark.parametrize(
    ("net", "left"),
    [
        (Normalised(), {"a": "several", "head": "output"}),
        (nn.Sequential(nn.Linear(3, 4), nn.ReLU()), {"0": "output"}),
        (nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1), nn.Linear(4, 2)), {"0": "several"}),
    ],
    ids=["layer norm", "output", "softmax"],
)
def test_what_cannot_be_gated_is_not_prunable_with_its_reason(net, left):
    gates = find_gates(net, torch.randn(2, 3))
    assert gates == []
    for name, word in left.items():
        assert word in gates.not_prunable[name]


def test_what_cannot_be_cut_is_not_prunable():
    class AddsInput(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(x + self.a(x))

    gates = find_gates(AddsInput(), torch.randn(2, 4))
    assert gates == []
    assert "cutting it fails" in gates.not_prunable["a"]


def test_the_network_is_not_changed():
    net = networks.VGGLike(width=8).train()
    net.fc1.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    find_gates(net, torch.randn(2, 3, 32, 32))
    assert net.training and all(module.training for module in net.modules())
    assert not net.fc1.weight.requires_grad
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_several_inputs_and_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 2)

        def forward(self, x, y):
            return {"sum": self.head(self.a(x) + self.b(y))}

    net, x = Two(), (torch.randn(5, 3), torch.randn(5, 2))
    gates = find_gates(net, x)
    assert sizes(gates) == {"a": 4}
    assert GatedNetwork(net, gates)(x, {"a": torch.zeros(4)})["sum"].shape == (5, 2)


def test_input_features_must_name_a_dense_layer():
    with pytest.raises(ValueError, match=r"'conv1'.*fc1, fc2"):
        find_gates(networks.LeNet5(), torch.randn(1, 1, 28, 28), input_features=["conv1"])


def test_a_network_that_insists_on_its_width_is_not_prunable():
    class Insists(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            hidden = self.a(x)
            assert hidden.shape[-1] == 4, "four, please"
            return self.head(hidden)

    gates = find_gates(Insists(), torch.randn(2, 3))
    assert gates == [] and "four, please" in gates.not_prunable["a"]


def test_a_weight_used_by_name_is_seen():
    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            hidden = self.a(x)
            return nn.functional.linear(input=hidden, weight=self.head.weight)

    net, x = ByName(), torch.randn(2, 3)
    gates = find_gates(net, x)
    assert sizes(gates) == {"a": 4}
    theta = torch.rand(4)
    gated = GatedNetwork(net, gates)
    torch.testing.assert_close(gated(x, {"a": theta}), gated(x, {"a": theta.expand(2, 4)}))


def test_an_input_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"LeNet5 cannot be called on .*\[2, 3, 28, 28\]\): "):
        find_gates(networks.LeNet5(), torch.randn(2, 3, 28, 28))


def test_an_input_without_a_batch():
    gates = find_gates(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(3))
    assert sizes(gates) == {"0": 5}


class Conv1D(nn.Module):
    """As GPT-2 has it: a dense layer whose weight is transposed."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, self.nx), self.weight).view(*x.shape[:-1], self.nf)


def test_the_dense_layer_of_gpt2_reads_and_writes():
    torch.manual_seed(0)
    net, x = nn.Sequential(Conv1D(6, 4), nn.GELU(), Conv1D(3, 6)).double(), torch.randn(2, 5, 4)
    gates, x = find_gates(net, x), x.double()
    assert sizes(gates) == {"0": 6}
    theta = torch.tensor([0.5, 0, 2, 1, 0, 3]).double()
    masked = GatedNetwork(net, gates)(x, {"0": theta[None]})
    torch.testing.assert_close(GatedNetwork(net, gates)(x, {"0": theta}), masked)
    small = shrink(net, gates, {"0": theta}, x)
    torch.testing.assert_close(small(x), masked)
    assert (small[0].nf, small[2].nx, small[2].weight.shape) == (4, 4, (4, 3))
