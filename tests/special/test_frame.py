"""Quadrature against mpmath."""

import pytest
from mpmath import mp, mpf

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
