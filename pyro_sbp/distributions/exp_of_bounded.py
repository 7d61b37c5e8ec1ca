"""Distributions of theta = exp(x), where x has a distribution on a finite interval."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.distributions.torch import Uniform
from torch import Tensor
from torch.distributions import constraints

from pyro_sbp.distributions.checks import require_in_support, require_probability, shown
from pyro_sbp.distributions.log_bounds import clamp_theta, exp_bound, is_within, log_within
from pyro_sbp.distributions.transformed import TransformedDistribution
from pyro_sbp.distributions.truncated_normal import TruncatedNormal

__all__ = ["ExpOfBounded"]


class ExpOfBounded(TransformedDistribution):
    """The distribution of theta = exp(x), where x is within [log_low, log_high].

    `base_dist` is the distribution of x. A subclass defines `rsample`, and the functions of x in
    float64: `_log_density`, `_cdf` and `_quantile`.
    """

    base_dist: Uniform | TruncatedNormal

    def __repr__(self) -> str:
        return shown(self)

    @property
    def log_low(self) -> Tensor:
        return self.base_dist.low

    @property
    def log_high(self) -> Tensor:
        return self.base_dist.high

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        return constraints.interval(exp_bound(self.log_low), exp_bound(self.log_high))

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density of theta in nats at `value`, which broadcasts against the batch shape.

        Outside the support it is minus infinity.

        Raises:
            ValueError: a value is outside the support, with validation.
        """
        inside, x = self._log(value)
        return torch.where(inside, self._log_density(x) - x, -torch.inf).to(self._dtype)

    def cdf(self, value: Tensor) -> Tensor:
        """The cumulative probability at `value`, which broadcasts against the batch shape.

        Raises:
            ValueError: a value is outside the support, with validation.
        """
        inside, x = self._log(value)
        above = (value >= exp_bound(self.log_high)).to(torch.float64)
        return torch.where(inside, self._cdf(x), above).to(self._dtype)

    def icdf(self, value: Tensor) -> Tensor:
        """The quantile at the probability `value`, which broadcasts against the batch shape.

        Raises:
            ValueError: a probability is outside [0, 1], with validation.
        """
        if self._validate_args:
            require_probability(type(self).__name__, value)
        return clamp_theta(self._quantile(value).exp(), self.log_low, self.log_high)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Reparameterized samples of theta, of shape `sample_shape + batch_shape`."""
        raise NotImplementedError

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Samples as of `rsample`, without a gradient."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    @property
    def _dtype(self) -> torch.dtype:
        return self.log_low.dtype

    def _log_density(self, x: Tensor) -> Tensor:
        """The log density of x."""
        raise NotImplementedError

    def _cdf(self, x: Tensor) -> Tensor:
        """The cumulative probability of x."""
        raise NotImplementedError

    def _quantile(self, u: Tensor) -> Tensor:
        """The value of x at the probability u, which has the dtype that the user gave."""
        raise NotImplementedError

    def _log(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Whether theta is within its bounds, and x, after the validation of theta."""
        if self._validate_args:
            self._validate_sample(value)
        return log_within(value, self.log_low, self.log_high)

    def _validate_sample(self, value: Tensor) -> None:
        require_in_support(self, value, lambda x: is_within(x, self.log_low, self.log_high))
