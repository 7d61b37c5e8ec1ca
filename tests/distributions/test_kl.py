"""Divergences in closed form, against integrals and limits."""

import math

import pyro.distributions as dist
import pytest
import torch
from mpmath import mp
from torch.distributions import kl_divergence

from pyro_sbp.distributions import TruncatedLogNormal, TruncatedLogUniform, TruncatedNormal
from pyro_sbp.experiments.truncated_normal_truth import Truth

INF = math.inf


def number(x):
    return torch.tensor(x, dtype=torch.float64)


def normal(*parameters):
    return TruncatedNormal(*map(number, parameters))


def true_kl(p, q):
    """E_p[log p - log q] by mpmath, from the moments: log q is a parabola."""
    p, q = Truth(*p), Truth(*q)
    at_mean = p.log_density(p.mean) - q.log_density(p.mean)
    return at_mean - p.variance * (1 / p.scale**2 - 1 / q.scale**2) / 2


@pytest.mark.parametrize(
    "p, q",
    [
        ((-3.0, 0.5, -20.0, 0.0), (-5.0, 2.0, -20.0, 0.0)),
        ((-3.0, 0.5, -20.0, 0.0), (-3.0, 0.5, -20.0, 0.0)),
        ((-24.0, 0.1, -20.0, 0.0), (-22.0, 0.3, -20.0, 0.0)),
        ((4.0, 0.01, -20.0, 0.0), (-9.0, 100.0, -20.0, 0.0)),
        ((-9.0, 100.0, -20.0, 0.0), (-11.0, 90.0, -20.0, 0.0)),
        ((1.0, 2.0, -1.0, 1.0), (0.0, 3.0, -2.0, 5.0)),
        ((1.0, 2.0, 0.0, INF), (-3.0, 2.5, 0.0, INF)),
        ((1.0, 2.0, -INF, INF), (-3.0, 2.5, -INF, INF)),
        ((1.0, 2.0, 0.0, 3.0), (-3.0, 2.5, -INF, INF)),
    ],
)
def test_kl_between_truncated_normals(p, q):
    kl = kl_divergence(normal(*p), normal(*q)).item()
    true = true_kl(p, q)
    assert abs(kl - true) < 1e-12 * max(1, abs(true))
    assert kl >= 0


def test_kl_between_normals_without_bounds_is_the_textbook_one():
    p, q = normal(0.3, 2.0, -INF, INF), normal(-1.0, 0.7, -INF, INF)
    true = kl_divergence(
        dist.Normal(number(0.3), number(2.0)), dist.Normal(number(-1.0), number(0.7))
    )
    torch.testing.assert_close(kl_divergence(p, q), true, rtol=1e-13, atol=0)


@pytest.mark.parametrize("low, high", [(-20.0, 0.0), (-25.0, 0.0), (-20.0, 5.0), (-30.0, 10.0)])
def test_kl_to_a_uniform_that_contains_it(low, high):
    t = Truth(-3.0, 0.5, -20.0, 0.0)
    true = float(t.kl + mp.log((mp.mpf(high) - low) / 20))
    p = normal(-3.0, 0.5, -20.0, 0.0)
    kl = kl_divergence(p, dist.Uniform(number(low), number(high)))
    assert kl.item() == pytest.approx(true, rel=1e-13)
    log_kl = kl_divergence(
        TruncatedLogNormal(number(-3.0), 0.5), TruncatedLogUniform(number(low), high)
    )
    assert log_kl.item() == pytest.approx(kl.item(), rel=1e-13)


@pytest.mark.parametrize(
    "q_low, q_high", [(-19.0, 0.0), (-20.0, -0.5), (-19.0, -1.0), (1.0, 2.0), (-40.0, -0.001)]
)
def test_infinite_where_the_support_is_not_contained(q_low, q_high):
    # Even where almost none of the mass is outside.
    p = normal(-10.0, 0.1, -20.0, 0.0)
    assert kl_divergence(p, dist.Uniform(number(q_low), number(q_high))) == INF
    assert kl_divergence(p, normal(-10.0, 0.1, q_low, q_high)) == INF
    log_normal = TruncatedLogNormal(number(-10.0), 0.1)
    assert kl_divergence(log_normal, TruncatedLogUniform(number(q_low), q_high)) == INF
    assert kl_divergence(log_normal, TruncatedLogNormal(number(-10.0), 0.1, q_low, q_high)) == INF


def test_only_the_elements_that_are_not_contained_are_infinite():
    p = TruncatedNormal(torch.zeros(3), 1.0, torch.tensor([-1.0, -2.0, -3.0]), 1.0)
    kl = kl_divergence(p, dist.Uniform(torch.tensor(-2.0), torch.tensor(1.0)).expand([3]))
    assert kl.isfinite().tolist() == [True, True, False]


def test_kl_to_a_uniform_of_an_unbounded_normal_is_infinite():
    p = TruncatedNormal(0.0, 1.0, 0.0, INF)
    assert kl_divergence(p, dist.Uniform(0.0, 1e30)) == INF


def test_of_expanded_distributions():
    # One value for every element, though copies are computed once; gradients add up.
    loc = torch.tensor([-3.0, -1.0], requires_grad=True)
    p = TruncatedLogNormal(loc, 0.5).expand([5, 2])
    q = TruncatedLogUniform(-20.0, 0.0).expand([5, 2])
    kl = kl_divergence(p, q)
    assert kl.shape == (5, 2) and kl.dtype == torch.float32
    (d_expanded,) = torch.autograd.grad(kl.sum(), loc)
    one = kl_divergence(TruncatedLogNormal(loc, 0.5), TruncatedLogUniform(-20.0, 0.0).expand([2]))
    (d_one,) = torch.autograd.grad(one.sum(), loc)
    torch.testing.assert_close(kl[3], one)
    torch.testing.assert_close(d_expanded, 5 * d_one)


