"""The log-normal distribution truncated to an interval: the posterior of the noise in SBP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import ExpTransform

from pyro_sbp import special
from pyro_sbp.distributions import fast_sampling
from pyro_sbp.distributions.checks import (
    broadcast_parameters,
    check_expand,
    check_normal,
    validates,
)
from pyro_sbp.distributions.exp_of_bounded import ExpOfBounded
from pyro_sbp.distributions.log_bounds import check_log_bounds, clamp_theta
from pyro_sbp.distributions.together import Part, Whole
from pyro_sbp.distributions.truncated_normal import TruncatedNormal

__all__ = ["TruncatedLogNormal"]


class TruncatedLogNormal(ExpOfBounded):
    """The distribution of theta = exp(x), where x has a `TruncatedNormal` distribution.

    It is the posterior of the noise (arXiv 1705.07283). The KL divergence to a
    `TruncatedLogUniform` has a closed form, which `TraceMeanField_ELBO` uses. All four parameters
    broadcast.

    Args:
        loc: the mean of log theta before truncation. It may lie outside the bounds.
        scale: the standard deviation of log theta before truncation, positive.
        log_low: the lower bound of log theta. The dtype must be able to represent its exponential:
            the bound must be in [-87.3, 88.7] in float32, and in [-350, 350] in float64.
        log_high: the upper bound of log theta, above `log_low`, in the same range.
        validate_args: whether to check arguments and values; by default the global setting of Pyro.

    Raises:
        ValueError: the shapes do not broadcast; or, with validation, `loc` or a bound is out of
            range, `scale` is not positive, or `log_low` is not below `log_high`.
    """

    arg_constraints = {  # noqa: RUF012 (the distributions of torch do the same)
        "loc": constraints.real,
        "scale": constraints.positive,
        "log_low": constraints.dependent(is_discrete=False, event_dim=0),
        "log_high": constraints.dependent(is_discrete=False, event_dim=0),
    }
    base_dist: TruncatedNormal
    _part: Part | None = None

    def __init__(
        self,
        loc: Tensor | float,
        scale: Tensor | float,
        log_low: Tensor | float = -20.0,
        log_high: Tensor | float = 0.0,
        validate_args: bool | None = None,
    ) -> None:
        owner = type(self).__name__
        loc, scale, low, high = broadcast_parameters(
            owner, loc=loc, scale=scale, log_low=log_low, log_high=log_high
        )
        base = TruncatedNormal(loc, scale, low, high, validate_args=False)
        super().__init__(base, ExpTransform(), validate_args=False)
        self._validate_args = validates(validate_args)
        if self._validate_args:
            check_normal(owner, loc, scale)
            check_log_bounds(owner, low, high)

    def expand(
        self, batch_shape: Sequence[int], _instance: TruncatedLogNormal | None = None
    ) -> TruncatedLogNormal:
        """Return a new instance with the given batch shape, see `TruncatedNormal.expand`."""
        check_expand(self, batch_shape)
        new = self._get_checked_instance(TruncatedLogNormal, _instance)
        new._part = self._part
        return super().expand(batch_shape, _instance=new)

    def split(self, sizes: Sequence[int]) -> list[TruncatedLogNormal]:
        """Split into distributions of batch shape ``[size]``, see `TruncatedNormal.split`."""
        whole = Whole(sizes, self.base_dist._compute, self.rsample)
        parts = []
        for index, base in enumerate(self.base_dist.split(sizes)):
            part = TruncatedLogNormal.__new__(TruncatedLogNormal)
            ExpOfBounded.__init__(part, base, ExpTransform(), validate_args=False)
            part._validate_args = self._validate_args
            part._part = Part(whole, index)
            parts.append(part)
        return parts

    @property
    def loc(self) -> Tensor:
        return self.base_dist.loc

    @property
    def scale(self) -> Tensor:
        return self.base_dist.scale

    @property
    def mean(self) -> Tensor:
        return self.base_dist._statistic(special.exp_mean)

    @property
    def variance(self) -> Tensor:
        return self.base_dist._statistic(special.exp_variance)

    @property
    def stddev(self) -> Tensor:
        # Computed from the SNR, because the variance may underflow in float32.
        base = self.base_dist
        stddev = base._compute(special.exp_mean) / base._compute(special.exp_snr)
        return stddev.to(self._dtype).expand(self.batch_shape)

    @property
    def snr(self) -> Tensor:
        """The signal-to-noise ratio of theta, mean / standard deviation."""
        return self.base_dist._statistic(special.exp_snr)

    @property
    def mode(self) -> Tensor:
        return self.base_dist._statistic(_mode)

    def entropy(self) -> Tensor:
        """The differential entropy of theta in nats, of the batch shape."""
        entropy = self.base_dist._compute(special.entropy) + self.base_dist._compute(special.mean)
        return entropy.to(self._dtype).expand(self.batch_shape)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Reparameterized samples of theta, of shape `sample_shape + batch_shape`."""
        shape = self._extended_shape(torch.Size(sample_shape))
        if self._part is not None and self._part.draws(shape):
            return self._part.draw()
        # exp() before rounding: with log theta in float32, theta would have an error of 1e-6.
        if self._dtype == torch.float32:
            u = fast_sampling.uniform(shape, self.log_low.device)
            return fast_sampling.exp_quantile(u, *self.base_dist._parameters)
        theta = self.base_dist._rsample64(sample_shape).exp()
        return clamp_theta(theta, self.log_low, self.log_high)

    def _log_density(self, x: Tensor) -> Tensor:
        return self.base_dist._at(x, special.log_density)

    def _cdf(self, x: Tensor) -> Tensor:
        return self.base_dist._at(x, special.cdf)

    def _quantile(self, u: Tensor) -> Tensor:
        return self.base_dist._at(u, special.icdf)


def _mode(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    # The Jacobian 1 / theta shifts the mode of log theta down by the variance.
    mode = loc.double() - scale.double().square()
    return torch.minimum(torch.maximum(mode, low), high).exp()
