"""fold and GatedNetwork: noise in the weights is noise on the activations."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pyro_sbp.gates.folding import fold
from pyro_sbp.gates.gate import Gate, Span
from pyro_sbp.gates.gated_network import GatedNetwork
from pyro_sbp.gates.probing import find_gates
from pyro_sbp.networks import LeNet5


@pytest.fixture
def lenet():
    torch.manual_seed(0)
    net = LeNet5().double()
    x = torch.randn(3, 1, 28, 28, dtype=torch.float64)
    return net, x, find_gates(net, x, input_features=["fc1"])


def draw(gates, *batch):
    return {gate.name: torch.rand(*batch, gate.size, dtype=torch.float64) for gate in gates}


def lenet5_by_hand(net, x, theta):
    """LeNet-5 with every unit multiplied where it enters its reader."""
    x = net.pool(net.conv1(x)).relu() * theta["conv1"][..., None, None]
    x = net.pool(net.conv2(x)).relu() * theta["conv2"][..., None, None]
    x = net.fc1(x.flatten(1) * theta["fc1_input"]).relu() * theta["fc1"]
    return net.fc2(x)


@pytest.mark.parametrize("batch", [(), (3,)], ids=["per batch", "per example"])
def test_noise_is_multiplication_of_every_unit(lenet, batch):
    net, x, gates = lenet
    theta = draw(gates, *batch)
    expected = lenet5_by_hand(net, x, theta)
    torch.testing.assert_close(GatedNetwork(net, gates)(x, theta), expected)


def test_the_same_theta_for_all_examples_is_the_folded_one(lenet):
    net, x, gates = lenet
    theta = draw(gates)
    each = {name: value.expand(3, -1) for name, value in theta.items()}
    gated = GatedNetwork(net, gates)
    torch.testing.assert_close(gated(x, each), gated(x, theta))


def test_gates_that_are_not_named_stay_as_they_are(lenet):
    net, x, gates = lenet
    assert torch.equal(GatedNetwork(net, gates)(x, {}), net(x))


def test_calls_are_pure(lenet):
    net, x, gates = lenet
    before = {name: value.clone() for name, value in net.state_dict().items()}
    gated = GatedNetwork(net, gates)
    theta = draw(gates)
    first = gated(x, theta)
    gated(x, draw(gates, 3))
    assert torch.equal(gated(x, theta), first)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_gradients_reach_weights_and_theta(lenet):
    net, x, gates = lenet
    for batch in ((), (3,)):
        theta = {name: value.requires_grad_() for name, value in draw(gates, *batch).items()}
        GatedNetwork(net, gates)(x, theta).square().sum().backward()
        assert all(value.grad.abs().sum() > 0 for value in theta.values())
        assert all(parameter.grad.abs().sum() > 0 for parameter in net.parameters())


def test_fold_multiplies_columns_and_leaves_columns_without_units():
    net = nn.Sequential(nn.Linear(3, 2, bias=False))
    gate = Gate("g", 2, readers=(Span("0", torch.tensor([1, -1, 0])),))
    folded = fold(net, [gate], {"g": torch.tensor([2.0, 3.0])})
    factors = torch.tensor([3.0, 1.0, 2.0])
    assert torch.equal(folded["0.weight"], net[0].weight * factors)


@pytest.mark.parametrize(
    ("theta", "words"),
    [
        ({"conv1": torch.ones(19)}, r"conv1.*\[19\].*\[20\]"),
        ({"conv1": torch.ones(2, 2, 19)}, r"conv1.*\[2, 2, 19\].*\[draws, batch, 20\]"),
        (
            {"conv1": torch.ones(2, 1, 20), "conv2": torch.ones(3, 1, 50)},
            r"different numbers of draws: \[\[2\], \[3\]\]",
        ),
        ({"conv1": torch.ones(0, 2, 20)}, r"no draws: its shape begins with \[0\]"),
        ({"conv3": torch.ones(20)}, "conv3.*conv1, conv2, fc1_input, fc1"),
        ({"conv1": torch.ones(2, 20)}, "without the batch of 2"),
    ],
)
def test_wrong_theta_is_refused(lenet, theta, words):
    net, x, gates = lenet
    with pytest.raises(ValueError, match=words):
        GatedNetwork(net, gates)(x, theta)


@pytest.mark.parametrize("batch", [1, 3])
def test_several_draws_are_those_one_after_the_other(lenet, batch):
    net, x, gates = lenet
    theta = {gate.name: torch.rand(2, 2, batch, gate.size) for gate in gates}
    outputs = GatedNetwork(net, gates)(x, theta)
    assert outputs.shape == (2, 2, len(x), 10)
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        one = GatedNetwork(net, gates)(x, {name: value[i, j] for name, value in theta.items()})
        torch.testing.assert_close(outputs[i, j], one)


def test_noise_per_example_needs_the_batch_first():
    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.b(self.a(x.transpose(0, 1))).transpose(0, 1)

    net, x = TimeFirst(), torch.randn(3, 7, 4)
    gates = find_gates(net, x)
    with pytest.raises(ValueError, match=r"layer 'b'.*\[7, 3, 5\]"):
        GatedNetwork(net, gates)(x, {"a": torch.ones(3, 5)})


def test_the_gated_network_compiles_whole(lenet):
    net, x, gates = lenet
    theta = draw(gates)
    gated = GatedNetwork(net, gates)
    compiled = torch.compile(gated, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, theta), gated(x, theta))


def test_noise_of_data_needs_no_gradient_of_the_data():
    # The gradient of the noise through the input would be one more product with the weight.
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    x = torch.randn(80, 6, dtype=torch.float64)
    gates = find_gates(net, x, input_features=["0"])
    theta = {name: value.requires_grad_() for name, value in draw(gates).items()}
    leaves = [*theta.values(), *net.parameters()]

    def products(function):
        with FlopCounterMode(display=False) as counter:
            function().square().sum().backward()
        grads = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        return grads, counter.get_total_flops()

    ours, flops = products(lambda: GatedNetwork(net, gates)(x, theta))
    dense = 3 * (6 + 2) * 4 * 2 * 80 - 6 * 4 * 2 * 80  # no gradient of x
    assert flops == dense
    hidden = next(gate.name for gate in gates if gate.size == 4)
    feature = next(gate.name for gate in gates if gate.size == 6)
    expected, _ = products(lambda: net[2](net[0](x * theta[feature]).relu() * theta[hidden]))
    for grad, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(grad, other)
