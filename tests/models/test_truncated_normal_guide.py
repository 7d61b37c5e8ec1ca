"""TruncatedNormalGuide: posteriors on the support of the prior, against exact ones."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal, init_to_value
from torch.distributions import kl_divergence

import pyro_sbp as sbp
from pyro_sbp.distributions import TruncatedLogUniform, TruncatedNormal

INF = math.inf
#: Prior, and the support that its posterior must have.
PRIORS = {
    "truncated": (TruncatedNormal(1.0, 2.0, -1.0, 3.0), (-1.0, 3.0)),
    "half infinite": (TruncatedNormal(0.5, 1.0, 0.0, INF), (0.0, INF)),
    "upper": (TruncatedNormal(0.5, 1.0, -INF, 0.0), (-INF, 0.0)),
    "uniform": (dist.Uniform(-0.5, 0.5), (-0.5, 0.5)),
    "half normal": (dist.HalfNormal(2.0), (0.0, INF)),
    "exponential": (dist.Exponential(3.0), (0.0, INF)),
    "normal": (dist.Normal(1.0, 2.0), (-INF, INF)),
}


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(0)
    pyro.clear_param_store()


def of(prior, size=3):
    def model():
        with pyro.plate("sites", size):
            pyro.sample("z", prior)

    return model


@pytest.mark.parametrize("name", PRIORS)
def test_posteriors_have_the_support_of_the_prior(name):
    prior, bounds = PRIORS[name]
    guide = sbp.TruncatedNormalGuide(of(prior))
    (q,) = guide.posteriors().values()
    assert type(q) is TruncatedNormal and q.batch_shape == (3,)
    assert (q.low[0].item(), q.high[0].item()) == bounds
    # It starts at the mean of the prior, with a tenth of its deviation.
    torch.testing.assert_close(q.loc.detach(), prior.mean.expand(3))
    torch.testing.assert_close(q.scale.detach(), 0.1 * prior.stddev.expand(3))
    expected = kl_divergence(q, prior.expand([3])).detach()
    torch.testing.assert_close(guide.kl()["z"], expected)
    assert bool(expected.isfinite().all()) and bool((expected > 0).all())
    assert guide()["z"].shape == (3,)
    assert all(
        bool(value["z"].isfinite().all()) for value in (guide.mean(), guide.snr(), guide.median())
    )


@pytest.mark.parametrize("elbo", [TraceMeanField_ELBO, sbp.ClosedFormELBO])
def test_it_finds_the_exact_posterior_of_a_truncated_normal(elbo):
    """A truncated normal prior is conjugate to the mean of a normal."""
    y = torch.tensor([0.4, -0.2, 0.9, 0.1])
    prior = TruncatedNormal(torch.tensor([0.0, -2.0]), 1.0, 0.0, 2.0)

    def model():
        with pyro.plate("sites", 2):
            z = pyro.sample("z", prior)
            with pyro.plate("data", 4):
                pyro.sample("y", dist.Normal(z, 0.5), obs=y[:, None].expand(4, 2))

    guide = sbp.TruncatedNormalGuide(model)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.97}), elbo(4))
    with pyro.validation_enabled(False):
        for _ in range(120):
            svi.step()
    precision = 1 + 4 / 0.25
    loc = (prior.loc + y.sum() / 0.25) / precision
    exact = TruncatedNormal(loc, precision**-0.5, 0.0, 2.0)
    (q,) = guide.posteriors().values()
    assert kl_divergence(q, exact).max() < 0.01
    torch.testing.assert_close(q.mean.detach(), exact.mean, atol=0.03, rtol=0)
    torch.testing.assert_close(q.stddev.detach(), exact.stddev, atol=0.03, rtol=0)


def test_parameters_stay_in_the_box_of_the_proven_numerics():
    guides = [sbp.TruncatedNormalGuide(of(prior)) for prior, _ in PRIORS.values()]
    for value in (1e9, -1e9):
        for guide in guides:
            with torch.no_grad():
                for parameter in guide.parameters():
                    parameter.fill_(value)
            for statistic in (guide.mean(), guide.snr(), guide.kl(), guide.quantiles([0.1, 0.9])):
                assert bool(statistic["z"].isfinite().all())
    wide = guides[0].posteriors()["z"]
    assert wide.scale.detach().log()[0].item() == pytest.approx(math.log(4 / 20) - 10)


def test_initial_values():
    def model():
        pyro.sample("a", dist.Uniform(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("b", dist.HalfNormal(1.0))

    guide = sbp.TruncatedNormalGuide(
        model, init_loc={"a": torch.tensor([0.2, 0.3])}, init_log_scale={"b": -2.0}
    )
    q = guide.posteriors()
    assert q["a"].loc.tolist() == pytest.approx([0.2, 0.3])
    assert q["b"].loc.item() == pytest.approx(math.sqrt(2 / math.pi))
    assert q["b"].scale.log().item() == pytest.approx(-2)
    values = {"a": torch.tensor([0.4, 0.9]), "b": torch.tensor(0.7)}
    guide = sbp.TruncatedNormalGuide(model, init_loc_fn=init_to_value(values=values))
    assert guide.posteriors()["a"].loc.tolist() == pytest.approx([0.4, 0.9])
    with pytest.raises(ValueError, match="no site 'c'"):
        sbp.TruncatedNormalGuide(model, init_loc={"c": 0.0})


def test_it_is_copied_composed_and_read_by_predictive():
    def model(x):
        theta = pyro.sample("theta", TruncatedLogUniform().expand([2]).to_event(1))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        other = pyro.sample("other", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(x @ theta + other, scale))

    x = torch.randn(5, 2)
    guide = AutoGuideList(model)
    for kind, site in (
        (sbp.TruncatedLogNormalGuide, "theta"),
        (sbp.TruncatedNormalGuide, "scale"),
    ):
        guide.append(kind(poutine.block(model, expose=[site]), x))
    guide.append(AutoNormal(poutine.block(model, expose=["other"])))
    found = Predictive(model, guide=guide, num_samples=3)(x)
    assert found["y"].shape == (3, 5) and bool((found["scale"] > 0).all())
    assert set(copy.deepcopy(guide[1])(x)) == {"scale"}


def test_subsampled_plates_get_parameters_of_the_whole():
    def model():
        with pyro.plate("items", 10, subsample_size=3):
            pyro.sample("z", dist.HalfNormal(2.0))

    guide = sbp.TruncatedNormalGuide(model)
    assert guide.mean()["z"].shape == guide.kl()["z"].shape == (10,)
    assert guide()["z"].shape == (3,)


@pytest.mark.parametrize(
    ("prior", "words"),
    [
        (dist.LogNormal(0.0, 1.0), "prior LogNormal; .*HalfNormal, Exponential and Normal"),
        (dist.Bernoulli(0.5), "prior Bernoulli"),
        (TruncatedNormal(0.0, 1.0, torch.tensor([0.0, -1.0, 0.0]), 1.0), "differ by element"),
        (dist.Uniform(0.0, torch.tensor(1.0, requires_grad=True)), "bounds that are learned"),
    ],
)
def test_other_priors_are_refused(prior, words):
    with pytest.raises(ValueError, match=words):
        sbp.TruncatedNormalGuide(of(prior))
