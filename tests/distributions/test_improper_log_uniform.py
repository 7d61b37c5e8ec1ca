"""The improper prior of sparse variational dropout."""

import math

import pytest
import torch

from pyro_sbp.distributions import ImproperLogUniform

LOC = torch.tensor([0.5, -1.0, 2.0])


def test_the_prior_is_improper():
    prior = ImproperLogUniform().expand([3])
    torch.testing.assert_close(prior.log_prob(LOC), -LOC.abs().log())
    with pytest.raises(NotImplementedError, match="its density has no integral"):
        prior.sample()
    assert torch.equal(ImproperLogUniform([3], start=LOC).sample((2,)), LOC.expand(2, 3))
    with pytest.raises(ValueError, match="does not expand"):
        prior.expand([2])
    with pytest.raises(ValueError, match="within the support"):
        ImproperLogUniform(validate_args=True).log_prob(torch.tensor(math.nan))
