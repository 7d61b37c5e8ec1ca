"""Noise on weights: where it enters, what it draws, and what Pyro sees of it."""

import copy
import math
from collections import OrderedDict

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, TraceMeanField_ELBO
from torch import nn

import pyro_sbp as sbp
from pyro_sbp.models.elbo import ClosedFormELBO
from pyro_sbp.models.weight_noise import LOG_ALPHA_RANGE, find_weights


def model_of(net, x, **settings):
    model = sbp.SparseModel(net, x, num_data=100, **settings)
    return model, sbp.AdditiveNormalGuide(model)


LAYERS = [
    (nn.Linear(6, 4), (6,)),
    (nn.Linear(6, 4, bias=False), (5, 6)),
    (nn.Conv1d(4, 6, 3, groups=2, stride=2), (4, 9)),
    (nn.Conv2d(4, 4, 3, groups=4, padding=1, bias=False), (4, 5, 5)),
    (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular", dilation=2), (3, 7, 7)),
    (nn.Conv3d(2, 3, 2), (2, 3, 4, 3)),
    (nn.ConvTranspose2d(3, 4, 2, stride=2), (3, 3, 3)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda value: str(value))
def test_local_noise_has_the_moments_of_drawn_weights(layer, shape):
    """Mean and variance of outputs, as those of many networks with drawn weights."""
    torch.manual_seed(0)
    count = 20_000
    net = nn.Sequential(layer).double()
    x = torch.randn(2, *shape, dtype=torch.float64)
    model, guide = model_of(net, x, init_log_scale=-1.5)
    with torch.no_grad():
        inputs = x.repeat(count, *[1] * len(shape))
        drawn = model.noisy(inputs, guide(), model.noisy.in_range())
        drawn = drawn.unflatten(0, (count, 2))
        mean = net(x)
        layer_of = [torch.zeros_like(mean), torch.zeros_like(mean)]
        q = guide.posteriors()["0"]
        for _ in range(2000):
            weight = q.loc + q.scale * torch.randn_like(q.loc)
            y = torch.func.functional_call(net, {"0.weight": weight}, x)
            layer_of[0] += y / 2000
            layer_of[1] += (y - mean).square() / 2000
    deviation = layer_of[1].sqrt()
    # Five standard errors of the larger sampling, of the mean and of the variance.
    assert bool(((drawn.mean(0) - mean).abs() <= 5 * deviation / count**0.5 + 1e-12).all())
    ratio = drawn.var(0) / layer_of[1]
    assert bool(((ratio - 1).abs() < 5 * (2 / 2000) ** 0.5)[layer_of[1] > 0].all())


def test_the_gradient_of_local_noise_has_less_variance_than_that_of_drawn_weights():
    """Of the weights' means and variances, over 200 draws of a minibatch of 128."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(30, 50), nn.ReLU(), nn.Linear(50, 10))
    x, y = torch.randn(128, 30), torch.randint(10, (128,))
    spread = {}
    for noise in ("local", "weight"):
        model, guide = model_of(net, x, noise=noise, init_log_scale=-2.0)
        elbo, draws = ClosedFormELBO(), []
        for _ in range(200):
            model.zero_grad()
            elbo.parts(model, guide, x, y).nll.backward()
            draws.append({name: p.grad.clone() for name, p in model.named_parameters()})
        spread[noise] = {n: torch.stack([d[n] for d in draws]).var(0).mean() for n in draws[0]}
    for name in spread["local"]:
        assert spread["local"][name] < spread["weight"][name] / 2


def test_pyro_s_tools_see_it_as_any_model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))
    x, y = torch.randn(5, 1, 6, 6), torch.tensor([0, 1, 2, 3, 0])
    model, guide = model_of(net, x, kl_scale={"0": 2.0, "3": 0.0})
    trace = poutine.trace(guide).get_trace(x, y)
    assert torch.equal(trace.nodes["3"]["value"], net[3].weight)
    assert [n for n, _ in trace.iter_stochastic_nodes()] == ["0", "3"]
    torch.manual_seed(1)
    parts = ClosedFormELBO().parts(model, guide, x, y)
    assert float(parts.kl.detach()) == pytest.approx(2 * float(guide.kl()["0"].sum()), rel=1e-6)
    torch.manual_seed(1)
    whole = TraceMeanField_ELBO().loss(model, guide, x, y)
    assert whole == pytest.approx(float(parts.loss.detach()), rel=1e-5)
    for noise in ("local", "weight"):
        model, guide = model_of(net, x, noise=noise, init_log_scale=0.0)
        samples = Predictive(model, guide=guide, num_samples=400)(x)["obs"]
        assert samples.shape == (400, 5) and len(samples.unique()) == 4
    assert set(guide.median()) == {"0", "3"}
    quantiles = guide.quantiles([0.1, 0.5, 0.9])["3"]
    torch.testing.assert_close(quantiles[1], net[3].weight.detach())
    snr = net[3].weight.detach().abs().clamp_min(math.exp(-4))  # where log alpha is 8
    torch.testing.assert_close(guide.snr()["3"], snr)


def test_log_alpha_stays_in_its_range():
    net = nn.Linear(4, 3)
    model, guide = model_of(nn.Sequential(net), torch.randn(2, 4), init_log_scale=-3.0)
    with torch.no_grad():
        net.weight[0], net.weight[1, 0] = 1e-30, 0.0
        model.noisy.log_variances.get_parameter("0")[2] = -60.0
    before = model.noisy.log_variances.get_parameter("0").clone()
    guide()
    q = guide.posteriors()["0"]
    low, high = LOG_ALPHA_RANGE
    assert bool((q.log_alpha >= low - 1e-4).all())
    assert bool((q.log_alpha[1:][net.weight[1:] != 0] <= high + 1e-4).all())
    # A mean near zero does not take the variance with it; one that grew does.
    after = model.noisy.log_variances.get_parameter("0")
    assert torch.equal(after[:2], before[:2]) and bool((after[2] > before[2]).all())
    for value in guide.kl().values():
        assert bool(value.isfinite().all())


def test_what_the_guide_hands_on_is_used_once_and_never_when_it_is_old():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4)
    model, guide = model_of(net, x)
    guide(x)
    copy.deepcopy(model)
    with torch.no_grad():
        guide(x)
    assert model.noisy(x, model.noisy.means(), None).requires_grad
    poutine.trace(model).get_trace(x).nodes["obs"]["fn"].logits.sum().backward()
    assert model.noisy.log_variances["0"].grad is not None
    with torch.no_grad():
        guide(x)
        model.noisy.log_variances["0"].fill_(-30.0)
        torch.testing.assert_close(model_logits(model, x), model_logits(model, x))


def model_logits(model, x):
    torch.manual_seed(0)
    return poutine.trace(model).get_trace(x).nodes["obs"]["fn"].logits


class Odd(nn.Module):
    """A tied weight, one that is computed, one that a function takes, and attention."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.first.weight
        self.words = nn.Embedding(8, 8)
        self.spelt = nn.Linear(8, 8)
        self.spelt.weight = self.words.weight
        self.twice = nn.Linear(8, 8)
        self.once = nn.Linear(8, 8)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.elsewhere = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.unused = nn.Linear(8, 8)

    def forward(self, x):
        x = self.normed(self.tied(self.first(x)))
        x = self.spelt(x) + self.words(torch.arange(8)).sum()
        x = self.once(self.twice(self.twice(x))) @ self.elsewhere.weight
        return self.attention(x, x, x)[0].mean(1)


def test_what_noise_cannot_follow_is_not_prunable_and_said_so():
    layers, not_prunable = find_weights(Odd(), torch.randn(2, 3, 8))
    assert set(layers) == {"once"}
    assert not_prunable["first"] == "shares its weight with tied"
    assert not_prunable["tied"] == "shares its weight with first"
    assert not_prunable["spelt"] == "shares its weight with words"
    assert not_prunable["twice"].startswith("it is called several times")
    assert not_prunable["normed"] == "its weight is computed from other tensors"
    for name in ("elsewhere", "attention.out_proj", "unused"):
        assert (
            not_prunable[name]
            == "its weight is used by an operation to which noise cannot be added"
        )


def test_bad_arguments_are_refused_in_one_line():
    net, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)
    for settings, words in (
        ({"noise": "loud"}, 'noise is \'loud\'; expected "local" or "weight"'),
        ({"kl_scale": {"1": 2.0}}, "kl_scale names an unknown layer '1'; the layers are 0"),
        ({"kl_scale": -1.0}, "kl_scale of layer '0' is -1.0"),
    ):
        with pytest.raises(ValueError, match="^" + words.replace("(", r"\(")):
            sbp.SparseModel(net, x, num_data=10, **settings)
    with pytest.raises(ValueError, match="the network is a single layer"):
        sbp.SparseModel(nn.Linear(4, 3), x, num_data=10)
    with pytest.raises(ValueError, match="num_data is 0"):
        sbp.SparseModel(net, x, num_data=0)
    with pytest.raises(ValueError, match="no layer of ReLU can have noise"):
        sbp.SparseModel(nn.ReLU(), x, num_data=10)
    with pytest.raises(ValueError, match="a layer is named 'obs'"):
        sbp.SparseModel(nn.Sequential(OrderedDict(obs=nn.Linear(4, 3))), x, num_data=10)


@pytest.fixture(autouse=True)
def _validation():
    with pyro.validation_enabled(True):
        yield
