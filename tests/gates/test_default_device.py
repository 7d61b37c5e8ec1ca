"""`torch.set_default_device` has no effect on what is computed for networks of another device."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

import pyro_sbp as sbp

LIBRARY = Path(sbp.__file__).parent
#: What makes tensors where `torch.set_default_device` says, unless it is given a device.
FACTORIES = {
    *("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn"),
    *("randperm", "tensor", "zeros"),
}
#: Modules are built on the default device, as those of torch.
EXEMPT = {"networks.py"}


@pytest.fixture
def elsewhere():
    """New tensors are on another device than those of the test, and have no values."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def factories_without_device(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        called = getattr(node, "func", None)
        if isinstance(called, ast.Attribute) and called.attr in FACTORIES:
            of_torch = isinstance(called.value, ast.Name) and called.value.id == "torch"
            if of_torch and "device" not in {keyword.arg for keyword in node.keywords}:
                yield f"{path.relative_to(LIBRARY)}:{node.lineno}"


def test_every_new_tensor_says_its_device():
    paths = [path for path in LIBRARY.rglob("*.py") if path.name not in EXEMPT]
    assert len(paths) > 50
    assert [place for path in paths for place in factories_without_device(path)] == []


@pytest.mark.parametrize("noise_per", ["batch", "example"])
def test_a_network_is_trained_pruned_and_measured(elsewhere, noise_per):
    with torch.device("cpu"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        x, y = torch.randn(6, 4), torch.arange(6) % 3
        log_scale = torch.tensor([-1.0, 3.0]).repeat(4)  # half of the units are noise
    gates = sbp.find_gates(net, x, input_features=["0"])
    assert [gate.name for gate in gates] == ["0_input", "0"]
    model = sbp.GatedModel(net, gates, num_data=6, noise_per=noise_per)
    guide = sbp.TruncatedLogNormalGuide(model, init_log_scale={"0": log_scale})
    parameters = [*net.parameters(), *guide.parameters()]
    loss = sbp.ClosedFormELBO().differentiable_loss(model, guide, x, y)
    gradients = torch.autograd.grad(loss, parameters)
    assert loss.device == x.device and all(g.device == x.device for g in gradients)
    assert float(sum(kl.sum() for kl in guide.kl().values())) > 0
    small = sbp.prune(model, guide, x)
    assert small[2].in_features == 4
    assert sbp.count_macs(small, x) < sbp.count_macs(net, x)
    assert sbp.UnitCosts(net, gates, x).per_unit().keys() == {"0_input", "0"}


def test_weights_are_pruned(elsewhere):
    with torch.device("cpu"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        x, y = torch.randn(6, 4), torch.arange(6) % 3
    model = sbp.SparseModel(net, x, num_data=6)
    guide = sbp.AdditiveNormalGuide(model)
    assert sbp.ClosedFormELBO().differentiable_loss(model, guide, x, y).device == x.device
    assert isinstance(sbp.prune_weights(model, guide, x), nn.Module)


def test_networks_are_built_on_the_default_device(elsewhere):
    net = sbp.networks.LeNet5()
    assert {parameter.device.type for parameter in net.parameters()} == {"meta"}
