"""The latency of a network over the number of units of its gates."""

import itertools

import pytest
import torch
from torch import nn

import pyro_sbp as sbp
from pyro_sbp.deployment import unit_latency
from pyro_sbp.deployment.unit_latency import UnitLatency, measure_unit_latency, widths


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 8), nn.ReLU(), nn.Linear(8, 3))


def table(**milliseconds):
    sizes = {gate: pairs[-1][0] for gate, pairs in milliseconds.items()}
    return UnitLatency(sizes, milliseconds, 128, 1, "cpu")


def test_a_linear_latency_has_its_slope_as_cost():
    found = table(
        a=[(1, 3.0 + 0.5), (10, 3.0 + 5), (20, 3.0 + 10)],
        b=[(1, 13.0 - 0.1 * 39), (20, 13.0 - 0.1 * 20), (40, 13.0)],
    )
    assert found.per_unit() == pytest.approx({"a": 0.5, "b": 0.1})
    relative = found.relative()
    assert relative["a"] == pytest.approx(5 * relative["b"])
    # The mean over all units is 1.
    assert 20 * relative["a"] + 40 * relative["b"] == pytest.approx(60)


def test_units_that_cost_nothing_have_no_negative_cost():
    found = table(a=[(1, 1.0), (4, 4.0)], b=[(1, 4.2), (4, 4.0)])
    assert found.relative() == {"a": 2.0, "b": 0.0}
    with pytest.raises(ValueError, match="does not depend on the units of any gate"):
        table(b=[(1, 4.2), (4, 4.0)]).relative()


@pytest.mark.parametrize("vector", [1, 2, 4, 8, 16])
def test_units_are_rounded_to_the_vectors_of_the_kernel(vector):
    pairs = [(width, 1.0 + -(-width // vector)) for width in widths(32)]
    assert table(a=pairs).round_to() == vector


def test_a_width_is_measured_once_and_the_whole_gate_last():
    for size in (1, 2, 3, 8, 20, 64, 500):
        found = widths(size)
        assert found[-1] == size and found[0] >= 1
        assert all(one < other for one, other in itertools.pairwise(found))


def test_the_latency_of_each_width_is_that_of_the_network_with_so_many_units(monkeypatch):
    # A clock that advances by the number of multiplications of the network that is called.
    now, net, x = [0.0], network(), torch.randn(2, 5)

    def counted(called, given):
        assert len(given) == 16
        now[0] += sbp.count_macs(called, given[:1])
        return called(given)

    monkeypatch.setattr(unit_latency, "call", counted)
    gates = sbp.find_gates(net, x)
    found = measure_unit_latency(net, gates, x, batch_size=16, seconds=1, clock=lambda: now[0])
    whole = 5 * 40 + 40 * 8 + 8 * 3
    assert found.sizes == {"0": 40, "2": 8} and found.batch_size == 16
    for name, pairs in found.milliseconds.items():
        per_unit = {"0": 5 + 8, "2": 40 + 3}[name]
        for width, milliseconds in pairs:
            assert milliseconds == 1e3 * (whole - (found.sizes[name] - width) * per_unit)
    # With MACs as time, the costs are those in MACs.
    assert found.relative() == pytest.approx(sbp.UnitCosts(net, gates, x[:1]).relative())


def test_it_is_measured_on_the_clock_and_weights_the_kl_of_a_pruner():
    net, x = network(), torch.randn(2, 5)
    found = measure_unit_latency(net, sbp.find_gates(net, x), x, batch_size=4, seconds=0)
    assert all(ms > 0 for pairs in found.milliseconds.values() for _, ms in pairs)
    given = table(**{"0": [(1, 1.0), (40, 40.0)], "2": [(1, 1.0), (8, 22.0)]})
    pruner = sbp.Pruner(net, x, num_data=10, kl_scale=2.0, macs_weight=3.0, costs=given)
    relative = given.relative()
    assert pruner.model.kl_scale == {
        name: pytest.approx(2 * (1 + 3 * relative[name])) for name in ("0", "2")
    }


def test_a_table_is_read_as_it_was_written():
    found = table(a=[(1, 1.0), (4, 4.0)])
    assert UnitLatency.from_dict(found.to_dict()) == found
    for damaged in ({}, {**found.to_dict(), "sizes": {"b": 4}}, {"milliseconds": 3}):
        with pytest.raises(ValueError, match="the latencies of units are damaged"):
            UnitLatency.from_dict(damaged)
