"""Noise inside a training loop of one's own."""

import copy
import functools
import math

import pyro
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from torch import nn

import pyro_sbp as sbp
from pyro_sbp.datasets.loading import load_dataset
from pyro_sbp.gates.surgery import relative_difference


@pytest.fixture(autouse=True)
def seeded():
    pyro.clear_param_store()
    torch.manual_seed(0)


def network():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
        nn.Linear(6 * 13 * 13, 40), nn.ReLU(), nn.Linear(40, 10),
    )  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    data = load_dataset("digits", image_size=28)
    x, y = data.train.batch(slice(0, 512))
    return x, y


def test_it_names_the_layers_that_are_not_prunable():
    pruner = sbp.Pruner(network(), torch.randn(2, 1, 28, 28), num_data=10)
    # the parameters of the dense layers, the convolution and the batch norm
    share = 410 / (40 * 1015 + 410 + 60 + 12)
    assert repr(pruner) == (
        "Pruner(\n"
        "  Sequential: 2 gates, 46 of 46 units reach the threshold 1\n"
        f"  not prunable: 6, reaches an output of the network ({share:.1%} of the parameters)\n"
        ")"
    )
    pruner.threshold = 1000.0
    assert "0 of 46 units reach the threshold 1000" in repr(pruner)


def trained(digits, pruner, step, epochs=12):
    """The mean loss of the first and of the last epoch."""
    x, y = digits
    optimizer = torch.optim.Adam(pruner.parameters(lr=3e-3))
    means = []
    pruner.net.train()
    for _ in range(epochs):
        losses = []
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            loss = step(x[batch], y[batch])
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        means.append(sum(losses) / len(losses))
    return means[0], means[-1]


@pytest.mark.parametrize("noise_per", ["batch", "example"])
def test_both_ways_of_training_have_one_loss(digits, noise_per):
    x, y = digits[0][:32], digits[1][:32]
    pruner = sbp.Pruner(network(), x[:4], 512, noise_per=noise_per, init_log_scale=-2.0)
    pruner.net.train()
    pyro.set_rng_seed(3)
    whole = pruner.loss(x, y)
    pruner.attach()
    pyro.set_rng_seed(3)
    parts = F.cross_entropy(pruner.net(x), y) + pruner.kl_loss()
    assert float(parts.detach()) == pytest.approx(float(whole.detach()), rel=1e-5)
    for loss in (whole, parts):
        pruner.guide.zero_grad()
        loss.backward()
        gradients = [p.grad for p in pruner.guide.parameters()]
        assert all(g is not None and bool(g.any()) for g in gradients)


def test_the_divergence_is_that_of_the_guide_and_its_weights():
    pruner = sbp.Pruner(network(), torch.rand(4, 1, 28, 28), 512, kl_scale={"0": 3.0})
    with pytest.raises(RuntimeError, match="is not attached to the network: call attach"):
        pruner.kl_loss()
    pruner.attach()
    kl = {name: float(value.sum()) for name, value in pruner.guide.kl().items()}
    weights = {"0": 3.0}
    expected = sum(weights.get(name, 1.0) * value for name, value in kl.items()) / 512
    assert float(pruner.kl_loss().detach()) == pytest.approx(expected, rel=1e-5)


def test_the_divergence_needs_no_draw_unless_a_handler_is_active():
    x = torch.rand(4, 1, 28, 28)
    pruner = sbp.Pruner(network(), x, 512, kl_scale={"0": 3.0}).attach()
    parameters = [*pruner.guide.parameters()]
    state = torch.get_rng_state()
    alone = pruner.kl_loss()
    assert torch.equal(torch.get_rng_state(), state)
    with poutine.scale(scale=2.0):
        scaled = pruner.kl_loss()
    assert not torch.equal(torch.get_rng_state(), state)  # the handler has seen the sites
    torch.testing.assert_close(scaled, 2 * alone)
    of_alone, of_scaled = (torch.autograd.grad(loss, parameters) for loss in (alone, scaled))
    torch.testing.assert_close(of_scaled, tuple(2 * gradient for gradient in of_alone))


