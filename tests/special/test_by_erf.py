"""The truncated normal by erf, against mpmath."""

import mpmath as mp
import pytest
import torch

from pyro_sbp import special
from pyro_sbp.special.by_erf import ends_by_erf

INF = float("inf")
# loc, scale, low, high: loc inside, near a bound, and outside on either side by up to three scales.
POINTS = [
    (-3.0, 2.0, -20.0, 0.0),
    (-10.0, 15.0, -20.0, 0.0),
    (-0.01, 0.5, -20.0, 0.0),
    (2.75, 1.0, -20.0, 0.0),
    (-21.5, 0.625, -20.0, 0.0),
    (0.5, 3.0, -1.0, INF),
    (1.5, 0.75, -INF, 0.25),
    (0.25, 4.0, -INF, INF),
]


def log_mass(loc, scale, low, high):
    return mp.log(mp.ncdf((high - loc) / scale) - mp.ncdf((low - loc) / scale))


def log_density(x, loc, scale, low, high):
    return mp.log(mp.npdf((x - loc) / scale) / scale) - log_mass(loc, scale, low, high)


def kl(loc, scale, low, high):
    """The entropy of the truncated normal is that of the textbook.

    Its terms cancel, and `mp.diff` sets the number of digits itself, so this adds digits to those.
    """
    with mp.extradps(35):
        alpha, beta = (low - loc) / scale, (high - loc) / scale
        log_z = log_mass(loc, scale, low, high)
        moment = (alpha * mp.npdf(alpha) - beta * mp.npdf(beta)) / mp.exp(log_z)
        entropy = mp.log(mp.sqrt(2 * mp.pi * mp.e) * scale) + log_z + moment / 2
        return mp.log(high - low) - entropy


def parameters(points, dtype=torch.float32):
    loc, scale, low, high = (torch.tensor(x, dtype=dtype) for x in zip(*points, strict=True))
    return loc.requires_grad_(), scale.requires_grad_(), low, high


def close(found, expected):
    expected = torch.tensor([float(x) for x in expected], dtype=torch.float64)
    torch.testing.assert_close(found.double(), expected, rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_density_and_gradients(dtype):
    """In float32 rounded once, and in float64 not at all."""
    p = parameters(POINTS)
    assert ends_by_erf(*p) is not None
    x = [-1.0, -19.0, -0.5, -0.125, -19.75, 6.0, -2.0, -7.0]
    value = torch.tensor(x, requires_grad=True)
    log_q = special.log_density(value, *p, dtype=dtype)
    assert log_q.dtype == dtype
    log_q.sum().backward()
    rows = [(y, *map(mp.mpf, row)) for y, row in zip(x, POINTS, strict=True)]
    close(log_q, [log_density(*row) for row in rows])
    for found, order in ((value, (1, 0, 0)), (p[0], (0, 1, 0)), (p[1], (0, 0, 1))):
        close(
            found.grad,
            [
                mp.diff(lambda *y, row=row: log_density(*y, *row[3:]), row[:3], order)
                for row in rows
            ],
        )


def test_kl_and_gradients():
    p = parameters(POINTS[:5])
    assert ends_by_erf(*p) is not None
    divergence = special.kl_to_uniform(*p)
    divergence.sum().backward()
    rows = [tuple(map(mp.mpf, row)) for row in POINTS[:5]]
    close(divergence, [kl(*row) for row in rows])
    for found, order in ((p[0], (1, 0)), (p[1], (0, 1))):
        close(
            found.grad,
            [mp.diff(lambda *y, row=row: kl(*y, *row[2:]), row[:2], order) for row in rows],
        )


@pytest.mark.parametrize(
    "row", [(4.0, 1.0, -20.0, 0.0), (-23.2, 1.0, -20.0, 0.0), (0.5, 1.5, 0.0, 1.0)]
)
def test_one_element_far_outside_or_nearly_uniform_is_enough_for_the_general_way(row):
    assert ends_by_erf(*parameters([POINTS[0], row])) is None


def test_values_outside_the_bounds_have_no_density():
    p = parameters(POINTS[:3])
    value = torch.tensor([-1.0, 0.5, -20.5])
    log_q = special.log_density(value, *p, dtype=torch.float32)
    assert log_q.isinf().tolist() == [False, True, True]
