"""Fine-tuning by the soft labels of the network before its last cut."""

import json
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from pyro_sbp import training
from pyro_sbp.datasets import load_dataset
from pyro_sbp.methods.phase import plain_phase, soft_cross_entropy
from pyro_sbp.recipes import METHODS, Recipe, Request

RECIPE = Recipe(
    name="quick",
    dense_epochs=1,
    epochs=3,
    finetune_epochs=1,
    noise_learning_rate=0.1,
    init_log_scale=-1.0,
    distill=1e4,
)


def test_soft_labels_at_temperature_one_are_the_teacher_s_probabilities():
    torch.manual_seed(0)
    logits, teacher = torch.randn(2, 8, 10).double()
    expected = -(teacher.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    assert float(soft_cross_entropy(logits, teacher, 1.0)) == pytest.approx(float(expected))
    # A teacher that is sure gives the labels of the data.
    sure = 1e3 * torch.nn.functional.one_hot(teacher.argmax(1), 10).double()
    hard = cross_entropy(logits, teacher.argmax(1))
    assert float(soft_cross_entropy(logits, sure, 1.0)) == pytest.approx(float(hard))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 100.0])
def test_gradients_keep_their_size_whatever_the_temperature(temperature):
    torch.manual_seed(0)
    teacher = torch.randn(8, 10).double()
    logits = teacher.clone().requires_grad_()
    (same,) = torch.autograd.grad(soft_cross_entropy(logits, teacher, temperature), logits)
    assert same.abs().max() < 1e-12  # nothing to learn
    logits = (teacher + torch.randn(8, 10)).requires_grad_()
    (other,) = torch.autograd.grad(soft_cross_entropy(logits, teacher, temperature), logits)
    expected = (logits / temperature).softmax(1) - (teacher / temperature).softmax(1)
    torch.testing.assert_close(other, expected * temperature / 8)


def test_the_teacher_is_asked_and_not_trained():
    torch.manual_seed(0)
    net, teacher = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    phase = plain_phase("finetuned", 1, net, RECIPE.replace(distill=2.0), dict, teacher=teacher)
    x, y = torch.randn(5, 4), torch.zeros(5, dtype=torch.int64)
    loss = phase.loss(x, y).nll
    torch.testing.assert_close(loss, soft_cross_entropy(net(x), teacher(x), 2.0))
    loss.backward()
    assert net.weight.grad is not None and teacher.weight.grad is None


@pytest.mark.parametrize("method", METHODS)
def test_every_method_fine_tunes_by_soft_labels(method, tmp_path):
    digits = load_dataset("digits", image_size=28)
    training.train(Request("lenet-300-100", "digits", method, RECIPE), digits, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    # At so high a temperature all labels are alike.
    assert last["phase"] == "finetuned"
    assert last["nll"] == pytest.approx(1e8 * math.log(10), rel=1e-3)
