"""Public names that were renamed still work under their old names, and name the new one."""

import importlib
import io

import pytest
import torch
from torch import nn

import pyro_sbp as sbp
from pyro_sbp.gates.probing import Gates, find_gates
from pyro_sbp.gates.units import Units


def gates():
    return find_gates(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.ones(1, 3))


def units():
    return Units(torch.tensor([True, False]), torch.tensor([True, True]))


def sparse_model():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    return sbp.SparseModel(net, torch.ones(1, 3), num_data=8)


@pytest.mark.parametrize(
    ("make", "old", "new"),
    [
        (gates, "left_alone", "not_prunable"),
        (units, "physical", "remaining"),
        (sparse_model, "left_alone", "not_prunable"),
    ],
)
def test_an_attribute_has_its_old_name(make, old, new):
    thing = make()
    with pytest.warns(FutureWarning, match=rf"{type(thing).__name__}\.{old} is .*use {new}$"):
        assert getattr(thing, old) is getattr(thing, new)


def test_an_attribute_is_set_under_its_old_name():
    found = gates()
    with pytest.warns(FutureWarning, match="use not_prunable"):
        found.left_alone = {"0": "not asked for"}
    assert found.not_prunable == {"0": "not asked for"}


def test_an_argument_has_its_old_name():
    with pytest.warns(FutureWarning, match="left_alone of Gates is deprecated: use not_prunable"):
        found = Gates(left_alone={"fc": "reaches an output of the network"})
    assert found.not_prunable == {"fc": "reaches an output of the network"}


def test_a_method_has_its_old_name():
    model = sparse_model()
    guide = sbp.AdditiveNormalGuide(model)
    torch.manual_seed(0)
    guide()
    with pytest.warns(FutureWarning, match="use set_log_variances"):
        model.hand_on(model.noisy.in_range())
    assert model(torch.ones(5, 3)).shape == (5,)


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("pyro_sbp.errors", "Elsewhere", "OtherProcessError"),
        ("pyro_sbp.errors", "OfOneProcess", "SingleProcessError"),
    ],
)
def test_a_module_has_an_old_name(module, old, new):
    found = importlib.import_module(module)
    with pytest.warns(FutureWarning, match=f"{old} is deprecated: use {new}"):
        assert getattr(found, old) is getattr(found, new)
    with pytest.raises(AttributeError, match="has no attribute 'Nowhere'"):
        _ = found.Nowhere


@pytest.mark.parametrize(
    ("make", "old", "new"),
    [
        (gates, "left_alone", "not_prunable"),
        (units, "physical", "remaining"),
        (sparse_model, "left_alone", "not_prunable"),
    ],
)
def test_a_file_with_an_old_name_loads(make, old, new):
    thing = make()
    value = getattr(thing, new)
    vars(thing)[old] = vars(thing).pop(new)  # as an earlier version pickled it
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    again = getattr(loaded, new)
    assert torch.equal(again, value) if isinstance(value, torch.Tensor) else again == value
    assert old not in vars(loaded)
