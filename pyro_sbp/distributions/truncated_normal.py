"""The normal distribution truncated to an interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_sbp import special
from pyro_sbp.distributions import fast_sampling
from pyro_sbp.distributions.checks import (
    broadcast_parameters,
    check_bounds,
    check_expand,
    check_normal,
    require_in_support,
    require_probability,
    shown,
    validates,
)
from pyro_sbp.distributions.open_interval import OpenInterval
from pyro_sbp.distributions.together import Part, Whole

__all__ = ["TruncatedNormal"]


class TruncatedNormal(TorchDistribution):
    """Normal(loc, scale) truncated to [low, high]. Each bound may be infinite.

    It is accurate in the far tails. `pyro_sbp.special` gives the range, the errors and the
    references. Values are computed in float64 and returned in the dtype of the parameters; samples
    for float32 parameters are computed to the accuracy of float32 (`fast_sampling`). Samples have
    implicit reparameterization gradients (arXiv 1805.08498) with respect to all four parameters,
    which broadcast.

    Args:
        loc: the mean of the normal distribution before truncation. It may lie outside the bounds.
        scale: the standard deviation before truncation, positive.
        low: the lower bound.
        high: the upper bound, above `low`.
        validate_args: whether to check arguments and values; by default the global setting of Pyro.

    Raises:
        ValueError: the shapes do not broadcast; or, with validation, `loc` or `scale` is not
            finite, `scale` is not positive, or `low` is not below `high`.
    """

    has_rsample = True
    _part: Part | None = None
    arg_constraints = {  # noqa: RUF012 (the distributions of torch do the same)
        "loc": constraints.real,
        "scale": constraints.positive,
        "low": constraints.dependent(is_discrete=False, event_dim=0),
        "high": constraints.dependent(is_discrete=False, event_dim=0),
    }

    def __init__(
        self,
        loc: Tensor | float,
        scale: Tensor | float,
        low: Tensor | float,
        high: Tensor | float,
        validate_args: bool | None = None,
    ) -> None:
        owner = type(self).__name__
        loc, scale, low, high = broadcast_parameters(
            owner, loc=loc, scale=scale, low=low, high=high
        )
        self._parameters = loc, scale, low, high
        super().__init__(loc.shape, validate_args=False)
        self._validate_args = validates(validate_args)
        if self._validate_args:
            check_normal(owner, loc, scale)
            check_bounds(owner, low=low, high=high)

    def __repr__(self) -> str:
        return shown(self)

    def expand(
        self, batch_shape: Sequence[int], _instance: TruncatedNormal | None = None
    ) -> TruncatedNormal:
        """Return a new instance with the given batch shape.

        The parameters are not expanded. Statistics that depend only on them are computed once and
        then broadcast.
        """
        new = self._get_checked_instance(TruncatedNormal, _instance)
        batch_shape = torch.Size(batch_shape)
        check_expand(self, batch_shape)
        new._parameters, new._part = self._parameters, self._part
        super(TruncatedNormal, new).__init__(batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def split(self, sizes: Sequence[int]) -> list[TruncatedNormal]:
        """Split a distribution of batch shape ``[sum(sizes)]`` into parts of shape ``[size]``.

        The parts share their computations: a sample, a KL divergence or a statistic of one part is
        computed for all parts together. The results are parts of one graph, so use a single
        backward pass for all parts.
        """
        whole = Whole(sizes, self._compute, self.rsample)
        parts = []
        split = zip(*(x.split(whole.sizes) for x in self._parameters), strict=True)
        for index, (loc, scale, low, high) in enumerate(split):
            part = TruncatedNormal(loc, scale, low, high, validate_args=False)
            part._validate_args = self._validate_args
            part._part = Part(whole, index)
            parts.append(part)
        return parts

    @property
    def loc(self) -> Tensor:
        return self._parameters[0].expand(self.batch_shape)

    @property
    def scale(self) -> Tensor:
        return self._parameters[1].expand(self.batch_shape)

    @property
    def low(self) -> Tensor:
        return self._parameters[2].expand(self.batch_shape)

    @property
    def high(self) -> Tensor:
        return self._parameters[3].expand(self.batch_shape)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        # For infinite bounds, torch's interval constraint has no transform from the real numbers.
        has_low, has_high = (x.isfinite() for x in self._parameters[2:])
        every = torch._is_all_true  # works under vmap
        if every(has_low & has_high):
            return constraints.interval(self.low, self.high)
        if every(~(has_low | has_high)):
            return constraints.real
        if every(~has_low & has_high):
            return constraints.less_than(self.high)  # torch has no constraint with <=
        if every(has_low & ~has_high):
            return constraints.greater_than_eq(self.low)
        return OpenInterval(self.low, self.high)

    @property
    def _dtype(self) -> torch.dtype:
        return self._parameters[0].dtype

    def _compute(self, function: Callable[..., Tensor]) -> Tensor:
        """``function(loc, scale, low, high)`` in float64, of the shape of the parameters."""
        if self._part is not None:
            return self._part.statistic(function)
        return function(*self._parameters)

    def _statistic(self, function: Callable[..., Tensor]) -> Tensor:
        """``function(loc, scale, low, high)`` in the parameters' dtype, of the batch shape."""
        value = self._compute(function)
        return value.to(self._dtype).expand(self.batch_shape)

    @property
    def mean(self) -> Tensor:
        return self._statistic(special.mean)

    @property
    def variance(self) -> Tensor:
        return self._statistic(special.variance)

    @property
    def stddev(self) -> Tensor:
        return self._compute(special.variance).sqrt().to(self._dtype).expand(self.batch_shape)

    @property
    def snr(self) -> Tensor:
        """The signal-to-noise ratio, mean / standard deviation, with the sign of the mean."""
        snr = self._compute(special.mean) / self._compute(special.variance).sqrt()
        return snr.to(self._dtype).expand(self.batch_shape)

    @property
    def mode(self) -> Tensor:
        loc, _, low, high = self._parameters
        return torch.minimum(torch.maximum(loc, low), high).expand(self.batch_shape)

    def entropy(self) -> Tensor:
        """The differential entropy in nats, of the batch shape."""
        return self._statistic(special.entropy)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density in nats at `value`, which broadcasts against the batch shape.

        Outside the support it is minus infinity.

        Raises:
            ValueError: a value is outside the support, with validation.
        """
        if self._validate_args:
            self._validate_sample(value)
        if self._dtype != torch.float32:
            return self._at(value, special.log_density).to(self._dtype)
        return self._at(value, _log_density_32)

    def cdf(self, value: Tensor) -> Tensor:
        """The cumulative probability at `value`, which broadcasts against the batch shape.

        Raises:
            ValueError: a value is outside the support, with validation.
        """
        if self._validate_args:
            self._validate_sample(value)
        return self._at(value, special.cdf).to(self._dtype)

    def icdf(self, value: Tensor) -> Tensor:
        """The quantile at the probability `value`, which broadcasts against the batch shape.

        Raises:
            ValueError: a probability is outside [0, 1], with validation.
        """
        if self._validate_args:
            require_probability(type(self).__name__, value)
        return self._at(value, special.icdf).to(self._dtype)

    def _at(self, value: Tensor, function: Callable[..., Tensor]) -> Tensor:
        """``function(value, loc, scale, low, high)`` in float64."""
        shape = torch.broadcast_shapes(value.shape, self.batch_shape)
        return function(value, *self._parameters).expand(shape)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Reparameterized samples of shape `sample_shape + batch_shape`, within the bounds."""
        shape = self._extended_shape(torch.Size(sample_shape))
        if self._part is not None and self._part.draws(shape):
            return self._part.draw()
        if self._dtype != torch.float32:
            return self._rsample64(sample_shape).to(self._dtype)
        u = fast_sampling.uniform(shape, self._parameters[0].device)
        return fast_sampling.quantile(u, *self._parameters, dtype=torch.float32)

    def _rsample64(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Samples in float64, before they are rounded to the dtype of the parameters."""
        shape = self._extended_shape(torch.Size(sample_shape))
        device = self._parameters[0].device
        if self._dtype != torch.float64:
            return fast_sampling.quantile(fast_sampling.uniform(shape, device), *self._parameters)
        u = torch.rand(shape, dtype=torch.float64, device=device)
        # rand() may be 0, which would give an infinite sample where the bound is infinite.
        return special.icdf(u.clamp_min(2.0**-54), *self._parameters)

    def _validate_sample(self, value: Tensor) -> None:
        _, _, low, high = self._parameters
        require_in_support(self, value, lambda x: (x >= low) & (x <= high))


def _log_density_32(value: Tensor, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return special.log_density(value, loc, scale, low, high, dtype=torch.float32)
