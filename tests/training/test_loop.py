"""The training loop: what it refuses, and how it measures errors."""

import math

import pytest
import torch
from torch import nn

from pyro_sbp.datasets.loading import ImageData
from pyro_sbp.datasets.splits import Split
from pyro_sbp.methods.phased import PhasedTraining
from pyro_sbp.methods.plain import PlainPhase
from pyro_sbp.models.elbo import Parts
from pyro_sbp.recipes import Request, SBPRecipe
from pyro_sbp.training.devices import launch
from pyro_sbp.training.loop import Loop

RECIPE = SBPRecipe(dense_epochs=1, batch_size=4)


class OnePhase(PhasedTraining):
    """A method of one phase, whose loss can be chosen."""

    gates = ()
    not_prunable = {}  # noqa: RUF012

    def __init__(self, loss):
        phase = PlainPhase("dense", 1, nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), RECIPE, {})
        phase.loss = lambda x, y: Parts(phase.module(x).sum() * 0 + loss, torch.zeros(()))
        self.phase = phase

    def phases(self):
        yield self.phase

    def posteriors(self):
        return {}


def loop_of(tmp_path, method, size=2, count=8):
    images, labels = torch.zeros(count, 1, size, size, dtype=torch.uint8), torch.arange(count) % 2
    split = Split(images, labels)
    request = Request("lenet5", "digits", RECIPE)
    return Loop(request, method, ImageData(split, split, ("a", "b")), tmp_path, launch())


@pytest.mark.parametrize("loss", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, loss):
    loop = loop_of(tmp_path, OnePhase(loss))
    with pytest.raises(FloatingPointError, match=r"the loss is .* in epoch 1 of phase 'dense'"):
        loop.go()


def test_a_finite_loss_is_written(tmp_path):
    loop = loop_of(tmp_path, OnePhase(-2.5))
    loop.go()
    assert [line["loss"] for line in loop.lines] == [-2.5]


@pytest.mark.parametrize(("size", "expected"), [(28, [500, 100]), (224, [30] * 20)])
def test_fewer_large_images_are_predicted_at_a_time(tmp_path, size, expected):
    seen = []

    def predict(x):
        seen.append(len(x))
        return torch.zeros(len(x), 2)

    loop = loop_of(tmp_path, OnePhase(0.0), size, count=600)
    assert loop.evaluation.evaluate(predict).error == 50.0
    assert seen == expected
