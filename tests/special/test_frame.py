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
    by_erf = (f.alpha < 0) & (f.width > frame._WIDE)
    sums, exact = frame.integrate(f), frame.integrate(f._replace(precision=torch.float64))
    for name in ("mass", "mean", "var", "third", "var_square"):
        # In units of the width of the density, as sums of powers of the distance are.
        power = {"mean": 0.5, "third": 1.5, "var_square": 2.0}.get(name, 0.0)
        unit = exact.var**power if power else getattr(exact, name)
        expected = torch.where(by_erf, getattr(exact, name), getattr(sums, name))
        assert ((getattr(found, name) - expected).abs() / unit).max() < 1e-12, name


def test_a_loc_inside_needs_no_sums(monkeypatch):
    def refuse(*_):
        raise AssertionError("sums over nodes")

    monkeypatch.setattr(frame, "integrate", refuse)
    parameters = (torch.tensor(x) for x in ([-9.0, -3.0], [2.0, 1.0], -20.0, 0.0))
    assert torch.isfinite(special.kl_to_uniform(*parameters)).all()
