"""The KL of sparse variational dropout against quadrature and against series in many digits."""

import math

import mpmath
import numpy as np
import pytest
import torch
from scipy import integrate, special
from torch.distributions import Normal, kl_divergence

from pyro_sbp.distributions import AdditiveNormal, ImproperLogUniform
from pyro_sbp.distributions.log_uniform_kl import approximate_kl, exact_kl, kl_of_normal

LOG_ALPHA = np.linspace(-10, 10, 1000)
#: E log |e| of a standard normal e.
BASE = -0.5 * (np.euler_gamma + math.log(2))


def by_quadrature(log_alpha: float) -> float:
    """E log |e + alpha^-1/2| - E log |e|, without knowing that Dawson's function is in it."""
    u, far = math.exp(-log_alpha / 2), 12.0
    if u >= far:
        return (
            integrate.quad(lambda e: density(e) * math.log(e + u), -far, far, points=[0])[0] - BASE
        )
    # The logarithm is a weight of the quadrature, as it has no value at -u.
    above = integrate.quad(density, -u, far, weight="alg-loga", wvar=(0, 0), epsabs=1e-12)[0]
    below = integrate.quad(density, -far, -u, weight="alg-logb", wvar=(0, 0), epsabs=1e-12)[0]
    return above + below - BASE


def density(e: float) -> float:
    return math.exp(-e * e / 2) / math.sqrt(2 * math.pi)


@pytest.fixture(scope="module")
def truth():
    return np.array([by_quadrature(y) for y in LOG_ALPHA])


def test_the_exact_kl_is_that_of_quadrature_and_the_paper_s_is_near(truth):
    y = torch.from_numpy(LOG_ALPHA)
    assert np.abs(exact_kl(y).numpy() - truth).max() < 1e-10
    assert np.abs(exact_kl(y.float()).numpy() - truth).max() < 1e-6
    error = np.abs(approximate_kl(y).numpy() - truth).max()
    assert 5e-3 < error < 1e-2
    assert exact_kl(torch.tensor(60.0)) < 1e-7 and bool((exact_kl(y) >= 0).all())


def test_the_exact_kl_in_many_digits():
    for y in (-9.5, -4.0, -1.0, 0.0, 0.3, 2.0, 5.0, 9.0):
        half = mpmath.exp(-mpmath.mpf(y)) / 2
        with mpmath.workdps(40):
            expected = half * mpmath.hyp2f2(1, 1, 1.5, 2, -half)
        found = float(exact_kl(torch.tensor(y, dtype=torch.float64)))
        assert found == pytest.approx(float(expected), abs=3e-14)


@pytest.mark.parametrize("exact", [False, True])
def test_the_gradients_are_those_of_the_values(exact):
    loc = torch.tensor([0.1, -2.0, 0.5, 1e-3], dtype=torch.float64, requires_grad=True)
    log_variance = torch.tensor([-3.0, 1.0, -9.0, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: kl_of_normal(a, b, exact), (loc, log_variance))


def test_the_exact_gradient_is_dawson_s_function():
    y = torch.linspace(-10, 10, 1000, dtype=torch.float64)
    loc = torch.ones_like(y).requires_grad_()
    kl_of_normal(loc, y, exact=True).sum().backward()
    u = (-y / 2).exp().numpy()
    expected = math.sqrt(2) * u * special.dawsn(u / math.sqrt(2))
    np.testing.assert_allclose(loc.grad.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_is_finite_everywhere(exact, dtype):
    size = torch.tensor([0, 1e-38, 1e-20, 1e-8, 1e-3, 1, 1e3, 1e15], dtype=dtype)
    loc, log_variance = torch.meshgrid(
        torch.cat([size, -size]), torch.linspace(-170, 170, 41, dtype=dtype), indexing="ij"
    )
    loc, log_variance = loc.clone().requires_grad_(), log_variance.clone().requires_grad_()
    kl = kl_of_normal(loc, log_variance, exact)
    kl.sum().backward()
    for values in (kl, loc.grad, log_variance.grad):
        assert bool(values.isfinite().all())
    # A mean that grows, and a variance that falls, say more.
    assert bool((loc.grad * loc >= 0).all()) and bool((log_variance.grad <= 0).all())


@pytest.mark.parametrize("exact", [False, True])
def test_the_divergence_is_registered_for_both_normals(exact):
    loc, scale = torch.tensor([0.3, -1.2]), torch.tensor([0.5, 2.0])
    prior = ImproperLogUniform([2], exact=exact)
    function = exact_kl if exact else approximate_kl
    expected = function((scale / loc).square().log())
    for q in (AdditiveNormal(loc, 2 * scale.log()), Normal(loc, scale)):
        torch.testing.assert_close(kl_divergence(q, prior), expected)
