"""Quadrature against mpmath."""

import math

import pytest
import torch
from mpmath import mp, mpf

from pyro_sbp import special
from pyro_sbp.experiments.truncated_normal_truth import Truth
from pyro_sbp.special import frame


@pytest.mark.parametrize("n", [5, 12, 36, 64])
def test_nodes_and_weights_are_right_to_the_last_digit(n):
    # A weight is 2 / ((1 - x^2) P'(x)^2) at a root x of the Legendre polynomial P of order n.
    nodes, weights = frame._gauss_legendre(n)
    with mp.workdps(40):
        for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
            root = mp.findroot(lambda x: mp.legendre(n, x), mpf(node), tol=1e-60, verify=False)
            assert abs(root - node) < 2e-16
            slope = n * (root * mp.legendre(n, root) - mp.legendre(n - 1, root)) / (root**2 - 1)
            assert abs(2 / ((1 - root**2) * slope**2) - weight) < 4e-16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["kl_to_uniform", "exp_snr"])
def test_blocks_of_elements_do_not_change_the_values(name, dtype):
    torch.manual_seed(0)
    shape = (3, frame._BLOCK // 2 + 1)  # one block and a part of the next
    loc, scale = torch.rand(shape, dtype=dtype) * 25 - 22, torch.rand(shape, dtype=dtype) * 3 + 0.1
    bounds = torch.tensor(-20.0), torch.tensor(0.0)
    together = getattr(special, name)(loc, scale, *bounds)
    apart = [getattr(special, name)(*row, *bounds) for row in zip(loc, scale, strict=True)]
    torch.testing.assert_close(together, torch.stack(apart), rtol=1e-9, atol=0)


@pytest.mark.parametrize("loc", [-7.0, -0.9, 0.0, 0.25, 5.0])
@pytest.mark.parametrize("scale", [1.5, 4.0, 16.0, 128.0, 1024.0])
def test_kl_near_the_uniform_in_float32(loc, scale):
    # From 1e-2 down to 1e-14: sums on both sides of 1e-6, where the series takes over.
    parameters = (torch.tensor(x, dtype=torch.float32) for x in (loc, scale, -1.0, 1.0))
    value = special.kl_to_uniform(*parameters).item()
    exact = Truth(*(torch.tensor(x, dtype=torch.float32).item() for x in (loc, scale, -1.0, 1.0)))
    assert abs(value / exact.kl - 1) < 1e-8


@pytest.mark.parametrize("bounds", [(-20.0, 0.0), (-1.0, 1.0), (0.0, math.inf)], ids=str)
def test_moments_by_region_are_those_of_sums(bounds, monkeypatch):
    monkeypatch.setattr(frame, "_FEW", 0)
    torch.manual_seed(0)
    loc, scale = torch.rand(500) * 12 - 9, torch.exp(torch.rand(500) * 8 - 4)
    f = frame.frame(loc, scale, *(torch.tensor(bound) for bound in bounds))
    found = frame.moments(f)
    assert isinstance(found, frame.ByRegion)
    by_erf = (f.alpha < frame.OUTSIDE) & (f.width > frame.WIDE)
    assert (by_erf & (f.alpha > 0)).any()
    # With loc outside, erf is close to 1, and the mass of the normal distribution cancels.
    bound = torch.where(by_erf & (f.alpha > 0), 2e-9, 1e-12)
    sums, exact = frame.integrate(f), frame.integrate(f._replace(precision=torch.float64))
    for name in ("mass", "mean", "var", "third", "var_square"):
        # In units of the width of the density, as sums of powers of the distance are.
        power = {"mean": 0.5, "third": 1.5, "var_square": 2.0}.get(name, 0.0)
        unit = exact.var**power if power else getattr(exact, name)
        expected = torch.where(by_erf, getattr(exact, name), getattr(sums, name))
        assert ((getattr(found, name) - expected).abs() / unit < bound).all(), name


def test_a_loc_outside_by_up_to_three_scales_in_float32():
    # The normal distribution has a mass of 0.5 to 0.0013 within the bounds.
    for alpha in (0.0, 0.01, 0.5, 1.0, 2.0, 2.9, 2.999):
        for scale in (0.01, 1.0, 15.0):
            numbers = (torch.tensor(x) for x in (alpha * scale, scale, -20.0, 0.0))
            exact = Truth(*(x.item() for x in numbers))
            loc, scale_ = (torch.tensor([float(x)]) for x in (exact.loc, exact.scale))
            loc, scale_ = loc.requires_grad_(), scale_.requires_grad_()
            bounds = torch.tensor(-20.0), torch.tensor(0.0)
            kl = special.kl_to_uniform(loc, scale_, *bounds)
            assert kl.item() == pytest.approx(float(exact.kl), rel=1e-9)
            gradients = torch.autograd.grad(kl, (loc, scale_))
            floor = 1e-3 / scale
            assert gradients[0].item() == pytest.approx(
                float(exact.kl_d_loc), rel=1e-6, abs=floor * 1e-6
            )
            d_log_scale = gradients[1].item() * scale
            assert d_log_scale == pytest.approx(float(exact.kl_d_log_scale), rel=1e-6, abs=1e-6)
            found = special.log_normalizer(loc, scale_, *bounds).item()
            assert found == pytest.approx(float(exact.log_normalizer), rel=1e-10, abs=1e-10)
            assert special.variance(loc, scale_, *bounds).item() == pytest.approx(
                float(exact.variance), rel=1e-9
            )


def test_a_loc_inside_needs_no_sums(monkeypatch):
    def refuse(*_):
        raise AssertionError("sums over nodes")

    monkeypatch.setattr(frame, "integrate", refuse)
    parameters = (torch.tensor(x) for x in ([-9.0, -3.0], [2.0, 1.0], -20.0, 0.0))
    assert torch.isfinite(special.kl_to_uniform(*parameters)).all()
