"""SBP: what units cost, in its KL and in what it tells of an epoch."""

import json

import pytest
import torch

from pyro_sbp.datasets.loading import load_dataset
from pyro_sbp.methods import SBP
from pyro_sbp.networks import LeNet5, LeNet300_100
from pyro_sbp.recipes.method_recipes import SBPRecipe
from pyro_sbp.recipes.request import Request
from pyro_sbp.reports.posterior import read_posterior
from pyro_sbp.training import train as training

RECIPE = SBPRecipe(
    name="quick",
    dense_epochs=1,
    epochs=3,
    kl_free_epochs=1,
    finetune_epochs=1,
    batch_size=64,
    noise_learning_rate=0.1,
    init_log_scale=-1.0,
    kl_scale={"fc1": 2.0},
    macs_weight=0.5,
)
REQUEST = Request("lenet-300-100", "digits", RECIPE)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", image_size=28)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, digits):
    directory = tmp_path_factory.mktemp("runs") / "run"
    training.train(REQUEST, digits, directory)
    return directory


def lines_of(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{**line, "seconds": 0} for line in lines]


def test_units_that_cost_more_weigh_more():
    torch.manual_seed(0)
    net, x = LeNet5(), torch.rand(8, 1, 28, 28)

    def model_of(**settings):
        recipe = SBPRecipe(dense_epochs=0, **settings)
        return next(SBP(net, x, recipe, 100, ("fc1",)).phases()).model

    model = model_of(macs_weight=2.0, kl_scale={"conv1": 3.0})
    costs = {"conv1": 94_400, "conv2": 40_000, "fc1_input": 500, "fc1": 810}  # docs/recipes.md
    mean = sum(costs[gate.name] * gate.size for gate in model.gates) / 1370
    expected = {name: 1 + 2 * cost / mean for name, cost in costs.items()}
    expected["conv1"] *= 3
    assert model.kl_scale == {name: pytest.approx(weight) for name, weight in expected.items()}
    assert model_of().kl_scale == dict.fromkeys(costs, 1.0)


def test_every_epoch_with_noise_tells_the_expected_macs(finished):
    lines = lines_of(finished)
    assert [("macs" in line, line["phase"]) for line in lines] == [
        *[(False, "dense"), (True, "kl-free"), (True, "gated"), (True, "gated")],
        (False, "finetuned"),
    ]
    snr = {name: s.double() for name, s in read_posterior(finished).snr().items()}
    p0, p1, p2 = ((s**2 / (1 + s**2)).sum() for s in (snr["fc1_input"], snr["fc1"], snr["fc2"]))
    assert lines[3]["macs"] == pytest.approx(float(p0 * p1 + p1 * p2 + p2 * 10), rel=1e-5)
    assert 0 < lines[3]["macs"] < lines[1]["macs"] < 784 * 300 + 300 * 100 + 1000


def test_an_epoch_reports_the_network_that_would_be_returned():
    """Where no unit reaches the threshold, every gate keeps its best."""
    torch.manual_seed(0)
    x = torch.rand(8, 64)
    recipe = SBPRecipe(dense_epochs=0, kl_scale=1.0)
    method = SBP(LeNet300_100(in_features=64), x, recipe, 100)
    phase = next(method.phases())
    with torch.no_grad():
        for name in ("fc1", "fc2"):
            getattr(phase.guide.locs, name).fill_(-18.0)
            getattr(phase.guide.log_scales, name).fill_(4.0)
            getattr(phase.guide.log_scales, name)[7] = 4.5
    assert max(float(snr.max()) for snr in phase.guide.snr().values()) < 1
    standing, logits = phase.standing(), phase.predictor()(x)
    assert standing.units == {"fc1": 1, "fc2": 1} and standing.held == ("fc1", "fc2")
    phase.finish()
    assert {name: int(units.kept.sum()) for name, units in method.units.items()} == standing.units
    torch.testing.assert_close(method.small(x), logits, rtol=1e-4, atol=1e-5)
    assert method.held == standing.held


def test_a_network_without_prunable_layers_is_refused_with_the_reasons():
    net = torch.nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"no layer of Linear is prunable: [^{}]+$"):
        SBP(net, torch.randn(2, 4), SBPRecipe(), 10).begin()