def test_start_of_the_papers_recipe():
    # Recomputed from arXiv:1705.07283: mu 0, log sigma -5 gives 7.270 nats and SNR 246.7.
    q = TruncatedLogNormal(torch.tensor(0.0), math.exp(-5))
    assert kl_divergence(q, TruncatedLogUniform()).item() == pytest.approx(7.270, abs=5e-4)
    assert q.snr.item() == pytest.approx(246.7, abs=0.05)
    assert q.mean.item() == pytest.approx(0.9946, abs=5e-5)


def test_the_unit_that_the_published_code_loses():
    # mu -0.1, log sigma -5: strongly kept, and removed there, since erfcx overflows in float32.
    q = TruncatedLogNormal(torch.tensor(-0.1), math.exp(-5))
    assert q.snr.item() == pytest.approx(148.4, abs=0.1)


#: Scales of a prior that leans to zero, from nearly a point mass to nearly log-uniform.
PRIOR_SCALES = (0.01, 1.2, 3.0, 5.0, 20.0, 1e3)


@pytest.fixture(scope="module")
def box():
    """Posteriors from all over the box of the guide, its corners with them, and their truth."""
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(2, 40, generator=generator, dtype=torch.float64)
    loc = torch.cat([u[0] * 30 - 25, number([-25.0, -25.0, 5.0, 5.0, -20.0, 0.0])])
    scale = torch.cat([u[1] * 15 - 10, number([-10.0, 5.0, -10.0, 5.0, 0.0, -5.0])]).exp()
    truths = [Truth(a, b, -20.0, 0.0) for a, b in zip(loc.tolist(), scale.tolist(), strict=True)]
    return loc, scale, truths


@pytest.mark.parametrize("prior_scale", PRIOR_SCALES)
def test_kl_to_the_prior_that_leans_to_zero_all_over_the_box(box, prior_scale):
    loc, scale, truths = box
    loc, scale = loc.clone().requires_grad_(), scale.clone().requires_grad_()
    prior = TruncatedLogNormal(number(-20.0), number(prior_scale), -20.0, 0.0).expand(loc.shape)
    kl = kl_divergence(TruncatedLogNormal(loc, scale, -20.0, 0.0), prior)
    p = Truth(-20.0, prior_scale, -20.0, 0.0)
    for value, q in zip(kl.tolist(), truths, strict=True):
        # By the moments of x + 20, as log p is a parabola there: another way than true_kl's.
        second = q.variance + (q.mean + 20) ** 2
        true = p.log_normalizer + mp.log(p.scale) + mp.log(2 * mp.pi) / 2
        true += second / (2 * p.scale**2) - q.entropy
        assert abs(value - true) < 1e-12 * max(1, abs(true))
        assert value >= 0
    d_loc, d_scale = torch.autograd.grad(kl.sum(), [loc, scale])
    assert d_loc.isfinite().all() and d_scale.isfinite().all()


@pytest.mark.parametrize("prior_scale", [1.2, 5.0])
def test_gradient_of_the_kl_to_the_prior_that_leans_to_zero(prior_scale):
    loc = number([-22.0, -20.0, -12.0, -3.0, 0.0, 3.0]).requires_grad_()
    log_scale = number([-1.0, 0.5, -2.0, 1.0, -5.0, 4.0]).requires_grad_()

    def kl(loc, log_scale):
        prior = TruncatedLogNormal(number(-20.0), number(prior_scale), -20.0, 0.0)
        posterior = TruncatedLogNormal(loc, log_scale.exp(), -20.0, 0.0)
        return kl_divergence(posterior, prior.expand(loc.shape))

    assert torch.autograd.gradcheck(kl, (loc, log_scale), eps=1e-6, atol=1e-5, rtol=1e-6)


def test_in_float32_the_kl_to_the_prior_that_leans_to_zero_is_right_to_its_last_digits(box):
    loc, scale, _ = box
    for prior_scale in PRIOR_SCALES:
        exact = kl_divergence(
            TruncatedLogNormal(loc, scale, -20.0, 0.0),
            TruncatedLogNormal(number(-20.0), number(prior_scale), -20.0, 0.0).expand(loc.shape),
        )
        single = kl_divergence(
            TruncatedLogNormal(loc.float(), scale.float(), -20.0, 0.0),
            TruncatedLogNormal(torch.tensor(-20.0), prior_scale, -20.0, 0.0).expand(loc.shape),
        )
        assert single.dtype == torch.float32 and bool(single.isfinite().all())
        torch.testing.assert_close(single.double(), exact, rtol=2e-5, atol=1e-5)


def test_the_prior_that_leans_to_zero_widens_to_the_log_uniform():
    q = TruncatedLogNormal(number([-3.0, -18.0]), number([0.5, 2.0]), -20.0, 0.0)
    wide = TruncatedLogNormal(number(-20.0), number(1e6), -20.0, 0.0).expand([2])
    uniform = TruncatedLogUniform(number(-20.0), 0.0).expand([2])
    torch.testing.assert_close(kl_divergence(q, wide), kl_divergence(q, uniform), rtol=1e-9, atol=0)
