"""The float32 sampler against the exact inverse, per draw and summed over a batch."""

import pytest
import torch

from pyro_sbp import special
from pyro_sbp.distributions import TruncatedLogNormal, fast_sampling
from pyro_sbp.experiments.distributions_table import SETS, points


@pytest.mark.parametrize("bounds, locs, share", SETS, ids=str)
def test_agrees_with_the_exact_inverse(bounds, locs, share):
    # special.icdf is proven against mpmath to 1e-11, its gradients to 1e-9, in test_special.
    p = points(1000, bounds, locs, seed=2).to(torch.float32)
    torch.manual_seed(0)
    u = fast_sampling.uniform(torch.Size([128, len(p.loc)]), torch.device("cpu"))
    u[0], u[1] = 2.0**-25, 1 - 2.0**-25
    results = []
    for function in (fast_sampling.quantile, special.icdf):
        # A copy of the parameters for each draw, so that gradients are those of a single draw.
        loc, scale = (x.double().expand(u.shape).clone().requires_grad_() for x in p[:2])
        x = function(u, loc, scale, p.low, p.high)
        results.append((x.detach(), *torch.autograd.grad(x.sum(), (loc, scale))))
    (x, *fast), (true_x, *exact) = results
    assert ((x - true_x).abs() <= 2e-6 * true_x.abs().clamp_min(1)).all()
    assert ((x >= p.low) & (x <= p.high)).all()
    for ours, true in zip(fast, exact, strict=True):
        size = true.abs().mean(0)
        assert ((ours - true).abs() <= 1e-5 * torch.maximum(true.abs(), size)).all()
        assert ((ours - true).sum(0).abs() <= 1e-6 * true.abs().sum(0)).all()


def test_uniforms_keep_away_from_the_ends():
    u = fast_sampling.uniform(torch.Size([2_000_000]), torch.device("cpu"))
    assert u.dtype == torch.float64
    assert u.min() >= 2.0**-25 and u.max() <= 1 - 2.0**-25
    assert u.mean().item() == pytest.approx(0.5, abs=1e-3)  # three standard errors are 6e-4


def test_gradients_of_samples_average_to_the_gradient_of_the_mean():
    loc = torch.tensor([-3.0, 0.5, -22.0, -9.0], requires_grad=True)
    scale = torch.tensor([0.5, 0.2, 1.0, 50.0], requires_grad=True)
    d = TruncatedLogNormal(loc, scale)
    torch.manual_seed(0)
    x = d.expand([200_000, 4]).rsample()
    sampled = torch.autograd.grad(x.sum(), (loc, scale))
    exact = torch.autograd.grad(d.mean.sum(), (loc, scale))
    for a, b in zip(sampled, exact, strict=True):
        torch.testing.assert_close(a / 200_000, b, rtol=0.02, atol=1e-12)


def test_seeds_repeat():
    d = TruncatedLogNormal(torch.zeros(3), 0.1)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(d.rsample())
    assert draws[0].equal(draws[1]) and not draws[0].equal(draws[2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_without_a_host_sync():
    p = points(100, *SETS[0][:2]).to(torch.float32)
    u = fast_sampling.uniform(torch.Size([8, len(p.loc)]), torch.device("cpu"))
    expected = fast_sampling.quantile(u, *p[:4])
    arguments = [x.cuda() for x in (u, *p[:4])]
    torch.cuda.set_sync_debug_mode("error")
    try:
        x = fast_sampling.quantile(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(x.cpu(), expected, rtol=1e-6, atol=1e-6)
