"""What is recorded of a network before it is measured, and put back."""

import sys
import types
from collections import OrderedDict

import pytest
import torch
from torch import nn

from pyro_sbp.gates.probing import find_gates
from pyro_sbp.gates.state import undone


class Makes(OrderedDict):
    """A mapping that makes something of a value when it is asked for it, as in transformers."""

    def __getitem__(self, key):
        raise AssertionError("no value is asked for")


def test_a_mapping_with_a_lookup_of_its_own():
    net = nn.Linear(2, 2)
    net.choices = Makes(a=1)
    before = net.choices
    with undone(net):
        dict.__setitem__(net.choices, "b", 2)
    assert net.choices is before and list(before.keys()) == ["a"]


@pytest.fixture
def package(monkeypatch, tmp_path):
    """A module with a function that uses a variable of the module, as code of a place."""

    def make(place):
        module = types.ModuleType("counted")
        module.__file__ = str(tmp_path / place / "counted.py")
        exec("calls = []\ndef forward(self, x):\n    calls.append(1)\n    return x\n", vars(module))
        monkeypatch.setitem(sys.modules, "counted", module)
        from pyro_sbp.gates.state import _is_installed

        _is_installed.cache_clear()
        return module

    return make


@pytest.mark.parametrize(("place", "left"), [("project", 0), ("lib/site-packages", 1)])
def test_variables_of_installed_packages_are_not_touched(package, place, left):
    module = package(place)
    cls = type("Net", (nn.Module,), {"forward": module.forward, "__module__": "counted"})
    net = cls()
    with undone(net):
        net(torch.zeros(1))
    assert len(module.calls) == left


class Records(nn.Module):
    """Registers hooks in its first call, and reads what they record, as in transformers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU())
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        if not hasattr(self, "installed"):
            for layer in self.layers[::2]:
                layer.register_forward_hook(lambda _, x, out: self.recorded.append(out))
            self.installed = True
        self.recorded = []
        self.layers(x)
        first, last = self.recorded
        return self.head(first.relu()) + last.sum()


def test_hooks_that_are_added_in_a_call_are_removed():
    net, x = Records(), torch.randn(2, 3)
    for _ in range(2):
        with undone(net):
            net(x)
    assert not hasattr(net, "installed")
    assert not any(module._forward_hooks for module in net.modules())
    assert [(gate.name, gate.size) for gate in find_gates(net, x)] == [("layers.0", 8)]
