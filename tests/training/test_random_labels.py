"""The networks and recipes that show who memorises random labels."""

import dataclasses

import pytest
import torch

from pyro_sbp.experiments.dropout import lenet5_32, lenet5_32_dropout, lenet_300_100
from pyro_sbp.gates.probing import find_gates
from pyro_sbp.recipes.named import RECIPES


@pytest.mark.parametrize(
    ("build", "shape", "drops", "gates"),
    [
        (lenet_300_100, (1, 28, 28), True, ["fc1", "fc2"]),
        (lenet5_32, (3, 32, 32), False, ["conv1", "conv2", "fc1"]),
        (lenet5_32_dropout, (3, 32, 32), True, ["conv1", "conv2", "fc1"]),
    ],
)
def test_the_networks_drop_units_in_training_alone(build, shape, drops, gates):
    torch.manual_seed(0)
    net, x = build(num_classes=7), torch.rand(4, *shape)
    assert net(x).shape == (4, 7)
    assert torch.equal(net(x), net(x)) is not drops
    net.eval()
    assert torch.equal(net(x), net(x))
    assert [gate.name for gate in find_gates(net, x[:2])] == gates


@pytest.mark.parametrize("of", ["", "-cifar"])
def test_both_see_the_same_images_and_labels(of):
    sbp, dropout = RECIPES[f"random-labels{of}"], RECIPES[f"random-labels{of}-dense"]
    differs = {
        field.name
        for field in dataclasses.fields(sbp)
        if getattr(sbp, field.name) != getattr(dropout, field.name)
    }
    assert differs == {"name", "dense_epochs", "epochs"}
    assert sbp.random_labels and sbp.dense_epochs == 0
    images = 50_000 if of else 60_000
    assert images - sbp.holdout == 5_000
