"""The log-uniform distribution cut to an interval: the noise prior of structured pruning."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pyro.distributions.torch import Uniform
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import ExpTransform

from pyro_sbp.distributions.checks import (
    broadcast_parameters,
    check_expand,
    require,
    require_in_support,
    shown,
    validates,
)
from pyro_sbp.distributions.log_bounds import (
    check_log_bounds,
    clamp_theta,
    exp_bound,
    is_within,
    log_within,
)
from pyro_sbp.distributions.transformed import TransformedDistribution

__all__ = ["TruncatedLogUniform"]


class TruncatedLogUniform(TransformedDistribution):
    """theta with log theta uniform on [log_low, log_high], as arXiv:1705.07283.

    Args:
        log_low: lower bound of log theta; both broadcast. The dtype must be able to represent its
            exponential: within [-87.3, 88.7] in float32, within 350 of zero in float64.
        log_high: upper bound of log theta, above `log_low`, in the same range.
        validate_args: check arguments and values; Pyro's global setting of now if not given.

    Raises:
        ValueError: shapes do not broadcast; under validation, a bound out of range, `log_low`
            not below `log_high`.
    """

    arg_constraints = {  # noqa: RUF012 (as torch's own distributions have it)
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

    def __repr__(self) -> str:
        return shown(self)

    def expand(
        self, batch_shape: Sequence[int], _instance: TruncatedLogUniform | None = None
    ) -> TruncatedLogUniform:
        """A new instance of the batch shape."""
        check_expand(self, batch_shape)
        new = self._get_checked_instance(TruncatedLogUniform, _instance)
        return super().expand(batch_shape, _instance=new)

    @property
    def log_low(self) -> Tensor:
        return self.base_dist.low

    @property
    def log_high(self) -> Tensor:
        return self.base_dist.high

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        return constraints.interval(exp_bound(self.log_low), exp_bound(self.log_high))

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
        """Signal-to-noise ratio, mean over standard deviation; 1/3 on [-20, 0]."""
        half = 0.5 * self._width
        return (torch.sinh(half) / half / _variance_of_exp(2 * half).sqrt()).to(self._dtype)

    @property
    def mode(self) -> Tensor:
        return exp_bound(self.log_low)

    def entropy(self) -> Tensor:
        """Differential entropy of theta in nats, of the batch shape."""
        middle = 0.5 * (self.log_low.double() + self.log_high.double())
        return (self._width.log() + middle).to(self._dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of theta in nats at `value`, which broadcasts against the batch shape.

        Raises:
            ValueError: a value outside of the support, under validation; minus infinity without.
        """
        if self._validate_args:
            self._validate_sample(value)
        inside, x = log_within(value, self.log_low, self.log_high)
        return torch.where(inside, -x - self._width.log(), -torch.inf).to(self._dtype)

    def cdf(self, value: Tensor) -> Tensor:
        """Probability of not more than `value`, which broadcasts against the batch shape."""
        if self._validate_args:
            self._validate_sample(value)
        inside, x = log_within(value, self.log_low, self.log_high)
        above = (value >= exp_bound(self.log_high)).to(torch.float64)
        return torch.where(inside, (x - self.log_low) / self._width, above).to(self._dtype)

    def icdf(self, value: Tensor) -> Tensor:
        """Quantile at the probability `value`, which broadcasts against the batch shape.

        Raises:
            ValueError: a probability outside of [0, 1], under validation.
        """
        if self._validate_args:
            valid = (value >= 0) & (value <= 1)
            require(type(self).__name__, "a probability", value, valid, "within [0, 1]")
        return self._quantile(value.double())

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Samples of theta, of shape `sample_shape + batch_shape`, within the support."""
        shape = self._extended_shape(torch.Size(sample_shape))
        u = torch.rand(shape, dtype=torch.float64, device=self.log_low.device)
        return self._quantile(u)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """`rsample` without a gradient."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def _quantile(self, u: Tensor) -> Tensor:
        theta = torch.minimum(self.log_low + u * self._width, self.log_high.double()).exp()
        return clamp_theta(theta, self.log_low, self.log_high)

    @property
    def _width(self) -> Tensor:
        return self.log_high.double() - self.log_low.double()

    @property
    def _dtype(self) -> torch.dtype:
        return self.log_low.dtype

    def _validate_sample(self, value: Tensor) -> None:
        require_in_support(self, value, lambda x: is_within(x, self.log_low, self.log_high))


def _variance_of_exp(width: Tensor) -> Tensor:
    """Variance of exp(x) for x uniform on an interval of that width around zero."""
    # sinh(w) / w - (sinh(w / 2) / (w / 2))^2, in which both terms are one for a narrow interval.
    half = 0.5 * width
    wide = torch.sinh(width) / width - (torch.sinh(half) / half).square()
    square = width.clamp_max(4).square()
    series = torch.zeros_like(square)  # sum over k >= 1 of 2 k w^2k / (2 k + 2)!
    for k in range(14, 0, -1):
        series = (series + 2 * k / math.factorial(2 * k + 2)) * square
    return torch.where(width < 4, series, wide)
