"""What is recorded of a network before it is measured, and put back."""

import sys
import types
from collections import OrderedDict

import pytest
import torch
from torch import nn

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
