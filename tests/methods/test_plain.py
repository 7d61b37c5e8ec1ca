"""Ordinary training: by labels, by soft labels of a teacher, and with zeros that stay zero."""

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from pyro_sbp.errors import RequestError
from pyro_sbp.methods import RBP, SBP, SparseVD
from pyro_sbp.methods.plain import PlainPhase, distillation
from pyro_sbp.networks import LeNet300_100
from pyro_sbp.recipes.method_recipes import RBPRecipe, SBPRecipe, SparseVDRecipe


def test_it_is_the_divergence_from_the_teacher():
    torch.manual_seed(0)
    logits, teacher = torch.randn(2, 8, 10).double()
    for temperature in (1.0, 4.0):
        p, q = (Categorical(logits=x / temperature) for x in (teacher, logits))
        expected = temperature**2 * kl_divergence(p, q).mean()
        torch.testing.assert_close(distillation(logits, teacher, temperature), expected)
    assert float(distillation(teacher, teacher, 2.0)) == 0


def test_it_keeps_what_bfloat16_would_lose():
    torch.manual_seed(0)
    teacher = torch.randn(128, 10).bfloat16()
    logits = teacher + (torch.randn(128, 10) / 16).bfloat16()
    expected = distillation(logits.float(), teacher.float(), 4.0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(distillation(logits, teacher, 4.0), expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 100.0])
def test_gradients_keep_their_size_whatever_the_temperature(temperature):
    torch.manual_seed(0)
    teacher = torch.randn(8, 10).double()
    logits = (teacher + torch.randn(8, 10)).requires_grad_()
    (found,) = torch.autograd.grad(distillation(logits, teacher, temperature), logits)
    expected = (logits / temperature).softmax(1) - (teacher / temperature).softmax(1)
    torch.testing.assert_close(found, expected * temperature / 8)


def test_the_teacher_is_asked_and_not_trained():
    torch.manual_seed(0)
    net, teacher = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    phase = PlainPhase("finetuned", 1, net, SBPRecipe(distill=2.0), {}, teacher=teacher)
    x, y = torch.randn(5, 4), torch.zeros(5, dtype=torch.int64)
    loss = phase.loss(x, y).nll
    torch.testing.assert_close(loss, distillation(net(x), teacher(x), 2.0))
    loss.backward()
    assert net.weight.grad is not None and teacher.weight.grad is None


@pytest.mark.parametrize(
    ("kind", "recipe_class", "settings"),
    [
        (SBP, SBPRecipe, {"init_log_scale": -0.5}),
        (RBP, RBPRecipe, {"init_log_scale": -1.0, "threshold": 2.7, "kl_scale": 0.01}),
        (SparseVD, SparseVDRecipe, {"init_log_scale": -3.0, "threshold": 3.0, "kl_scale": 0.1}),
    ],
)
def test_the_teacher_is_the_network_before_its_last_cut(kind, recipe_class, settings):
    torch.manual_seed(0)
    x, y = torch.rand(64, 6), torch.randint(10, (64,))
    recipe = recipe_class(dense_epochs=0, epochs=3, finetune_epochs=1, distill=2.0, **settings)
    method = kind(LeNet300_100(in_features=6), x, recipe, num_data=64)
    for phase in method.phases():
        if phase.name == "finetuned":
            break
        optimizer = torch.optim.Adam([{**group, "lr": 0.1} for group in phase.groups()])
        for _ in range(20):
            optimizer.zero_grad()
            phase.loss(x, y).loss.backward()
            optimizer.step()
        found = phase.finish()
    mean, small = found["mean"](x).detach(), method.small(x)
    assert (mean - small).abs().max() > 1e-3  # a cut that says nothing would not tell them apart
    torch.testing.assert_close(phase.loss(x, y).nll, distillation(small, mean, 2.0))


def test_soft_labels_without_fine_tuning_are_refused():
    with pytest.raises(
        RequestError, match="distill sets the labels of fine-tuning, but finetune_epochs is 0"
    ):
        SBPRecipe(distill=4.0, finetune_epochs=0)


def test_zeros_of_matrices_stay_zero_until_the_phase_ends():
    torch.manual_seed(0)
    net, x, y = torch.nn.Linear(4, 3), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    with torch.no_grad():
        net.weight[:, 1] = net.bias[0] = 0
    phase = PlainPhase("finetuned", 1, net, SBPRecipe(), {}, learning_rate=0.1, hold_zeros=True)
    (group,) = phase.groups()
    assert group["lr"] == 0.1
    phase.loss(x, y).loss.backward()
    assert torch.equal(net.weight.grad == 0, net.weight == 0) and float(net.bias.grad[0]) != 0
    assert phase.finish() == {"finetuned": net}
    net.zero_grad()
    phase.loss(x, y).loss.backward()
    assert bool((net.weight.grad[:, 1] != 0).all())
