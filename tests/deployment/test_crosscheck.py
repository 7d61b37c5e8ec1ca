"""cross_check: the MACs of ptflops beside ours, and what explains a difference."""

import itertools
import json

import pytest
import torch
from torch import nn

from pyro_sbp import networks
from pyro_sbp.deployment.crosscheck import CrossCheck, cross_check

LENET5 = 24**2 * 25 * 20 + 8**2 * 25 * 20 * 50 + 800 * 500 + 500 * 10


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (networks.LeNet500_300, (1, 28, 28)),
        (networks.LeNet300_100, (1, 28, 28)),
        (networks.LeNet5, (1, 28, 28)),
        (networks.VGGLike, (3, 32, 32)),
        (lambda: nn.TransformerEncoderLayer(16, 4, 64, batch_first=True), (6, 16)),
        (lambda: nn.LSTM(16, 32, batch_first=True), (6, 16)),
    ],
)
def test_the_two_counts_agree(make, shape):
    check = cross_check(make(), torch.zeros(1, *shape))
    assert check.agrees and check.failure is None and check.explanation("dense") is None
    assert check.macs <= check.ptflops <= 1.05 * check.macs


def test_ptflops_counts_biases():
    check = cross_check(networks.LeNet5(), torch.zeros(1, 1, 28, 28))
    assert check.macs == LENET5
    assert check.ptflops == LENET5 + 24**2 * 20 + 8**2 * 50 + 500 + 10
    assert check.layers == {}


def test_layers_that_differ_are_named_with_their_counts():
    net = nn.Sequential(nn.Linear(100, 40), nn.ReLU(), nn.Linear(40, 3), nn.Linear(3, 5))
    check = cross_check(net, torch.zeros(1, 100))
    assert check.agrees and check.explanation("dense") is None
    assert check.layers == {"3": (15, 20)}
    check = cross_check(net[2:], torch.zeros(1, 40))
    assert (check.macs, check.ptflops) == (135, 143) and not check.agrees
    assert check.explanation("pruned") == (
        "ptflops counts 6% more MACs in the pruned network: '3' (20 instead of 15); "
        "it includes biases"
    )


class Products(nn.Module):
    """Products that ptflops does not know, and a layer that it does."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4, bias=False)

    def forward(self, x):
        y = self.layer(x)
        return torch.baddbmm(torch.zeros(1, 1, 1), y[None], y.T[None]), torch.mv(y, y[0])


def test_products_that_ptflops_does_not_know_belong_to_no_layer():
    check = cross_check(Products(), torch.zeros(5, 8))
    outside = 5 * 4 * 5 + 5 * 4
    assert (check.macs, check.ptflops) == (5 * 8 * 4 + outside, 5 * 8 * 4)
    assert check.layers == {"": (outside, 0)}
    assert check.explanation("dense") == (
        "ptflops counts 43% fewer MACs in the dense network: outside of layers "
        "(0 instead of 120); it knows fewer operations"
    )


def test_only_the_largest_differences_are_named():
    net = nn.Sequential(*(nn.Linear(2, width) for width in (3, 6, 5, 4, 7)))
    for before, layer in itertools.pairwise(net):
        layer.weight = nn.Parameter(torch.zeros(layer.out_features, before.out_features))
    check = cross_check(net, torch.zeros(1, 2))
    assert list(check.layers) == ["4", "1", "2", "3", "0"]
    words = check.explanation("dense")
    assert ": '4' (35 instead of 28), '1' (" in words and "and 2 more layers;" in words
    assert "\n" not in words


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(30, 4)

    def forward(self, x, y):
        return self.a(x) + y


@pytest.mark.parametrize("x", [("x", "y"), {"x": "x", "y": "y"}], ids=["tuple", "dict"])
def test_several_inputs(x):
    tensors = {"x": torch.zeros(2, 30), "y": torch.zeros(2, 4)}
    x = tensors if isinstance(x, dict) else tuple(tensors[name] for name in x)
    check = cross_check(TwoInputs(), x)
    assert (check.macs, check.ptflops) == (2 * 30 * 4, 2 * 31 * 4)


def broken(monkeypatch):
    from ptflops import aten_ops

    def formula(inputs, outputs):
        raise AssertionError("four dimensions\nat most")

    monkeypatch.setitem(aten_ops.ATEN_OPS_MAPPING, torch.ops.aten.addmm, formula)


def test_a_network_that_ptflops_cannot_run_is_reported_in_one_line(monkeypatch, capfd):
    broken(monkeypatch)
    net = nn.Linear(5, 4)
    check = cross_check(net, torch.zeros(1, 5))
    assert (check.macs, check.ptflops, check.agrees) == (20, None, False)
    assert check.explanation("dense") == (
        "ptflops cannot count the MACs of the dense network: four dimensions"
    )
    assert capfd.readouterr() == ("", "")
    assert not net._forward_hooks and not net._forward_pre_hooks


def test_nothing_is_printed_and_the_network_stays_as_it_was(capfd):
    net = networks.VGGLike(width=8).train()
    net.bn1.eval()
    modes = [module.training for module in net.modules()]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    fastpath, mkldnn = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    cross_check(net, torch.randn(1, 3, 32, 32))
    assert capfd.readouterr() == ("", "")
    assert [module.training for module in net.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled) == (
        fastpath,
        mkldnn,
    )


def test_a_network_without_products():
    check = cross_check(nn.ReLU(), torch.zeros(1, 5))
    assert (check.macs, check.ptflops) == (0, 0) and check.agrees
    check = CrossCheck(0, 7, {"a": (0, 7)})
    assert check.explanation("dense").startswith("ptflops counts 7 MACs instead of none in the")
    assert json.loads(json.dumps(check.layers)) == {"a": [0, 7]}
