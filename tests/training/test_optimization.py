"""Optimizers and learning rates: against torch's own, and that they resume to the same end."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pyro_sbp.errors import RequestError
from pyro_sbp.networks import PlaceChannels
from pyro_sbp.recipes import SBPRecipe
from pyro_sbp.training.optimization import Optimization, moving_average

STEPS = 20


def parameters():
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(3))


def optimization(recipe, weights, noise, decays=True):
    groups = [
        {"params": [weights], "lr": 0.1, "weight_decay": recipe.weight_decay},
        {"params": [noise], "lr": 0.01, "weight_decay": 0.0},
    ]
    return Optimization(groups, recipe, STEPS, decays)


def gradient(parameter, step):
    generator = torch.Generator().manual_seed(step)
    parameter.grad = torch.randn(parameter.shape, generator=generator)


def take(steps, optimization, *parameters):
    for step in steps:
        for parameter in parameters:
            gradient(parameter, step)
        optimization.step()


def rates(recipe, decays=True):
    weights, noise = parameters()
    found = optimization(recipe, weights, noise, decays)
    values = []
    for step in range(STEPS):
        groups = [group for optimizer in found.optimizers for group in optimizer.param_groups]
        values.append(tuple(group["lr"] for group in groups))
        take([step], found, weights, noise)
    return values


RECIPES = {
    "default": SBPRecipe(),
    "adamw": SBPRecipe(optimizer="adamw", weight_decay=0.1, schedule="cosine"),
    "sgd": SBPRecipe(optimizer="sgd", weight_decay=0.01, schedule="one-cycle"),
    "clipped": SBPRecipe(optimizer="sgd", clip_gradient=0.5, warmup=0.25, schedule="cosine"),
    "warm": SBPRecipe(warmup=0.2, decay=0.3),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_resumed_phase_ends_where_one_that_was_not_stopped_ends(name):
    recipe = RECIPES[name]
    whole = parameters()
    take(range(STEPS), optimization(recipe, *whole), *whole)

    stopped = parameters()
    before = optimization(recipe, *stopped)
    take(range(7), before, *stopped)
    states = copy.deepcopy(before.state())
    resumed = [nn.Parameter(parameter.detach().clone()) for parameter in stopped]
    after = optimization(recipe, *resumed)
    after.load(*states)
    take(range(7, STEPS), after, *resumed)
    for a, b in zip(whole, resumed, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", RECIPES)
def test_states_can_be_read_without_running_code(tmp_path, name):
    weights, noise = parameters()
    found = optimization(RECIPES[name], weights, noise)
    take(range(3), found, weights, noise)
    torch.save(found.state(), tmp_path / "state.pt")
    found.load(*torch.load(tmp_path / "state.pt", weights_only=True))


@pytest.mark.parametrize(
    ("recipe", "reference"),
    [
        (RECIPES["default"], lambda p: torch.optim.Adam([p], 0.1)),
        (RECIPES["adamw"], lambda p: torch.optim.AdamW([p], 0.1, weight_decay=0.1)),
        (
            RECIPES["sgd"],
            lambda p: torch.optim.SGD([p], 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        ),
    ],
)
def test_weights_take_the_steps_of_torch_and_noise_those_of_adam(recipe, reference):
    weights, noise = parameters()
    found = optimization(recipe, weights, noise, decays=False)
    take(range(5), found, weights, noise)
    expected_weights, expected_noise = parameters()
    theirs = reference(expected_weights), torch.optim.Adam([expected_noise], 0.01)
    for step in range(5):
        for parameter, optimizer in zip((expected_weights, expected_noise), theirs, strict=True):
            gradient(parameter, step)
            optimizer.step()
    torch.testing.assert_close(weights, expected_weights)
    torch.testing.assert_close(noise, expected_noise)


def test_the_linear_schedule_is_constant_and_then_falls():
    values = [weights for weights, _ in rates(SBPRecipe(decay=0.25))]
    assert values[:16] == pytest.approx([0.1] * 16)
    assert values[16:] == pytest.approx([0.08, 0.06, 0.04, 0.02], abs=0.021)
    assert values[16:] == sorted(values[16:], reverse=True)


def test_cosine_follows_its_formula_after_the_warm_up():
    values = [weights for weights, _ in rates(SBPRecipe(schedule="cosine", warmup=0.2))]
    assert values[:4] == pytest.approx([0.02, 0.04, 0.06, 0.08])
    steps = torch.arange(16) / 16 * torch.pi
    assert values[4:] == pytest.approx((0.05 * (1 + steps.cos())).tolist(), rel=1e-5)


def test_one_cycle_rises_to_the_rate_and_ends_near_zero():
    values = [weights for weights, _ in rates(SBPRecipe(schedule="one-cycle", warmup=0.5))]
    assert values[0] == pytest.approx(0.1 / 25)
    assert max(values) == pytest.approx(0.1)
    assert values.index(max(values)) == 9
    assert values[-1] < 1e-5


@pytest.mark.parametrize("schedule", ["linear", "cosine", "one-cycle"])
def test_a_phase_that_does_not_decay_has_constant_rates(schedule):
    assert set(rates(SBPRecipe(schedule=schedule, warmup=0.2), decays=False)) == {(0.1, 0.01)}


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_rates_of_weights_and_noise_keep_their_ratio(optimizer):
    for weights, noise in rates(SBPRecipe(optimizer=optimizer, schedule="cosine")):
        assert noise == pytest.approx(weights / 10)


def test_only_the_gradient_of_the_weights_is_clipped():
    weights, noise = parameters()
    found = optimization(SBPRecipe(clip_gradient=0.5), weights, noise)
    weights.grad, noise.grad = torch.full((5,), 3.0), torch.full((3,), 3.0)
    found.step()
    assert float(weights.grad.norm()) == pytest.approx(0.5, rel=1e-4)
    assert torch.equal(noise.grad, torch.full((3,), 3.0))


@pytest.mark.parametrize("warmup", [0.0, 0.01, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10, 1000])
def test_one_cycle_has_rates_for_every_number_of_steps(warmup, steps):
    weights, _ = parameters()
    groups = [{"params": [weights], "lr": 0.1, "weight_decay": 0.0}]
    recipe = SBPRecipe(schedule="one-cycle", warmup=warmup)
    found = Optimization(groups, recipe, steps, decays=True)
    values = []
    for step in range(steps):
        values.append(found.optimizers[0].param_groups[0]["lr"])
        take([step], found, weights)
    assert max(values) == pytest.approx(0.1) and min(values) >= 0


def test_the_moving_average_is_by_its_formula():
    net = nn.BatchNorm1d(2)
    average = moving_average(net, decay=0.9)
    values, expected = [], None
    for step in range(100):
        with torch.no_grad():
            net.weight.fill_(float(step))
            net.running_mean.fill_(2.0 * step)
            net.num_batches_tracked.fill_(7 * step)
        average.update_parameters(net)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = float(step) if step == 0 else decay * expected + (1 - decay) * step
        values.append(expected)
    torch.testing.assert_close(average.module.weight, torch.full((2,), expected))
    torch.testing.assert_close(average.module.running_mean, torch.full((2,), 2 * expected))
    assert int(average.module.num_batches_tracked) == 7 * 99


@pytest.mark.parametrize("decay", [0.9, 0.95, 0.9999])
def test_numbers_of_channels_are_not_averaged(decay):
    net = PlaceChannels(16, 32)
    average = moving_average(net, decay)
    for _ in range(300):
        average.update_parameters(net)
    assert torch.equal(average.module.source, net.source)


def test_the_average_of_a_short_phase_is_not_its_first_weights():
    net = nn.Linear(1, 1)
    average = moving_average(net, decay=0.999)
    for step in range(60):
        nn.init.constant_(net.weight, float(step))
        average.update_parameters(net)
    assert average.module.weight.item() > 45


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"momentum": 0.8}, "momentum applies to sgd only; optimizer is adam"),
        (
            {"decay": 0.1, "schedule": "cosine"},
            "decay applies to the linear schedule only; schedule is cosine",
        ),
        ({"epochs": 5, "cut_every": 5}, "cut_every is 5; expected less than the epochs .*, 5, or"),
        ({"warmup": 1.0}, "warmup is 1.0; expected a number < 1"),
    ],
)
def test_settings_without_effect_are_refused(settings, words):
    with pytest.raises(RequestError, match=words):
        SBPRecipe(**settings)
