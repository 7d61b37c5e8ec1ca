"""The log-uniform distribution truncated to an interval: the prior of the noise in SBP."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pyro.distributions.torch import Uniform
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import ExpTransform

from pyro_sbp.distributions.checks import broadcast_parameters, check_expand, validates
from pyro_sbp.distributions.exp_of_bounded import ExpOfBounded
from pyro_sbp.distributions.log_bounds import check_log_bounds, clamp_theta, exp_bound

__all__ = ["TruncatedLogUniform"]


class TruncatedLogUniform(ExpOfBounded):
    """The distribution of theta where log theta is uniform on [log_low, log_high].

    It is the prior of the noise (arXiv 1705.07283). Both parameters broadcast.

    Args:
        log_low: the lower bound of log theta. The dtype must be able to represent its exponential:
            the bound must be in [-87.3, 88.7] in float32, and in [-350, 350] in float64.
        log_high: the upper bound of log theta, above `log_low`, in the same range.
        validate_args: whether to check arguments and values; by default the global setting of Pyro.

    Raises:
        ValueError: the shapes do not broadcast; or, with validation, a bound is out of range, or
            `log_low` is not below `log_high`.
    """

    arg_constraints = {  # noqa: RUF012 (the distributions of torch do the same)
        "log_low": constraints.dependent(is_discrete=False, event_dim=0),
        "log_high": constraints.dependent(is_discrete=False, event_dim=0),
    }
    base_dist: Uniform

    def __init__(
        self,
        log_low: Tensor | float = -20.0,
        log_high: Tensor | float = 0.0,
        validate_args: bool | None = None,
    ) -> None:
        owner = type(self).__name__
        low, high = broadcast_parameters(owner, log_low=log_low, log_high=log_high)
        base = Uniform(low, high, validate_args=False)
        super().__init__(base, ExpTransform(), validate_args=False)
        self._validate_args = validates(validate_args)
        if self._validate_args:
            check_log_bounds(owner, low, high)

    def expand(
        self, batch_shape: Sequence[int], _instance: TruncatedLogUniform | None = None
    ) -> TruncatedLogUniform:
        """Return a new instance with the given batch shape."""
        check_expand(self, batch_shape)
        new = self._get_checked_instance(TruncatedLogUniform, _instance)
        return super().expand(batch_shape, _instance=new)

    @property
    def mean(self) -> Tensor:
        width = self._width
        return (self.log_high.double().exp() * -torch.expm1(-width) / width).to(self._dtype)

    @property
    def variance(self) -> Tensor:
        middle = 0.5 * (self.log_low.double() + self.log_high.double())
        return ((2 * middle).exp() * _variance_of_exp(self._width)).to(self._dtype)

    @property
    def stddev(self) -> Tensor:
        middle = 0.5 * (self.log_low.double() + self.log_high.double())
        return (middle.exp() * _variance_of_exp(self._width).sqrt()).to(self._dtype)

    @property
    def snr(self) -> Tensor:
        """The signal-to-noise ratio of theta, mean / standard deviation. It is 1/3 on [-20, 0]."""
        half = 0.5 * self._width
        return (torch.sinh(half) / half / _variance_of_exp(2 * half).sqrt()).to(self._dtype)

    @property
    def mode(self) -> Tensor:
        return exp_bound(self.log_low)

    def entropy(self) -> Tensor:
        """The differential entropy of theta in nats, of the batch shape."""
        middle = 0.5 * (self.log_low.double() + self.log_high.double())
        return (self._width.log() + middle).to(self._dtype)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Reparameterized samples of theta, of shape `sample_shape + batch_shape`."""
        shape = self._extended_shape(torch.Size(sample_shape))
        u = torch.rand(shape, dtype=torch.float64, device=self.log_low.device)
        return clamp_theta(self._quantile(u).exp(), self.log_low, self.log_high)

    def _log_density(self, x: Tensor) -> Tensor:
        return -self._width.log()

    def _cdf(self, x: Tensor) -> Tensor:
        return (x - self.log_low) / self._width

    def _quantile(self, u: Tensor) -> Tensor:
        return torch.minimum(self.log_low + u.double() * self._width, self.log_high.double())

    @property
    def _width(self) -> Tensor:
        return self.log_high.double() - self.log_low.double()


def _variance_of_exp(width: Tensor) -> Tensor:
    """The variance of exp(x), for x uniform on an interval of this width around zero."""
    # sinh(w) / w - (sinh(w / 2) / (w / 2))^2. Both terms tend to 1 for a narrow interval.
    half = 0.5 * width
    wide = torch.sinh(width) / width - (torch.sinh(half) / half).square()
    square = width.clamp_max(4).square()
    series = torch.zeros_like(square)  # sum over k >= 1 of 2 k w^2k / (2 k + 2)!
    for k in range(14, 0, -1):
        series = (series + 2 * k / math.factorial(2 * k + 2)) * square
    return torch.where(width < 4, series, wide)
