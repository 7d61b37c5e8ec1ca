"""Divergences between truncated distributions and torch's own, against integrals and draws."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from mpmath import mp, mpf
from pyro.infer import TraceMeanField_ELBO
from scipy import integrate
from torch.distributions import kl_divergence

from pyro_sbp.distributions import TruncatedLogNormal, TruncatedLogUniform, TruncatedNormal
from pyro_sbp.experiments.truncated_normal_truth import Truth

INF = math.inf
#: Inside, at an end, far outside, nearly uniform, and without an upper bound.
POSITIVE = [
    (1.0, 0.5, 0.2, 3.0),
    (0.0, 0.1, 0.0, 5.0),
    (-30.0, 0.5, 0.0, 2.0),
    (9.0, 0.3, 0.5, 4.0),
    (1.0, 50.0, 0.0, 1.0),
    (-1.0, 2.0, 0.3, INF),
]
ANYWHERE = [*POSITIVE, (-3.0, 2.0, -20.0, 0.0), (4.0, 0.01, -20.0, 0.0), (1.0, 2.0, -INF, INF)]


def number(x):
    return torch.tensor(x, dtype=torch.float64)


def normal(parameters):
    return TruncatedNormal(*map(number, parameters))


def assert_right(kl, true):
    assert abs(kl.item() - true) < 1e-12 * max(1, abs(true))


def second_moment(p, center):
    return p.variance + (p.mean - center) ** 2


@pytest.mark.parametrize("loc, scale", [(0.0, 1.0), (-2.0, 0.3), (5.0, 40.0)])
@pytest.mark.parametrize("p", ANYWHERE)
def test_truncated_normal_to_normal(p, loc, scale):
    kl = kl_divergence(normal(p), dist.Normal(number(loc), number(scale)))
    p = Truth(*p)
    log_q = mp.log(mpf(scale)) + mp.log(2 * mp.pi) / 2
    assert_right(kl, log_q + second_moment(p, mpf(loc)) / (2 * mpf(scale) ** 2) - p.entropy)


@pytest.mark.parametrize("scale", [0.2, 1.0, 30.0])
@pytest.mark.parametrize("p", POSITIVE)
def test_truncated_normal_to_half_normal(p, scale):
    kl = kl_divergence(normal(p), dist.HalfNormal(number(scale)))
    p = Truth(*p)
    log_q = mp.log(mpf(scale)) + mp.log(mp.pi / 2) / 2
    assert_right(kl, log_q + second_moment(p, 0) / (2 * mpf(scale) ** 2) - p.entropy)


@pytest.mark.parametrize("rate", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("p", POSITIVE)
def test_truncated_normal_to_exponential(p, rate):
    kl = kl_divergence(normal(p), dist.Exponential(number(rate)))
    p = Truth(*p)
    assert_right(kl, mpf(rate) * p.mean - mp.log(mpf(rate)) - p.entropy)


@pytest.mark.parametrize(
    "low, high, q",
    [
        (0.2, 3.0, (1.0, 0.5, 0.2, 3.0)),
        (-1.0, 1.0, (0.0, 3.0, -2.0, 5.0)),
        (-20.0, 0.0, (-20.0, 1.2, -20.0, 0.0)),
        (-20.0, 0.0, (30.0, 2.0, -25.0, 1.0)),
        (-20.0, 0.0, (-9.0, 1e4, -20.0, 0.0)),
        (0.5, 0.6, (-3.0, 0.7, 0.0, INF)),
        (-4.0, 7.0, (1.0, 2.0, -INF, INF)),
    ],
)
def test_uniform_to_truncated_normal(low, high, q):
    kl = kl_divergence(dist.Uniform(number(low), number(high)), normal(q))
    q = Truth(*q)
    width, middle = mpf(high) - low, (mpf(low) + high) / 2
    second = width**2 / 12 + (middle - q.loc) ** 2
    true = q.log_normalizer + mp.log(q.scale) + mp.log(2 * mp.pi) / 2 + second / (2 * q.scale**2)
    assert_right(kl, true - mp.log(width))


def quadrature(p, q, low, high):
    """E_p[log p - log q] over the logarithm x of theta, by scipy."""

    def integrand(x):
        log_p, log_q = (d.log_prob(number(math.exp(x))).item() for d in (p, q))
        return math.exp(log_p + x) * (log_p - log_q)

    return integrate.quad(integrand, low, high, limit=200, epsabs=1e-10)[0]


def log_normal(*parameters):
    return TruncatedLogNormal(*map(number, parameters), validate_args=False)


@pytest.mark.parametrize(
    "p, q",
    [
        (log_normal(-1.0, 0.5, -3.0, 0.5), dist.LogNormal(number(0.0), number(2.0))),
        (TruncatedLogUniform(number(-3.0), 0.5), log_normal(-1.0, 0.5, -3.0, 0.5)),
        (TruncatedLogUniform(number(-3.0), 0.5), log_normal(-9.0, 3.0, -4.0, 1.0)),
        (TruncatedLogUniform(number(-3.0), 0.5), dist.LogNormal(number(0.0), number(2.0))),
    ],
)
def test_of_log_distributions(p, q):
    kl = kl_divergence(p, q).item()
    assert kl == pytest.approx(quadrature(p, q, -3.0 + 1e-12, 0.5 - 1e-12), rel=1e-8)


PAIRS = [
    (normal((1.0, 0.5, 0.2, 3.0)), dist.Normal(number(0.0), number(2.0))),
    (normal((1.0, 0.5, 0.2, 3.0)), dist.HalfNormal(number(1.5))),
    (normal((1.0, 0.5, 0.2, 3.0)), dist.Exponential(number(2.0))),
    (dist.Uniform(number(0.2), number(3.0)), normal((1.0, 0.5, 0.0, 3.0))),
    (log_normal(-1.0, 0.5, -3.0, 0.5), dist.LogNormal(number(0.0), number(2.0))),
    (TruncatedLogUniform(number(-3.0), 0.5), log_normal(-1.0, 0.5, -3.0, 0.5)),
]


@pytest.mark.parametrize("p, q", PAIRS)
def test_monte_carlo_agrees(p, q):
    torch.manual_seed(0)
    x = p.sample((100_000,))
    log_ratio = p.log_prob(x) - q.log_prob(x)
    error = log_ratio.std() / math.sqrt(len(x))  # four standard errors: one in 16,000 draws is off
    assert (log_ratio.mean() - kl_divergence(p, q)).abs() < 4 * error


@pytest.mark.parametrize(
    "p, q",
    [
        (normal((1.0, 0.5, -0.1, 3.0)), dist.HalfNormal(1.0)),
        (normal((1.0, 0.5, -INF, 3.0)), dist.Exponential(1.0)),
        (dist.Uniform(0.0, 2.0), normal((1.0, 0.5, 0.1, 3.0))),
        (dist.Uniform(0.0, 2.0), normal((1.0, 0.5, -INF, 1.0))),
        (TruncatedLogUniform(-4.0, 0.0), log_normal(-1.0, 0.5, -3.0, 0.0)),
    ],
)
def test_infinite_where_the_support_is_not_contained(p, q):
    assert kl_divergence(p, q) == INF


def test_shapes_and_dtypes():
    p = TruncatedNormal(torch.ones(3), 0.5, 0.2, 3.0).expand([2, 3])
    for q in (dist.Normal(0.0, 2.0), dist.HalfNormal(1.5), dist.Exponential(2.0)):
        kl = kl_divergence(p, q.expand([2, 3]))
        assert kl.shape == (2, 3) and kl.dtype == torch.float32
    kl = kl_divergence(dist.Uniform(0.5, 1.0).expand([2, 3]), p)
    assert kl.shape == (2, 3) and kl.dtype == torch.float32


def test_gradients():
    inputs = [number(x).requires_grad_() for x in (0.7, 0.4, 0.1, 2.0, -0.3, 1.3)]

    def kls(loc, scale, low, high, loc_q, scale_q):
        p = TruncatedNormal(loc, scale, low, high)
        return (
            kl_divergence(p, dist.Normal(loc_q, scale_q)),
            kl_divergence(p, dist.HalfNormal(scale_q)),
            kl_divergence(p, dist.Exponential(scale_q)),
            kl_divergence(
                dist.Uniform(low, high), TruncatedNormal(loc_q, scale_q, low - 1, high + 2)
            ),
        )

    assert torch.autograd.gradcheck(kls, inputs, eps=1e-6, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("p, q", PAIRS)
def test_trace_mean_field_elbo_uses_them(p, q):
    def model():
        with pyro.plate("units", 3):
            pyro.sample("x", q)

    def guide():
        with pyro.plate("units", 3):
            pyro.sample("x", p)

    losses = []
    for seed in range(2):
        pyro.set_rng_seed(seed)
        losses.append(TraceMeanField_ELBO().loss(model, guide))
    # A Monte Carlo estimate would depend on the seed.
    assert losses[0] == losses[1] == pytest.approx(3 * kl_divergence(p, q).item(), rel=1e-12)
