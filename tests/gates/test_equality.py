"""Gates, spans, units and choices are equal if what they say is."""

import copy
import dataclasses
import pickle

import pytest
import torch

from pyro_sbp import networks
from pyro_sbp.gates.gate import Gate, Span
from pyro_sbp.gates.nested import same
from pyro_sbp.gates.probing import Gates, find_gates
from pyro_sbp.gates.surgery import surviving_units
from pyro_sbp.gates.units import Units
from pyro_sbp.pruning.choosing import choose_units


@pytest.fixture(scope="module")
def found():
    net, x = networks.LeNet5(), torch.rand(2, 1, 28, 28)
    return net, x, find_gates(net, x, ["fc1"])


def test_gates_that_are_found_twice_are_equal(found):
    net, x, gates = found
    again = find_gates(net, x, ["fc1"])
    assert gates == again and gates[0] is not again[0]
    assert set(gates) == set(again) and len(set(gates)) == 4
    assert [gates.index(gate) for gate in again] == [0, 1, 2, 3]
    assert gates != find_gates(net, x) and gates[:3] != gates and gates != []


def test_gates_are_equal_whatever_was_expanded_before(found):
    _, _, gates = found
    span = Span("a", torch.tensor([0, 1, -1]))
    other = copy.deepcopy(span)
    span.expand(torch.ones(2))
    assert span == other and hash(span) == hash(other) and len({span, other}) == 1
    gates[0].readers[0].expand(torch.ones(20))
    assert pickle.loads(pickle.dumps(gates)) == gates


def test_spans_differ_in_their_layer_units_and_groups():
    span = Span("a", torch.tensor([0, 1, -1]))
    for other in (
        Span("b", span.units),
        Span("a", torch.tensor([0, 1, 1])),
        Span("a", torch.tensor([0, 1])),
        Span("a", span.units, groups=3),
        "a",
        None,
    ):
        assert span != other
        assert Gate("g", 2, (span,)) != Gate("g", 2, (other,))
    assert Gate("g", 2, (span,)) != Gate("h", 2, (span,))


def test_a_slice_of_gates_keeps_why_the_others_are_not_prunable(found):
    _, _, gates = found
    assert gates.not_prunable == {"fc2": "reaches an output of the network"}
    for part in (gates[:2], gates[::-1], gates[5:], gates.copy(), copy.copy(gates)):
        assert type(part) is Gates
        assert (part.not_prunable, part.called) == (gates.not_prunable, gates.called)
        assert all(gate in gates for gate in part)
    assert isinstance(gates[0], Gate) and gates[-1].name == "fc1"
    assert [gate.name for gate in gates[:2]] == ["conv1", "conv2"]
    for plain in (gates + gates[:1], gates[:1] + list(gates), 2 * gates, gates * 2):
        assert type(plain) is list
    part = gates[:2]
    part.not_prunable["conv1"] = "not asked for"
    assert list(gates.not_prunable) == ["fc2"]


def test_units_and_choices(found):
    net, x, gates = found
    theta = {gate.name: (torch.arange(gate.size) % 3 > 0).float() for gate in gates}
    units, again = surviving_units(gates, theta), surviving_units(gates, theta)
    assert units == again and hash(units["fc1"]) == hash(again["fc1"])
    assert units["conv1"] != units["conv2"]
    kept = units["fc1"].kept
    assert units["fc1"] != Units(kept, ~kept) and units["fc1"] != Units(~kept, kept)
    snr = {name: value + 0.5 for name, value in theta.items()}
    first, second = (choose_units(net, gates, theta, snr, x) for _ in range(2))
    assert first == second
    assert first != dataclasses.replace(first, threshold=2.0)
    other = choose_units(net, gates, {**theta, "fc1": 2 * theta["fc1"]}, snr, x)
    assert first != other and first.units == other.units


def test_same():
    a = {"x": [torch.ones(2), (1, "b")], "y": None}
    assert same(a, copy.deepcopy(a))
    for other in (
        {"x": [torch.ones(3), (1, "b")], "y": None},
        {"x": [torch.ones(2).double(), (1, "b")], "y": None},
        {"x": [torch.ones(2), (1, "c")], "y": None},
        {"x": [torch.ones(2), [1, "b"]], "y": None},
        {"x": [torch.ones(2)], "y": None},
        {"x": a["x"]},
        {"x": a["x"], "y": torch.ones(2)},
        None,
    ):
        assert not same(a, other) and not same(other, a)
