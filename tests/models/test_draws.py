"""Posterior draws by site, and what ArviZ makes of them."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from torch import nn

import pyro_sbp as sbp


def gated(noise_per="batch", likelihood=None):
    pyro.set_rng_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(5, 4)
    options = {} if likelihood is None else {"likelihood": likelihood}
    gates = sbp.find_gates(net, x, ["0"])
    model = sbp.GatedModel(net, gates, num_data=50, noise_per=noise_per, **options)
    return model, sbp.TruncatedLogNormalGuide(model, init_loc=-1.0, init_log_scale=0.0), x


@pytest.mark.parametrize("noise_per", ["batch", "example"])
def test_every_gate_has_chains_and_draws_of_its_posterior(noise_per):
    _, guide, _ = gated(noise_per)
    draws = sbp.posterior_draws(guide, num_samples=1000, num_chains=2)
    assert {name: value.shape for name, value in draws.items()} == {
        "0": (2, 1000, 6),
        "0_input": (2, 1000, 4),
    }
    for name, q in guide.posteriors().items():
        sample = torch.from_numpy(draws[name]).flatten(0, 1)
        error = q.stddev.detach() / 2000**0.5
        assert bool(((sample.mean(0) - q.mean.detach()).abs() < 4 * error).all())
        # Draws of different units are independent.
        correlation = torch.corrcoef(sample.T) - torch.eye(sample.shape[1])
        assert float(correlation.abs().max()) < 0.1


def regression(x, y=None):
    offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
    with pyro.plate("features", 4):
        theta = pyro.sample("theta", sbp.distributions.TruncatedLogUniform(-20.0, 0.0))
    with pyro.plate("data", 5, subsample_size=3) as index:
        return pyro.sample("y", dist.Normal(offset + x[index] @ theta, 1.0), obs=y)


def test_sites_of_any_model_and_of_any_guide_without_auxiliary_ones():
    pyro.set_rng_seed(0)
    x, y = torch.randn(5, 4), torch.randn(3)
    guide = AutoGuideList(regression)
    guide.append(AutoNormal(poutine.block(regression, expose=["offset"])))
    theta = poutine.block(regression, hide=["offset"])
    guide.append(sbp.TruncatedLogNormalGuide(theta, x, y))
    draws = sbp.posterior_draws(guide, x, y, num_samples=7)
    shapes = {name: value.shape for name, value in draws.items()}
    assert shapes == {"offset": (1, 7), "theta": (1, 7, 4)}


def test_weights_of_a_sparse_model():
    pyro.set_rng_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(5, 4)
    model = sbp.SparseModel(net, x, num_data=50, init_log_scale=-1.0)
    guide = sbp.AdditiveNormalGuide(model)
    with pytest.raises(ValueError, match="are the means of the weights, not draws"):
        sbp.posterior_draws(guide)
    model.noise = "weight"
    draws = sbp.posterior_draws(guide, num_samples=40)
    assert draws["0"].shape == (1, 40, 6, 4)
    torch.testing.assert_close(draws["0"].std(), 0.36, rtol=0.3, atol=0)


@pytest.mark.parametrize("name", ["num_samples", "num_chains"])
def test_a_number_of_nothing_is_refused(name):
    _, guide, _ = gated()
    with pytest.raises(ValueError, match=f"{name} is 0; expected at least 1"):
        sbp.posterior_draws(guide, **{name: 0})


# ArviZ and what it imports warn about themselves.
@pytest.mark.filterwarnings("ignore")
def test_arviz_reads_them():
    arviz = pytest.importorskip("arviz")
    model, guide, x = gated()
    y = torch.randint(3, (5,))
    posterior = sbp.posterior_draws(guide, num_samples=500, num_chains=2)
    ensemble = sbp.Ensemble(model, guide, x, num_samples=100)
    likelihood = {"obs": ensemble.log_likelihood(x, y).unflatten(0, (2, 50)).numpy()}
    try:
        data = arviz.from_dict(posterior=posterior, log_likelihood=likelihood)
    except TypeError:  # ArviZ 1 takes one dict of groups
        data = arviz.from_dict({"posterior": posterior, "log_likelihood": likelihood})
    assert dict(data.posterior.sizes)["chain"] == 2 and dict(data.posterior.sizes)["draw"] == 500
    summary = arviz.summary(data, var_names=["0"])
    means = torch.tensor(summary["mean"].astype(float).to_numpy(), dtype=torch.float32)
    torch.testing.assert_close(means, guide.mean()["0"], rtol=0.2, atol=0.02)
    assert bool((summary["r_hat"].astype(float) < 1.05).all())
    assert bool(torch.isfinite(torch.tensor(float(arviz.waic(data).elpd_waic))))
