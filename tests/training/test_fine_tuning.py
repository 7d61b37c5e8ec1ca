"""fine_tune: the steps that it takes, what it leaves alone, and what it refuses."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import pyro_sbp as sbp
from pyro_sbp.errors import RequestError
from pyro_sbp.methods.plain import distillation
from pyro_sbp.recipes.method_recipes import SBPRecipe


@pytest.fixture
def data():
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    return x, (x @ torch.randn(6, 3)).argmax(1)


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def by_hand(net, batches, loss, epochs, rate):
    """Adam, whose rate falls linearly to zero over the second half of the steps."""
    optimizer, steps = torch.optim.Adam(net.parameters()), epochs * len(batches)
    for step in range(steps):
        x, y = batches[step % len(batches)]
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (steps - step) / (0.5 * steps))
        optimizer.zero_grad()
        loss(net(x), x, y).backward()
        optimizer.step()


@pytest.mark.parametrize("temperature", [None, 2.0])
def test_it_learns_labels_or_the_soft_labels_of_a_teacher(data, temperature):
    batches = list(zip(*(part.split(16) for part in data), strict=True))
    net, teacher = network(), nn.Linear(6, 3)
    expected = copy.deepcopy(net)

    def loss(logits, x, y):
        if temperature is None:
            return F.cross_entropy(logits, y)
        return distillation(logits, teacher(x).detach(), temperature)

    by_hand(expected, batches, loss, 3, 1e-2)
    options = {} if temperature is None else {"teacher": teacher, "distill": temperature}
    losses = sbp.fine_tune(net, batches, 3, learning_rate=1e-2, **options)
    for found, value in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-6)
    assert len(losses) == 3 and losses[2] < losses[0]
    assert all(parameter.grad is None for parameter in (*net.parameters(), *teacher.parameters()))


def test_its_defaults_are_those_of_a_recipe(data):
    losses, recipe = [], SBPRecipe()
    for options in ({}, {"learning_rate": recipe.finetune_learning_rate, "optimizer": "adam"}):
        losses.append(sbp.fine_tune(network(), [data], **options))
    assert losses[0] == losses[1] and len(losses[0]) == recipe.finetune_epochs


def test_the_teacher_of_the_command_line(data):
    x, y = data
    net = network()
    model = sbp.GatedModel(net, sbp.find_gates(net, x[:2]), num_data=len(x))
    log_scale = torch.tensor([-2.0] * 5 + [2.0] * 3)  # three units are noise
    guide = sbp.TruncatedLogNormalGuide(model, init_loc=-1.0, init_log_scale=log_scale)
    small = sbp.prune(model, guide, x[:2])
    kept = small.units["0"].kept
    loader = DataLoader(TensorDataset(x, y), 16, shuffle=True)
    mean = partial(model.gated, theta=guide.mean())
    before = distillation(small(x), mean(x), 4.0)
    sbp.fine_tune(small, loader, 20, teacher=mean, learning_rate=1e-2)
    assert distillation(small(x), mean(x), 4.0) < 0.5 * before
    assert torch.equal(small.units["0"].kept, kept) and small[0].out_features == int(kept.sum())


def test_zeros_of_matrices_and_statistics_of_batch_norms_stay(data):
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    net[1].eval()
    with torch.no_grad():
        net[0].weight[2], net[0].bias[2] = 0, 1
    before = copy.deepcopy(net)
    sbp.fine_tune(net, [data], 2, optimizer="sgd", weight_decay=0.01, learning_rate=0.1)
    assert torch.equal(net[0].weight[2], torch.zeros(6))
    assert torch.equal(net[1].running_mean, before[1].running_mean)
    assert not torch.equal(net[3].weight, before[3].weight)
    assert net[0].training and not net[1].training
    # The hooks that keep zeros are gone.
    F.cross_entropy(net(data[0]), data[1]).backward()
    assert bool(net[0].weight.grad[2].any())


def test_bfloat16_learns_the_same(data):
    batches = list(zip(*(part.split(16) for part in data), strict=True))
    net, same = network(), network()
    expected = sbp.fine_tune(net, batches, 20, learning_rate=1e-2)
    losses = sbp.fine_tune(same, batches, 20, learning_rate=1e-2, precision="bf16-mixed")
    # Every step uses the weights of the step before.
    assert losses == pytest.approx(expected, rel=0.1) and losses != expected
    assert losses[-1] < 0.7 * losses[0]
    assert all(parameter.dtype == torch.float32 for parameter in same.parameters())


def test_autocast_around_it_is_refused(data):
    words = 'outside, with precision="bf16-mixed"'
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RequestError, match=words):
        sbp.fine_tune(network(), [data])
    with pytest.raises(RequestError, match="expected '32-true' or 'bf16-mixed'"):
        sbp.fine_tune(network(), [data], precision="16-mixed")


def test_frozen_parameters_stay_with_zeros_in_them(data):
    net = network()
    net[0].weight.requires_grad_(False)[2] = 0
    before = copy.deepcopy(net)
    sbp.fine_tune(net, [data], 2)
    assert torch.equal(net[0].weight, before[0].weight)
    assert not torch.equal(net[2].weight, before[2].weight)


def test_recalibration_measures_the_statistics(data):
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    hidden = net[0](data[0]).detach()
    sbp.fine_tune(net, [data], 1, recalibrate=True, learning_rate=1e-6)
    torch.testing.assert_close(net[1].running_mean, hidden.mean(0), rtol=1e-3, atol=1e-3)
    assert not net[1].training


def test_the_average_of_the_weights_is_what_remains(data):
    # Averages of the first steps have the decay (1 + n) / (10 + n).
    weights, net = [], network()
    for steps in (1, 2):
        one = network()
        sbp.fine_tune(one, [data] * steps, 1, decay=0.0, learning_rate=0.1)
        weights.append(one[0].weight.detach())
    sbp.fine_tune(net, [data] * 2, 1, decay=0.0, learning_rate=0.1, average=0.9)
    expected = weights[0].lerp(weights[1], 1 - 2 / 11)
    torch.testing.assert_close(net[0].weight.detach(), expected, rtol=1e-5, atol=1e-6)


def test_a_teacher_is_called_in_evaluation_mode_and_stays_in_its_own(data):
    teacher = nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5))
    losses = [sbp.fine_tune(network(), [data], 1, teacher=teacher) for _ in range(2)]
    assert losses[0] == losses[1] and teacher.training
    function = partial(teacher)
    assert sbp.fine_tune(network(), [data], 1, teacher=function) == losses[0] and teacher.training


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, features):
        return self.layer(features)


def test_inputs_may_be_mappings(data):
    x, y = data
    net, batches = Named(), [({"features": x}, y)]
    assert len(sbp.fine_tune(net, batches, 2, teacher=copy.deepcopy(net))) == 2


class Stream(IterableDataset):
    def __iter__(self):
        yield from ()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"distill": 4.0}, "distill is the temperature of a teacher's soft labels; give a teacher"),
        ({"teacher": len, "distill": 0.0}, "distill is 0.0; expected a temperature > 0"),
        ({"teacher": len, "label_smoothing": 0.1}, "label_smoothing applies to the labels"),
        ({"epochs": -1}, "epochs is -1; expected an integer >= 0"),
        ({"learning_rate": 2.0}, "learning_rate is 2.0; expected a number <= 1"),
        ({"optimiser": "sgd"}, "unknown setting 'optimiser'; did you mean 'optimizer'?"),
        ({"kl_scale": 2.0}, "unknown setting 'kl_scale'"),
        ({"momentum": 0.5}, "momentum applies to sgd only"),
        ({"batches": iter([])}, "batches has no length"),
        ({"batches": DataLoader(Stream())}, "batches has no length"),
        ({"batches": []}, "batches is empty"),
    ],
)
def test_what_is_refused(data, options, words):
    net = network()
    with pytest.raises(RequestError) as caught:
        sbp.fine_tune(net, options.pop("batches", [data]), **options)
    assert str(caught.value).startswith(words) and "\n" not in str(caught.value)


def test_a_loss_that_is_not_finite_is_named_and_no_hook_remains(data):
    net = network()
    with torch.no_grad():
        net[0].weight[0] = 0
    with pytest.raises(FloatingPointError, match="in epoch 1 of phase 'finetuned'"):
        sbp.fine_tune(net, [(torch.full((4, 6), torch.inf), data[1][:4])], 1)
    assert not net[0].weight._backward_hooks
