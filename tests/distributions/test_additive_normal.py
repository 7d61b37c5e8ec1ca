"""The normal posterior of sparse variational dropout, and its closed-form KL."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO

from pyro_sbp.distributions import AdditiveNormal, ImproperLogUniform
from pyro_sbp.distributions.log_uniform_kl import approximate_kl

LOC = torch.tensor([0.5, -1.0, 2.0])
LOG_VARIANCE = torch.tensor([-4.0, 0.0, 3.0])


def test_the_additive_form_says_what_the_multiplicative_one_does():
    q = AdditiveNormal(LOC, LOG_VARIANCE)
    alpha = LOG_VARIANCE.exp() / LOC.square()
    torch.testing.assert_close(q.log_alpha, alpha.log())
    torch.testing.assert_close(q.snr, alpha.rsqrt())
    torch.testing.assert_close(q.variance, alpha * LOC.square())
    torch.testing.assert_close(q.stddev, q.scale)
    # The paper's threshold.
    assert AdditiveNormal(1.0, 3.0).snr == pytest.approx(math.exp(-1.5))


def test_local_noise_leaves_the_mean():
    q = AdditiveNormal(LOC.clone().requires_grad_(), LOG_VARIANCE, local=True)
    assert torch.equal(q.rsample((2,)), LOC.expand(2, 3)) and q.rsample().requires_grad
    assert q.expand([4, 3]).local and not q.sample().requires_grad
    assert not torch.equal(AdditiveNormal(LOC, LOG_VARIANCE).sample(), LOC)


def test_bad_parameters_are_refused():
    with pytest.raises(ValueError, match="log_variance must be finite, got inf"):
        AdditiveNormal(LOC, math.inf, validate_args=True)
    with pytest.raises(ValueError, match="shapes do not broadcast"):
        AdditiveNormal(LOC, torch.zeros(2))


def test_it_composes_in_a_model_of_one_s_own_and_the_closed_form_runs(monkeypatch):
    def model():
        with pyro.plate("weights", 3):
            pyro.sample("w", ImproperLogUniform())
        pyro.sample("v", ImproperLogUniform().expand([3]).to_event(1))

    def guide():
        with pyro.plate("weights", 3), pyro.poutine.scale(scale=2.0):
            pyro.sample("w", AdditiveNormal(LOC, LOG_VARIANCE))
        pyro.sample("v", dist.Normal(LOC, (0.5 * LOG_VARIANCE).exp()).to_event(1))

    expected = 3 * float(approximate_kl(LOG_VARIANCE - LOC.square().log()).sum())
    # Monte Carlo would differ from draw to draw.
    for _ in range(3):
        assert TraceMeanField_ELBO().loss(model, guide) == pytest.approx(expected, rel=1e-5)
