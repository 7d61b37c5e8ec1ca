"""What the methods do alike."""

from importlib import import_module

import pytest
import torch

from pyro_sbp.networks import LeNet300_100
from pyro_sbp.recipes.settings import METHODS, RECIPE_CLASSES


@pytest.mark.parametrize("method", METHODS)
def test_weights_have_a_learning_rate_of_their_own_while_there_is_noise(method):
    module, name = METHODS[method].split(":")
    recipe = RECIPE_CLASSES[method](dense_epochs=1, learning_rate=2e-3, gated_learning_rate=5e-5)

    def rates(recipe):
        net = LeNet300_100(in_features=64)
        made = getattr(import_module(module), name)(net, torch.rand(2, 64), recipe, 100)
        phases = made.phases()
        dense, noisy = next(phases), next(phases)
        weights = [id(p) for p in net.parameters()]
        for phase in (dense, noisy):
            assert [id(p) for p in phase.groups()[0]["params"]] == weights
        return dense.groups()[0]["lr"], noisy.groups()[0]["lr"]

    assert rates(recipe) == (2e-3, 5e-5)
    assert rates(recipe.replace(gated_learning_rate=None)) == (2e-3, 2e-3)