def test_a_loop_of_ones_own_prunes_and_evaluation_shows_the_pruned_network(digits):
    x, y = digits
    pruner = sbp.Pruner(
        network(), x[:4], len(x), kl_scale=4.0, noise_learning_rate=8e-2, init_log_scale=-2.0
    ).attach()
    statistics = copy.deepcopy(pruner.net[1].state_dict())
    first, last = trained(
        digits, pruner, lambda x, y: F.cross_entropy(pruner.net(x), y) + pruner.kl_loss()
    )
    assert last < first and pruner.noisy_calls == 12 * 8
    assert pruner.net[1].training  # as it was
    for name, value in pruner.net[1].state_dict().items():
        if "running" in name or "num" in name:
            assert torch.equal(value, statistics[name])
    kept, total = pruner.units(), {gate.name: gate.size for gate in pruner.gates}
    assert 0 < sum(kept.values()) < sum(total.values())
    pruner.net.eval()
    with torch.no_grad():
        shown = pruner.net(x)
        small = pruner.prune()
        plain = pruner.net(x)
    assert relative_difference(small(x), shown) < 1e-4
    assert not torch.allclose(plain, shown)  # the noise is gone from the original
    assert sbp.count_macs(small, x[:1]) < sbp.count_macs(pruner.net, x[:1])
    assert float((small(x).argmax(1) == y).float().mean()) > 0.8


def test_a_budget_is_passed_on(digits):
    x, _ = digits
    pruner = sbp.Pruner(network(), x[:4], len(x), macs_weight=1.0)
    with torch.no_grad():
        for parameter in pruner.guide.log_scales.parameters():
            parameter.copy_(torch.randn_like(parameter))
    small = pruner.prune(macs_ratio=2.0)
    assert sbp.count_macs(small, x[:1]) <= sbp.count_macs(pruner.net, x[:1]) / 2


def test_another_criterion_has_its_own_threshold(digits):
    x, _ = digits
    pruner = sbp.Pruner(network(), x[:4], len(x))
    with torch.no_grad():
        for parameter in pruner.guide.log_scales.parameters():
            parameter.copy_(2 * torch.randn_like(parameter))
    found = pruner.prune(criterion="bmrs-n")
    expected = sbp.prune(pruner.model, pruner.guide, x[:4], criterion="bmrs-n")
    assert sbp.count_macs(found, x[:1]) == sbp.count_macs(expected, x[:1])
    assert found.units == expected.units


def test_arguments_that_are_none_or_the_own_criterion_change_nothing(digits):
    x, _ = digits
    pruner = sbp.Pruner(network(), x[:4], len(x), threshold=2.0)
    with torch.no_grad():
        for parameter in pruner.guide.log_scales.parameters():
            parameter.copy_(2 * torch.randn_like(parameter))
    expected = pruner.prune()
    assert expected.units != sbp.prune(pruner.model, pruner.guide, x[:4]).units
    for arguments in ({"macs_ratio": None}, {"threshold": None}, {"criterion": "snr"}):
        assert pruner.prune(**arguments).units == expected.units


def test_a_failed_call_leaves_no_noise_behind(digits):
    x, _ = digits
    pruner = sbp.Pruner(network(), x[:4], len(x), init_log_scale=0.0).attach()
    pruner.net.train()
    with pytest.raises(RuntimeError):
        pruner.net(torch.rand(2, 3, 28, 28))
    weight, inputs = pruner.net[4].weight, torch.rand(2, 6 * 13 * 13)
    assert torch.equal(F.linear(inputs, weight), F.linear(inputs, weight.clone()))
    assert pruner.net[1].training
    assert pruner.net(x[:2]).shape == (2, 10)


def test_the_posterior_is_saved_and_loaded(digits):
    x, _ = digits
    pruner = sbp.Pruner(network(), x[:4], len(x))
    with torch.no_grad():
        for parameter in pruner.guide.parameters():
            parameter.add_(0.5)
    other = sbp.Pruner(network(), x[:4], len(x))
    other.load_state_dict(pruner.state_dict())
    for name, snr in pruner.guide.snr().items():
        assert torch.equal(snr, other.guide.snr()[name])


