"""A check that a network has certain gates, and that cutting them is exact."""

import torch

from pyro_sbp.gates.calling import call
from pyro_sbp.gates.folding import fold
from pyro_sbp.gates.gated_network import GatedNetwork
from pyro_sbp.gates.nested import convert
from pyro_sbp.gates.probing import find_gates
from pyro_sbp.gates.surgery import relative_difference, remaining_gates, shrink, surviving_units


def theta_of(gates):
    """Factors of all units, of which a third in every gate is zero."""
    generator = torch.Generator().manual_seed(1)
    theta = {}
    for gate in gates:
        theta[gate.name] = torch.rand(gate.size, generator=generator).double() + 0.5
        theta[gate.name][torch.randperm(gate.size, generator=generator)[: -(-gate.size // 3)]] = 0
    return theta


def check(net, x, **sizes):
    """Check the sizes of the gates, and cut the network twice; returns the network of one cut."""
    gates = find_gates(net, x)
    assert {gate.name: gate.size for gate in gates} == sizes, gates.not_prunable
    net, x = net.double().eval(), convert(x, torch.float64)
    arguments = x if isinstance(x, tuple) else (x,)
    theta = theta_of(gates)
    with torch.no_grad():
        masked = GatedNetwork(net, gates)(x, theta)
        each = {name: value[None] for name, value in theta.items()}
        assert relative_difference(masked, GatedNetwork(net, gates)(x, each)) < 1e-12
        folded = torch.func.functional_call(net, fold(net, gates, theta), arguments)
        assert relative_difference(masked, folded) < 1e-12
        assert relative_difference(net(*arguments), masked) > 1e-6
        small = shrink(net, gates, theta, x)
        assert relative_difference(masked, call(small, x)) < 1e-12
        left = remaining_gates(small, gates, surviving_units(gates, theta))
        theta = theta_of(left)
        masked = GatedNetwork(small, left)(x, theta)
        assert relative_difference(masked, call(shrink(small, left, theta, x), x)) < 1e-12
    return small
