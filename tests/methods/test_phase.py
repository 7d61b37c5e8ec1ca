"""Phases: their learning rates, the weight of the KL divergence, and what they leave."""

from importlib import import_module

import pytest
import torch

from pyro_sbp.methods.phase import rising_kl
from pyro_sbp.methods.plain import PlainPhase
from pyro_sbp.networks import LeNet300_100
from pyro_sbp.recipes.method_recipes import METHODS, RECIPE_CLASSES, SBPRecipe


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


def test_the_kl_rises_from_0_to_1_over_the_epochs_of_the_phase():
    phase = PlainPhase("noise", 10, torch.nn.Linear(2, 2), SBPRecipe(), {})
    free, rising, last = rising_kl(phase, 2, 3)
    assert [part.epochs for part in (free, rising, last)] == [2, 3, 5]
    assert [part.kl_weight for part in (free, rising, last)] == [(0, 0), (0, 1), (1, 1)]
    assert [part.ends for part in (free, rising, last)] == [False, False, True]
    assert [part.decays for part in (free, rising, last)] == [False, False, True]
    assert all(part.module is phase.module for part in (free, rising, last))
    (only,) = rising_kl(phase, 0, 0)
    assert only.epochs == phase.epochs == 10


def test_frozen_batch_norms_keep_their_statistics():
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    phase = PlainPhase("finetuned", 1, net, SBPRecipe(), {}, frozen=True)
    phase.train_mode()
    net(torch.rand(8, 2))
    assert float(net[1].running_mean.abs().max()) == 0 and net[0].training
    phase.changed(freeze_batch_norm=False).train_mode()
    net(torch.rand(8, 2))
    assert float(net[1].running_mean.abs().max()) > 0


def test_a_phase_that_does_not_end_leaves_its_weights_to_the_next():
    net = torch.nn.Linear(2, 2)
    phase = PlainPhase("dense", 1, net, SBPRecipe(), {})
    record = phase.record()
    weight = net.weight.detach().clone()
    with torch.no_grad():
        net.weight.zero_()
    assert phase.changed(ends=False).record() == {}
    assert phase.changed(ends=False).restore({}) is False and not bool(net.weight.any())
    assert phase.restore(record) is True and torch.equal(net.weight, weight)
