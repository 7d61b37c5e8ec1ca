"""The log-normal distribution cut to an interval: the noise posterior of structured pruning."""

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
from pyro_sbp.distributions.together import Part, Whole
from pyro_sbp.distributions.transformed import TransformedDistribution
from pyro_sbp.distributions.truncated_normal import TruncatedNormal

__all__ = ["TruncatedLogNormal"]


class TruncatedLogNormal(TransformedDistribution):
    """theta = exp(x) with x from a `TruncatedNormal`, as arXiv:1705.07283.

    Its KL to a `TruncatedLogUniform` is known in closed form, and `TraceMeanField_ELBO` uses it.

    Args:
        loc: mean of log theta before it is cut, inside or outside of the bounds.
        scale: standard deviation of log theta before it is cut, positive.
        log_low: lower bound of log theta; all four broadcast. The dtype must be able to represent
            its exponential: within [-87.3, 88.7] in float32, within 350 of zero in float64.
        log_high: upper bound of log theta, above `log_low`, in the same range.
        validate_args: check arguments and values; Pyro's global setting of now if not given.

    Raises:
        ValueError: shapes do not broadcast; under validation, `loc` or a bound out of range,
            `scale` not positive, `log_low` not below `log_high`.
    """

    arg_constraints = {  # noqa: RUF012 (as torch's own distributions have it)
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

    def __repr__(self) -> str:
        return shown(self)

    def expand(
        self, batch_shape: Sequence[int], _instance: TruncatedLogNormal | None = None
    ) -> TruncatedLogNormal:
        """A new instance of the batch shape, as `TruncatedNormal.expand`."""
        check_expand(self, batch_shape)
        new = self._get_checked_instance(TruncatedLogNormal, _instance)
        new._part = self._part
        return super().expand(batch_shape, _instance=new)

    def split(self, sizes: Sequence[int]) -> list[TruncatedLogNormal]:
        """Distributions of batch shape ``[size]``, as `TruncatedNormal.split`."""
        whole = Whole(sizes, self.base_dist._compute, self.rsample)
        parts = []
        for index, base in enumerate(self.base_dist.split(sizes)):
            part = TruncatedLogNormal.__new__(TruncatedLogNormal)
            TransformedDistribution.__init__(part, base, ExpTransform(), validate_args=False)
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
        return self.base_dist._statistic(special.exp_mean)

    @property
    def variance(self) -> Tensor:
        return self.base_dist._statistic(special.exp_variance)

    @property
    def stddev(self) -> Tensor:
        # By the SNR, since the variance may be too small for float32.
        base = self.base_dist
        stddev = base._compute(special.exp_mean) / base._compute(special.exp_snr)
        return stddev.to(self._dtype).expand(self.batch_shape)

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio, mean over standard deviation."""
        return self.base_dist._statistic(special.exp_snr)

    @property
    def mode(self) -> Tensor:
        return self.base_dist._statistic(_mode)

    def entropy(self) -> Tensor:
        """Differential entropy of theta in nats, of the batch shape."""
        entropy = self.base_dist._compute(special.entropy) + self.base_dist._compute(special.mean)
        return entropy.to(self._dtype).expand(self.batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of theta in nats at `value`, which broadcasts against the batch shape.

        Raises:
            ValueError: a value outside of the support, under validation; minus infinity without.
        """
        if self._validate_args:
            self._validate_sample(value)
        inside, x = self._log(value)
        log_q = self.base_dist._at(x, special.log_density) - x
        return torch.where(inside, log_q, -torch.inf).to(self._dtype)

    def cdf(self, value: Tensor) -> Tensor:
        """Probability of not more than `value`, which broadcasts against the batch shape."""
        if self._validate_args:
            self._validate_sample(value)
        inside, x = self._log(value)
        above = (value >= exp_bound(self.log_high)).to(torch.float64)
        probability = self.base_dist._at(x, special.cdf)
        return torch.where(inside, probability, above).to(self._dtype)

    def icdf(self, value: Tensor) -> Tensor:
        """Quantile at the probability `value`, which broadcasts against the batch shape.

        Raises:
            ValueError: a probability outside of [0, 1], under validation.
        """
        if self._validate_args:
            valid = (value >= 0) & (value <= 1)
            require(type(self).__name__, "a probability", value, valid, "within [0, 1]")
        theta = self.base_dist._at(value, special.icdf).exp()
        return clamp_theta(theta, self.log_low, self.log_high)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Samples of theta, of shape `sample_shape + batch_shape`, within the support."""
        shape = self._extended_shape(torch.Size(sample_shape))
        if self._part is not None and self._part.draws(shape):
            return self._part.draw()
        # exp() before rounding: log theta in float32 would cost theta 1e-6 of its size.
        if self._dtype == torch.float32:
            u = fast_sampling.uniform(shape, self.log_low.device)
            return fast_sampling.exp_quantile(u, *self.base_dist._parameters)
        theta = self.base_dist._rsample64(sample_shape).exp()
        return clamp_theta(theta, self.log_low, self.log_high)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """`rsample` without a gradient."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    @property
    def _dtype(self) -> torch.dtype:
        return self.base_dist._dtype

    def _log(self, value: Tensor) -> tuple[Tensor, Tensor]:
        return log_within(value, self.log_low, self.log_high)

    def _validate_sample(self, value: Tensor) -> None:
        require_in_support(self, value, lambda x: is_within(x, self.log_low, self.log_high))


def _mode(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    # The Jacobian 1 / theta moves the mode of log theta down by the variance.
    mode = loc.double() - scale.double().square()
    return torch.minimum(torch.maximum(mode, low), high).exp()
