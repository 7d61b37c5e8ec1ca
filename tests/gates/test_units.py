"""Which units a returned network has kept."""

import copy
import json

import pyro
import pytest
import torch
from torch import nn

import pyro_sbp as sbp
from pyro_sbp.gates.units import Units, forget_units, units_of


@pytest.fixture
def posterior():
    """A gated network of 6 features and 8 hidden units, of which features 1 and 4 are noise."""
    pyro.set_rng_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 6)
    model = sbp.GatedModel(net, sbp.find_gates(net, x, ["0"]), num_data=100)
    guide = sbp.TruncatedLogNormalGuide(model)
    log_scale = torch.full((6,), -5.0)
    log_scale[[1, 4]] = 5.0
    guide.set_posteriors({"0_input": (torch.zeros(6), log_scale)})
    return model, guide, x


def test_they_name_the_input_features_that_stayed(posterior):
    model, guide, x = posterior
    small = sbp.prune(model, guide, x)
    assert set(small.units) == {"0", "0_input"}
    assert small.units["0_input"].kept.tolist() == [True, False, True, True, False, True]
    assert small.units["0"].remaining.sum() == small[0].layer.out_features == 8
    # The features that were removed can be anything.
    other = x.clone()
    other[:, ~small.units["0_input"].remaining] = 100.0
    torch.testing.assert_close(small(other), small(x))
    assert units_of(copy.deepcopy(small)) == small.units


def test_a_saved_network_has_them_in_a_file(posterior, tmp_path):
    model, guide, x = posterior
    small = sbp.prune(model, guide, x)
    sbp.save(small, tmp_path / "small", constructor=build)
    units = json.loads((tmp_path / "small" / "units.json").read_text())
    assert units["0_input"] == {"total": 6, "kept": [0, 2, 3, 5], "zeroed": []}
    loaded = sbp.load(tmp_path / "small", constructor=build)
    torch.testing.assert_close(loaded(x), small(x))
    assert units_of(loaded) == small.units
    sbp.save(loaded, tmp_path / "again", constructor=build)
    assert json.loads((tmp_path / "again" / "units.json").read_text()) == units


def build():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def test_a_network_that_is_cut_further_has_no_old_ones(posterior):
    model, guide, x = posterior
    small = sbp.prune(model, guide, x)
    gates = sbp.find_gates(small, x)
    theta = {gates[0].name: torch.tensor([0.0] * 3 + [1.0] * 5)}
    assert not hasattr(sbp.shrink(small, gates, theta, x), "units")
    again = sbp.GatedModel(small, gates, num_data=100)
    smaller = sbp.prune(again, sbp.TruncatedLogNormalGuide(again), x)
    assert set(smaller.units) == {gate.name for gate in gates}
    assert "0_input" in small.units


def test_sparse_variational_dropout_names_them_too():
    torch.manual_seed(0)
    net, x = build(), torch.randn(4, 6)
    model = sbp.SparseModel(net, x, num_data=100)
    with torch.no_grad():
        net[2].weight[:, 5] = 1e-9  # nobody reads unit 5
    small = sbp.prune_weights(model, sbp.AdditiveNormalGuide(model), x)
    assert small.units["0"].kept.tolist() == [True] * 5 + [False] + [True] * 2


class OwnUnits(nn.Module):
    def __init__(self, units=8):
        super().__init__()
        self.units = units
        self.hidden, self.out = nn.Linear(6, units), nn.Linear(units, 3)

    def forward(self, x):
        return self.out(self.hidden(x).relu())


def test_an_attribute_of_the_network_itself_stays(tmp_path):
    net, x = OwnUnits(), torch.randn(4, 6)
    model = sbp.GatedModel(net, sbp.find_gates(net, x), num_data=100)
    with pytest.warns(UserWarning, match="OwnUnits already has an attribute 'units'"):
        small = sbp.prune(model, sbp.TruncatedLogNormalGuide(model), x)
    assert small.units == 8
    units = {"hidden": {"total": 8, "kept": list(range(8)), "zeroed": []}}
    sbp.save(small, tmp_path / "small", constructor=OwnUnits, units=units)
    assert sbp.load(tmp_path / "small", constructor=OwnUnits).units == 8


def test_an_empty_dictionary_of_the_network_itself_stays():
    net, x = OwnUnits(), torch.randn(4, 6)
    net.units = {}
    assert [gate.name for gate in sbp.find_gates(net, x)] == ["hidden"]
    forget_units(net)
    assert net.units == {}


def test_two_are_equal_if_both_masks_are():
    mask = torch.tensor([True, False])
    assert Units(mask, mask) == Units(mask.clone(), mask) != Units(mask, ~mask)
