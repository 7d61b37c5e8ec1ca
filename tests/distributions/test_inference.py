"""What Pyro's inference asks of a distribution: jit, second derivatives, gradients of bounds."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    JitTrace_ELBO,
    JitTraceMeanField_ELBO,
    Trace_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoLaplaceApproximation
from pyro.infer.mcmc.util import initialize_model
from pyro.optim import Adam

from pyro_sbp.distributions import TruncatedLogNormal, TruncatedLogUniform, TruncatedNormal

# torch.jit is deprecated in torch, and tells that Pyro's trace has constants.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
INF = math.inf


def positive():
    s = pyro.sample("s", TruncatedNormal(0.0, 1.0, 0.0, INF))
    pyro.sample("y", dist.Normal(0.0, s), obs=torch.tensor(1.0))


def test_laplace_approximation():
    pyro.clear_param_store()
    guide = AutoLaplaceApproximation(positive)
    svi = SVI(positive, guide, Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(400):
        svi.step()
    # With x = log s the log density is -s^2 / 2 - log s - 1 / (2 s^2) + log s: 0 at x = 0, with
    # the second derivative -2 s^2 - 2 / s^2 = -4 there.
    covariance = guide.laplace_approximation().get_posterior().covariance_matrix
    assert covariance.item() == pytest.approx(1 / 4, rel=1e-3)


def hierarchical():
    h = pyro.sample("h", dist.HalfNormal(1.0))
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    pyro.sample("t", TruncatedNormal(m, 0.5 + h, -h, 2 * h))


def test_the_potential_of_mcmc_has_the_gradients_of_all_parameters():
    with pyro.validation_enabled(False):  # as MCMC has it
        z, potential, *_ = initialize_model(hierarchical)
        z = {name: x.double().requires_grad_() for name, x in z.items()}

        def of(*values):
            return potential(dict(zip(z, values, strict=True)))

        assert torch.autograd.gradcheck(of, tuple(z.values()), eps=1e-6, atol=1e-7)
        assert torch.autograd.gradgradcheck(of, tuple(z.values()), eps=1e-6, atol=1e-6)


def prior():
    with pyro.plate("units", 2):
        return pyro.sample("theta", TruncatedLogUniform())


def model():
    pyro.sample("y", dist.Normal(prior().sum(), 0.1), obs=torch.tensor(0.8))


def guide():
    loc = pyro.param("loc", torch.tensor([-1.0, -2.0]))
    scale = pyro.param("scale", torch.tensor([0.5, 0.7]), dist.constraints.positive)
    with pyro.plate("units", 2):
        pyro.sample("theta", TruncatedLogNormal(loc, scale))


@pytest.mark.parametrize(
    "model, jit, eager",
    [
        (model, JitTrace_ELBO, Trace_ELBO),
        # Its draws are in another order, so the model has the KL only.
        (prior, JitTraceMeanField_ELBO, TraceMeanField_ELBO),
    ],
)
def test_jit_elbos_have_the_same_gradients(model, jit, eager):
    results = []
    for elbo in (jit(), eager()):
        pyro.clear_param_store()
        elbo.loss_and_grads(model, guide)  # traces with draws of its own
        parameters = dict(pyro.get_param_store().named_parameters())
        for parameter in parameters.values():
            parameter.grad = None
        pyro.set_rng_seed(1)
        loss = elbo.loss_and_grads(model, guide)
        results.append([torch.tensor(loss), *(x.grad for x in parameters.values())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_nuts_with_jit():
    pyro.set_rng_seed(0)
    kernel = NUTS(positive, jit_compile=True, ignore_jit_warnings=True)
    mcmc = MCMC(kernel, num_samples=20, warmup_steps=20, disable_progbar=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mcmc.run()
    s = mcmc.get_samples()["s"]
    assert (s > 0).all() and s.std() > 0.05


@pytest.mark.parametrize("name", ["mean", "stddev", "snr", "entropy", "sample_at_u", "log_prob"])
def test_jit_trace_gives_the_same_at_other_parameters(name):
    def function(loc):
        q = TruncatedLogNormal(loc, 0.5, validate_args=False)
        if name == "sample_at_u":
            return q.icdf(torch.tensor(0.3))
        if name == "log_prob":
            return q.log_prob(torch.tensor(0.3))
        return q.entropy() if name == "entropy" else getattr(q, name)

    traced = torch.jit.trace(function, torch.tensor([-1.0, -2.0, -3.0]))
    loc = torch.tensor([-25.0, -7.0, 2.0], requires_grad=True)
    results = []
    for f in (traced, function):
        value = f(loc)
        results.append((value, *torch.autograd.grad(value.sum(), loc)))
    torch.testing.assert_close(*results)
