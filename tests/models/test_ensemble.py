"""The ensemble over draws of theta, against integrals and against its definition."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from scipy import stats
from torch import nn

import pyro_sbp as sbp
from pyro_sbp.models.calibration import measured, sums


def network(hidden, outputs):
    return nn.Sequential(
        nn.Linear(4, hidden), nn.ReLU(), nn.Dropout(0.5), nn.Linear(hidden, outputs)
    )


def gated(hidden=6, outputs=3, **options):
    pyro.set_rng_seed(0)
    net, x = network(hidden, outputs), torch.randn(8, 4)
    gates = sbp.find_gates(net, x)
    model = sbp.GatedModel(net, gates, num_data=50, **options)
    return model, sbp.TruncatedLogNormalGuide(model, init_loc=-1.0, init_log_scale=0.0), x


def test_it_is_the_integral_of_the_likelihood_over_the_posterior():
    model, guide, x = gated(hidden=1)
    with torch.no_grad():
        model.gated.net[0].bias.fill_(3.0)  # the unit is not dead
    ensemble = sbp.Ensemble(model, guide, x, num_samples=500)
    x, y = x[:3], torch.tensor([0, 1, 2])
    members = ensemble.log_likelihood(x, y).exp()
    found = ensemble(x).exp().gather(1, y[:, None])[:, 0]
    model.gated.net.eval()
    log_theta = torch.linspace(-19, 0, 2001).double()[:-1] + 19 / 4000
    density = guide.posteriors()["0"].base_dist.log_prob(log_theta).exp().detach()
    with torch.no_grad():
        theta = log_theta.exp().float()[:, None, None]
        probabilities = model.gated(x, {"0": theta}).softmax(-1)[:, [0, 1, 2], y].double()
    expected = (probabilities * density[:, None]).sum(0) * 19 / 2000
    errors = members.std(0) / 500**0.5
    assert bool(((found - expected).abs() < 4 * errors + 1e-4).all())
    assert float(errors.max()) < 0.02


def test_every_draw_is_a_network_and_probabilities_are_averaged():
    model, guide, x = gated()
    ensemble = sbp.Ensemble(model, guide, x, num_samples=5)
    model.gated.net.eval()
    with torch.no_grad():
        each = [model.gated(x, {"0": theta}).softmax(1) for theta in ensemble.draws["0"]]
        expected = torch.stack(each).mean(0)
        mean = model.gated(x, guide.mean()).log_softmax(1)
    assert len(ensemble) == 5 and len(torch.unique(ensemble.draws["0"], dim=0)) == 5
    torch.testing.assert_close(ensemble(x).exp(), expected)
    torch.testing.assert_close(ensemble(x[:3]), ensemble(x)[:3])
    torch.testing.assert_close(ensemble.deterministic(x), mean)
    assert not ensemble(x).requires_grad


def test_noise_per_example_has_the_same_predictive():
    model, guide, x = gated(noise_per="example")
    ensemble = sbp.Ensemble(model, guide, x, num_samples=4)
    assert ensemble.draws["0"].shape == (4, 6)
    model.gated.net.eval()
    each = [model.gated(x, {"0": theta}).softmax(1) for theta in ensemble.draws["0"]]
    torch.testing.assert_close(ensemble(x).exp(), torch.stack(each).mean(0).detach())


def test_it_is_compared_with_the_deterministic_network_and_others():
    model, guide, x = gated()
    y = torch.randint(3, (8,))
    ensemble = sbp.Ensemble(model, guide, x, num_samples=5)
    small = sbp.prune(model, guide, x)
    found = ensemble.compare([(x[:5], y[:5]), (x[5:], y[5:])], pruned=small)
    assert list(found) == ["ensemble", "deterministic", "pruned"]
    assert model.gated.net.training and small.training  # as they were
    model.gated.net.eval()
    small.eval()
    with torch.no_grad():
        nets = {"ensemble": ensemble(x), "pruned": small(x)}
        nets["deterministic"] = model.gated(x, guide.mean())
    for name, logits in nets.items():
        expected = measured(sums(logits, y), 8)
        assert found[name].error == expected.error
        assert found[name].nll == pytest.approx(expected.nll, abs=1e-5)
        assert found[name].ece == pytest.approx(expected.ece, abs=1e-3)
    # log is concave: the ensemble has more than the mean log-likelihood of its members.
    members = -ensemble.log_likelihood(x, y).mean()
    assert found["ensemble"].nll < float(members)


def test_it_can_be_a_teacher():
    model, guide, x = gated()
    y, ensemble = torch.randint(3, (8,)), sbp.Ensemble(model, guide, x, num_samples=5)
    losses = sbp.fine_tune(sbp.prune(model, guide, x), [(x, y)], 3, teacher=ensemble)
    assert len(losses) == 3


def normal(output):
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    return dist.Normal(output.squeeze(-1), sigma)


def test_a_likelihood_may_have_sites_of_its_own():
    model, theta, x = gated(outputs=1, likelihood=normal)
    y = torch.randn(8)
    guide = AutoGuideList(model)
    guide.append(theta)
    guide.append(AutoNormal(poutine.block(model, expose=["sigma"])))
    guide(x, y)
    ensemble = sbp.Ensemble(model, guide, x, num_samples=5)
    found = ensemble.log_likelihood(x, y)
    assert ensemble.draws["sigma"].shape == (5,) and found.shape == (5, 8)
    model.gated.net.eval()
    for index in range(5):
        output = model.gated(x, {"0": ensemble.draws["0"][index]}).squeeze(-1).detach()
        sigma = float(ensemble.draws["sigma"][index])
        expected = stats.norm.logpdf(y.numpy(), output.numpy(), sigma)
        torch.testing.assert_close(found[index].double(), torch.from_numpy(expected).double(),
                                   rtol=1e-4, atol=1e-5)  # fmt: skip
    assert ensemble.mean["sigma"].shape == ()
    with pytest.raises(ValueError, match=r"the likelihood is Normal; .* use log_likelihood"):
        ensemble(x)


def test_what_is_refused():
    model, guide, x = gated()
    with pytest.raises(ValueError, match="num_samples is 0"):
        sbp.Ensemble(model, guide, x, num_samples=0)
    ensemble = sbp.Ensemble(model, guide, x, num_samples=2)
    with pytest.raises(ValueError, match="there is no batch"):
        ensemble.compare([])
    with pytest.raises(ValueError, match="a network is named 'ensemble'"):
        ensemble.compare([(x, x)], ensemble=model.gated.net)
