"""Pyro's own test of samples against the density, `pyro.distributions.testing.gof`."""

import pytest
import torch
from pyro.distributions.testing.gof import auto_goodness_of_fit

from pyro_sbp.distributions import (
    AdditiveNormal,
    TruncatedLogNormal,
    TruncatedLogUniform,
    TruncatedNormal,
)

#: Those of Pyro's tests of its distributions.
NUM_SAMPLES, LEAST_PROBABILITY = 50_000, 2e-5


@pytest.mark.parametrize(
    "distribution",
    [
        TruncatedNormal(0.0, 1.0, -1.0, 2.0),
        TruncatedNormal(-3.0, 0.5, -20.0, 0.0),
        TruncatedNormal(2.0, 1.5, -5.0, 0.0),
        TruncatedNormal(-9.0, 30.0, -20.0, 0.0),
        TruncatedNormal(-10.0, 1.0, 0.0, 20.0),
        TruncatedNormal(1.0, 2.0, 0.0, torch.inf),
        TruncatedNormal(1.0, 2.0, -torch.inf, 0.5),
        TruncatedLogNormal(-1.0, 0.5),
        TruncatedLogNormal(0.5, 0.3),
        TruncatedLogNormal(-1.0, 1.0, -2.0, 2.0),
        TruncatedLogUniform(-5.0, 1.0),
        TruncatedLogUniform(-0.2, 0.1),
        AdditiveNormal(0.5, -3.0),
    ],
    ids=str,
)
def test_samples_fit_their_density(distribution):
    torch.manual_seed(0)
    samples = distribution.sample((NUM_SAMPLES,))
    density = distribution.log_prob(samples).exp()
    assert auto_goodness_of_fit(samples, density, dim=1) > LEAST_PROBABILITY
