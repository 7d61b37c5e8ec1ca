"""TraceMeanField_ELBO takes the closed form, whatever wraps the distributions."""

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from scipy import integrate, stats

from pyro_sbp.distributions import TruncatedLogNormal, TruncatedLogUniform

LOC, SCALE = (-3.0, -1.0, -8.0), (0.5, 1.0, 2.0)
MASK = torch.tensor([True, False, True])


def kl(loc: float, scale: float) -> float:
    """KL of log theta to the uniform, by scipy's quadrature."""
    q = stats.truncnorm((-20 - loc) / scale, -loc / scale, loc, scale)

    def integrand(x: float) -> float:
        return q.pdf(x) * (q.logpdf(x) - stats.uniform.logpdf(x, -20, 20))

    return integrate.quad(integrand, -20, 0, points=[loc], limit=500, epsabs=1e-12)[0]


KL = [kl(loc, scale) for loc, scale in zip(LOC, SCALE, strict=True)]


def plate(make):
    with pyro.plate("units", 3):
        pyro.sample("theta", make())


def event(make):
    pyro.sample("theta", make().to_event(1))


def expanded(make):
    with pyro.plate("examples", 4, dim=-2), pyro.plate("units", 3, dim=-1):
        pyro.sample("theta", make())


def expanded_event_scaled(make):
    with pyro.plate("examples", 4), poutine.scale(scale=0.25):
        pyro.sample("theta", make().to_event(1))


def masked(make):
    with pyro.plate("units", 3), poutine.mask(mask=MASK):
        pyro.sample("theta", make())


def masked_distribution(make):
    with pyro.plate("units", 3):
        pyro.sample("theta", make().mask(MASK))


def masked_event(make):
    with pyro.plate("examples", 3):
        pyro.sample("theta", make().expand([3, 3]).mask(MASK).to_event(1))


@pytest.mark.parametrize(
    "sites, expected",
    [
        (plate, sum(KL)),
        (event, sum(KL)),
        (expanded, 4 * sum(KL)),
        (expanded_event_scaled, sum(KL)),
        (masked, KL[0] + KL[2]),
        (masked_distribution, KL[0] + KL[2]),
        (masked_event, 3 * (KL[0] + KL[2])),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_trace_mean_field_elbo_uses_the_closed_form(sites, expected):
    # Without a likelihood the loss is the KL. The Monte Carlo estimate has a standard deviation of
    # about one here, so that two seeds agree, with scipy, only if no sample is in the loss.
    loc, scale = torch.tensor(LOC, requires_grad=True), torch.tensor(SCALE, requires_grad=True)

    def model():
        sites(lambda: TruncatedLogUniform(-20.0, 0.0).expand([3]))

    def guide():
        sites(lambda: TruncatedLogNormal(loc, scale))

    elbo = TraceMeanField_ELBO()
    for seed in range(2):
        pyro.set_rng_seed(seed)
        loss = elbo.differentiable_loss(model, guide)
        assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert loc.grad.isfinite().all() and scale.grad.isfinite().all()
    assert loc.grad[2] != 0 and scale.grad[0] < 0


def test_a_monte_carlo_estimate_would_be_seen():
    # The same with a prior that no KL is known for: the losses of two seeds differ.
    def model():
        with pyro.plate("units", 3):
            pyro.sample("theta", dist.Gamma(1.0, 1.0))

    def guide():
        with pyro.plate("units", 3):
            pyro.sample("theta", TruncatedLogNormal(torch.tensor(LOC), torch.tensor(SCALE)))

    losses = []
    for seed in range(2):
        pyro.set_rng_seed(seed)
        losses.append(TraceMeanField_ELBO().loss(model, guide))
    assert abs(losses[0] - losses[1]) > 1e-3