def test_a_network_with_noise_is_neither_saved_nor_measured(digits, tmp_path):
    x, _ = digits
    pruner = sbp.Pruner(network(), x[:4], len(x)).attach()
    with torch.no_grad():
        for parameter in pruner.guide.log_scales.parameters():
            parameter.copy_(2 * torch.randn_like(parameter))
    net, small = pruner.net, network()
    outer = nn.Sequential(net, nn.ReLU())  # the noise of a part is found too
    for noisy in (net, outer, copy.deepcopy(net)):
        for done, refused in {
            "saved": functools.partial(sbp.save, noisy, tmp_path / "small", network),
            "exported": functools.partial(sbp.export, noisy, tmp_path / "net.pt2", x[:2], "pt2"),
            "benchmarked": functools.partial(sbp.benchmark, noisy, small, x[:1]),
            "searched for gates": functools.partial(sbp.Pruner, noisy, x[:4], 10),
            "pruned": functools.partial(sbp.shrink, noisy, pruner.gates, {}, x[:4]),
        }.items():
            words = rf"cannot be {done} while the noise of a Pruner is attached to it: use the "
            with pytest.raises(ValueError, match=words):
                refused()
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match="cannot be pruned while"):
        sbp.prune(pruner.model, pruner.guide, x[:4])
    for twice in (lambda: pruner.loss(x[:4], digits[1][:4]), lambda: pruner.model(x[:4])):
        with pytest.raises(ValueError, match="cannot be called with theta while"):
            twice()
    saved = pruner.prune()
    sbp.save(saved, tmp_path / "small", network)
    assert torch.equal(sbp.load(tmp_path / "small", network)(x), saved.eval()(x))


def test_two_pruners_do_not_add_their_noise(digits):
    x, _ = digits
    net = network()
    first, second = sbp.Pruner(net, x[:4], len(x)), sbp.Pruner(net, x[:4], len(x))
    first.attach()
    with pytest.raises(RuntimeError, match="another pruner is attached to the network; call its"):
        second.attach()
    first.detach()
    assert second.attach().attached and not first.attached


def test_noise_remains_if_a_budget_cannot_be_met(digits):
    x, _ = digits
    pruner = sbp.Pruner(network(), x[:4], len(x), init_log_scale=0.0).attach()
    shown = pruner.net.eval()(x)
    with pytest.raises(ValueError, match="times fewer MACs"):
        pruner.prune(macs_ratio=1e9)
    assert pruner.attached and torch.equal(pruner.net(x), shown)


@pytest.mark.filterwarnings("ignore:no unit reaches the threshold")
def test_evaluation_keeps_one_unit_if_all_are_equally_weak(digits):
    x, _ = digits
    pruner = sbp.Pruner(network(), x[:4], len(x), init_log_scale=3.0).attach()
    for snr in pruner.guide.snr().values():
        assert float(snr.max()) < 1 and len(snr.unique()) == 1
    shown = pruner.net.eval()(x)
    small = pruner.prune()
    assert small[4].out_features == 1
    assert relative_difference(small(x), shown) < 1e-4


def test_a_pruning_that_removes_nothing_warns(digits):
    x, _ = digits
    pruner = sbp.Pruner(network(), x[:4], len(x), init_log_scale=-5.0)
    with pytest.warns(UserWarning, match=r"no unit was removed; .* ratio of a unit is 24\d\."):
        small = pruner.prune()
    assert sbp.count_macs(small, x[:1]) == sbp.count_macs(pruner.net, x[:1])


def test_what_cannot_work_is_refused(digits):
    x, _ = digits
    with pytest.raises(ValueError, match="no layer of Linear is prunable"):
        sbp.Pruner(nn.Linear(3, 2), torch.rand(4, 3), 10)
    for options, words in (
        ({"threshold": math.nan}, "threshold is nan"),
        ({"macs_weight": -1.0}, "macs_weight is -1.0; expected a number >= 0"),
        ({"costs": object()}, "costs has no effect, because macs_weight is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            sbp.Pruner(network(), x[:4], len(x), **options)
    pruner = sbp.Pruner(network(), x[:4], len(x)).attach()
    with pytest.raises(RuntimeError, match="attached already"):
        pruner.attach()
    pruner.detach()
    pruner.net.gradient_checkpointing = True
    with pytest.raises(RuntimeError, match="turn gradient checkpointing off"):
        pruner.attach()
