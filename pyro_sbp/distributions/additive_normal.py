"""The normal distribution in the additive form of sparse variational dropout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Normal, constraints

from pyro_sbp.distributions.checks import (
    broadcast_parameters,
    check_expand,
    require,
    require_in_support,
    validates,
)

__all__ = ["AdditiveNormal"]


class AdditiveNormal(Normal, TorchDistribution):
    """Normal(loc, alpha loc^2) by `loc` and log(alpha loc^2), the posterior of a weight.

    The additive noise reparameterization (arXiv 1701.05369, section 4.2), whose gradients have less
    variance than those by loc and alpha.

    Args:
        loc: mean, not 0 where alpha is to be finite.
        log_variance: log of the variance; both broadcast.
        local: samples are the mean, as the noise is drawn where the weight is used (local
            reparameterization, arXiv 1506.02557).
        validate_args: check arguments and values; Pyro's global setting of now if not given.

    Raises:
        ValueError: shapes do not broadcast; under validation, a parameter is not finite.
    """

    has_rsample = True
    arg_constraints = {  # noqa: RUF012 (as torch's own distributions have it)
        "loc": constraints.real,
        "log_variance": constraints.real,
    }

    def __init__(
        self,
        loc: Tensor | float,
        log_variance: Tensor | float,
        local: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        owner = type(self).__name__
        self.loc, self.log_variance = broadcast_parameters(
            owner, loc=loc, log_variance=log_variance
        )
        self.local = local
        TorchDistribution.__init__(self, self.loc.shape, validate_args=False)
        self._validate_args = validates(validate_args)
        if self._validate_args:
            for name in ("loc", "log_variance"):
                value = getattr(self, name)
                require(owner, name, value, value.isfinite(), "finite")

    def expand(
        self, batch_shape: Sequence[int], _instance: AdditiveNormal | None = None
    ) -> AdditiveNormal:
        """A new instance of the batch shape."""
        check_expand(self, batch_shape)
        new = self._get_checked_instance(AdditiveNormal, _instance)
        new.loc, new.log_variance = (x.expand(batch_shape) for x in (self.loc, self.log_variance))
        new.local = self.local
        TorchDistribution.__init__(new, torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def scale(self) -> Tensor:  # type: ignore[override]  # torch's may be set, this one follows
        """The standard deviation."""
        return (0.5 * self.log_variance).exp()

    @property
    def variance(self) -> Tensor:
        return self.log_variance.exp()

    @property
    def log_alpha(self) -> Tensor:
        """Log of the variance over the squared mean."""
        return self.log_variance - 2 * self.loc.abs().log()

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio, the absolute mean over the standard deviation: alpha^-1/2."""
        return self.loc.abs() / self.scale

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Samples of shape `sample_shape + batch_shape`, reparameterized."""
        if self.local:
            return self.loc.expand(self._extended_shape(torch.Size(sample_shape)))
        return super().rsample(torch.Size(sample_shape))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """`rsample` without gradient."""
        return self.rsample(sample_shape).detach()

    def _validate_sample(self, value: Tensor) -> None:
        require_in_support(self, value, lambda x: x == x)
