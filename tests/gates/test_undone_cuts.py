"""A cut that is tried leaves the measured copy of the network as it was."""

import pytest
import torch
from torch import nn

from pyro_sbp.gates.probing import find_gates
from pyro_sbp.gates.proving import Proof


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.logits = nn.Linear(8, 11)
        self.logits.weight = self.embedding.weight

    def forward(self, x):
        return self.logits(self.hidden(self.embedding(x)).relu())


def with_zeros():
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    nn.init.zeros_(net[2].weight)  # the copy has random numbers instead
    return net


def convolutions():
    convolution = nn.Conv2d(6, 4, 3, padding=1, groups=2)
    first = nn.Conv2d(2, 6, 3)
    return nn.Sequential(first, nn.ReLU(), convolution, nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


@pytest.mark.parametrize(
    "make, x",
    [
        (Tied, torch.arange(6).view(2, 3)),
        (with_zeros, torch.ones(2, 5)),
        (convolutions, torch.ones(2, 2, 6, 6)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_parameters_have_their_values_after_a_cut(make, x, dtype):
    torch.manual_seed(0)
    net = make().to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    gates = find_gates(net, x)
    assert len(gates)
    theta = {gate.name: (torch.arange(gate.size) % 2) * 1.5 for gate in gates}
    proof = Proof(net, x, training_paths=False)
    expected = {name: value.clone() for name, value in proof.exact.state_dict().items()}
    parameters = dict(proof.exact.named_parameters(remove_duplicate=False))
    with proof.cut(gates, theta):
        smaller = proof.exact.state_dict()
        assert any(smaller[name].shape != value.shape for name, value in expected.items())
    after = proof.exact.state_dict()
    assert all(torch.equal(after[name], value) for name, value in expected.items())
    for name, value in proof.exact.named_parameters(remove_duplicate=False):
        assert value is parameters[name]
