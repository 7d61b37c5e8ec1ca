"""The KL divergence to priors that are learned, or that depend on other sites."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints, kl_divergence

import pyro_sbp as sbp
from pyro_sbp.distributions import TruncatedLogNormal, TruncatedLogUniform


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(0)
    pyro.clear_param_store()


def with_param(x):
    scale = pyro.param("scale", torch.tensor(3.0), constraint=constraints.positive)
    with pyro.plate("units", 4):
        pyro.sample("theta", TruncatedLogNormal(-20.0, scale))


class WithModule(PyroModule):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        with pyro.plate("units", 4):
            pyro.sample("theta", TruncatedLogNormal(-20.0, self.scale))


MODELS = {
    "param": lambda: with_param,
    "Parameter": lambda: WithModule(nn.Parameter(torch.tensor(3.0))),
    "PyroParam": lambda: WithModule(PyroParam(torch.tensor(3.0), constraints.positive)),
}


def set_scale(model, value):
    with torch.no_grad():
        if isinstance(model, WithModule):
            for parameter in model.parameters():
                constrained = "unconstrained" in next(iter(dict(model.named_parameters())))
                parameter.fill_(torch.tensor(value).log() if constrained else value)
        else:
            pyro.get_param_store()["scale"] = torch.tensor(value)


@pytest.mark.parametrize("name", MODELS)
def test_the_kl_is_to_the_prior_of_now(name):
    model, x = MODELS[name](), torch.zeros(())
    guide = sbp.TruncatedLogNormalGuide(model, x, init_loc=-2.0)
    for value in (3.0, 1.5):
        set_scale(model, value)
        (q,) = guide.posteriors().values()
        expected = kl_divergence(q, TruncatedLogNormal(-20.0, value)).detach()
        torch.testing.assert_close(guide.kl(x)["theta"], expected, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match=r"'theta' is learned .*arguments of the model"):
        guide.kl()


@pytest.mark.parametrize("elbo", [sbp.ClosedFormELBO, TraceMeanField_ELBO])
def test_the_loss_has_the_gradient_in_a_learned_prior(elbo):
    x = torch.zeros(())
    guide = sbp.TruncatedLogNormalGuide(with_param, x, init_loc=-2.0)
    elbo().differentiable_loss(with_param, guide, x).backward()
    (log_scale,) = (p for n, p in pyro.get_param_store().named_parameters() if n == "scale")
    (q,) = guide.posteriors().values()
    double = TruncatedLogNormal(q.loc.detach().double(), q.scale.detach().double())
    step = 1e-5
    high, low = (
        kl_divergence(double, TruncatedLogNormal(-20.0, 3.0 * torch.tensor(s).double().exp())).sum()
        for s in (step, -step)
    )
    assert log_scale.grad.item() == pytest.approx(float(high - low) / (2 * step), rel=1e-4)


def test_a_prior_that_depends_on_a_site_of_the_guide():
    def model():
        tau = pyro.sample("tau", TruncatedLogUniform(-2.0, 1.0))
        pyro.sample("theta", TruncatedLogNormal(-20.0, tau))

    guide = sbp.TruncatedLogNormalGuide(model, init_loc=-1.0)
    pyro.set_rng_seed(1)
    found = guide.kl()["theta"]  # the model has no arguments
    pyro.set_rng_seed(1)
    expected = kl_divergence(guide.posteriors()["theta"], TruncatedLogNormal(-20.0, guide()["tau"]))
    torch.testing.assert_close(found, expected.detach())


def test_a_prior_that_depends_on_a_site_of_another_guide_is_refused():
    def model(x):
        tau = pyro.sample("tau", dist.HalfNormal(2.0))
        with pyro.plate("units", 4):
            pyro.sample("theta", TruncatedLogNormal(-20.0, 1.0 + tau))

    x = torch.zeros(())
    exposed = poutine.block(model, expose=["theta"])
    with pytest.raises(ValueError, match="depends on a site that this guide does not have"):
        sbp.TruncatedLogNormalGuide(exposed, x).kl(x)
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=["tau"])))
    guide.append(sbp.TruncatedLogNormalGuide(exposed, x))
    guide(x)  # Pyro's part is set up at the first call
    pyro.set_rng_seed(1)
    loss = sbp.ClosedFormELBO().loss(model, guide, x)
    pyro.set_rng_seed(1)
    assert loss == pytest.approx(TraceMeanField_ELBO().loss(model, guide, x), rel=1e-5)


def test_making_a_guide_draws_once():
    """The second run of the model, which finds what is learned, leaves the random state."""

    def model():
        pyro.sample("theta", TruncatedLogUniform())

    sbp.TruncatedLogNormalGuide(model)
    found = torch.rand(())
    pyro.set_rng_seed(0)
    model()
    assert found == torch.rand(())
