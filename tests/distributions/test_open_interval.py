"""Bounds that are infinite for some elements only."""

import math

import pyro
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch.distributions import biject_to, transform_to

from pyro_sbp.distributions import TruncatedNormal

INF = math.inf
LOW = torch.tensor([0.5, -INF, -INF, -1.0], dtype=torch.float64)
HIGH = torch.tensor([INF, 2.0, INF, 3.0], dtype=torch.float64)
X = torch.tensor([-40.0, -3.0, 0.0, 0.7, 5.0, 800.0], dtype=torch.float64)[:, None].expand(6, 4)


@pytest.fixture
def support():
    return TruncatedNormal(torch.zeros(4, dtype=torch.float64), 1.0, LOW, HIGH).support


def test_the_constraint(support):
    inside = torch.tensor([0.5, 2.0, -1e9, 3.0], dtype=torch.float64)
    assert support.check(inside).all()
    outside = torch.tensor([0.4, 2.1, math.nan, 3.1], dtype=torch.float64)
    assert not support.check(outside).any()


@pytest.mark.parametrize("registry", [biject_to, transform_to])
def test_the_bijection(support, registry):
    t = registry(support)
    x = X[:5]
    y = t(x)
    assert support.check(y).all() and support.check(t(X)).all()
    torch.testing.assert_close(t.inv(y)[1:], x[1:], rtol=1e-9, atol=1e-9)
    expected = torch.stack([0.5 + x[:, 0].exp(), 2 - x[:, 1].exp(), x[:, 2]], -1)
    torch.testing.assert_close(y[:, :3], expected)
    torch.testing.assert_close(y[:, 3], -1 + 4 * x[:, 3].sigmoid())


def test_its_jacobian(support):
    t = biject_to(support)
    x = X[1:5].clone().requires_grad_()
    y = t(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(t.log_abs_det_jacobian(x, y), slope.abs().log())
    assert t.with_cache(1).log_abs_det_jacobian(x, y).shape == (4, 4)
    assert t == biject_to(support) and t.with_cache() == t
    # The branches that are not taken overflow at 800.
    far = torch.tensor([0.0, 0.0, 800.0, 800.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(t(far).sum(), far)
    assert slope.tolist() == [1.0, -1.0, 1.0, 0.0]
    y = t(X[3]).clone().requires_grad_()
    (slope,) = torch.autograd.grad(t.inv(y).sum(), y)
    assert slope.isfinite().all()


def test_gradients_reach_the_bounds():
    low, high = LOW.clone().requires_grad_(), HIGH.clone().requires_grad_()
    support = TruncatedNormal(torch.zeros(4, dtype=torch.float64), 1.0, low, high).support
    y = biject_to(support)(X[3])
    d_low, d_high = torch.autograd.grad(y.sum(), (low, high))
    share = 1 / (1 + math.exp(-0.7))
    torch.testing.assert_close(d_low, torch.tensor([1.0, 0.0, 0.0, 1 - share]).double())
    torch.testing.assert_close(d_high, torch.tensor([0.0, 1.0, 0.0, share]).double())


def test_an_autoguide_draws_within_the_bounds():
    d = TruncatedNormal(torch.zeros(4, dtype=torch.float64), 1.0, LOW, HIGH)
    pyro.clear_param_store()
    guide = AutoNormal(lambda: pyro.sample("t", d.to_event(1)))
    assert all(d.support.check(guide()["t"]).all() for _ in range(20))


@pytest.mark.parametrize("high", [HIGH, torch.ones(4, dtype=torch.float64)])
def test_under_vmap(high):
    low = torch.tensor([-1.0, -2.0, -0.5, -INF], dtype=torch.float64)

    def bounded(low, high, x):
        return biject_to(TruncatedNormal(0.0, 1.0, low, high).support)(x)

    each = torch.func.vmap(bounded)(low, high, X[3])
    torch.testing.assert_close(each, bounded(low, high, X[3]))


@pytest.mark.parametrize(
    "low, high", [([-INF, -INF], [INF, 1.0]), ([0.0, -INF], [INF, INF]), ([0.0, 0.0], [INF, 1.0])]
)
def test_every_mixture_of_two(low, high):
    support = TruncatedNormal(torch.zeros(2), 1.0, torch.tensor(low), torch.tensor(high)).support
    x = torch.tensor([0.3, -0.4])
    y = biject_to(support)(x)
    assert support.check(y).all()
    torch.testing.assert_close(biject_to(support).inv(y), x)
