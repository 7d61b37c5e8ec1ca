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
    """The normal distribution N(loc, alpha loc^2), parameterized by `loc` and log(alpha loc^2).

    It is the posterior of a weight in SparseVD. This is the additive noise reparameterization
    (arXiv 1701.05369, section 4.1). Its gradients have less variance than those with respect to loc
    and alpha.

    Args:
        loc: the mean. Where it is 0, alpha is infinite.
        log_variance: the log of the variance. Both parameters broadcast.
        local: whether samples equal the mean, because the noise is drawn in the outputs of the
            layer (local reparameterization, arXiv 1506.02557).
        validate_args: whether to check arguments and values; by default the global setting of Pyro.

    Raises:
        ValueError: the shapes do not broadcast; or, with validation, a parameter is not finite.
    """

    has_rsample = True
    arg_constraints = {  # noqa: RUF012 (the distributions of torch do the same)
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
        """Return a new instance with the given batch shape."""
        check_expand(self, batch_shape)
        new = self._get_checked_instance(AdditiveNormal, _instance)
        new.loc, new.log_variance = (x.expand(batch_shape) for x in (self.loc, self.log_variance))
        new.local = self.local
        TorchDistribution.__init__(new, torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def scale(self) -> Tensor:  # type: ignore[override]  # in torch an attribute that can be set
        """The standard deviation."""
        return (0.5 * self.log_variance).exp()

    @property
    def variance(self) -> Tensor:
        return self.log_variance.exp()

    @property
    def log_alpha(self) -> Tensor:
        """The log of alpha, the variance divided by the squared mean."""
        return self.log_variance - 2 * self.loc.abs().log()

    @property
    def snr(self) -> Tensor:
        """The signal-to-noise ratio `|loc| / scale`, which equals alpha^-1/2."""
        return self.loc.abs() / self.scale

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Reparameterized samples of shape `sample_shape + batch_shape`."""
        if self.local:
            return self.loc.expand(self._extended_shape(torch.Size(sample_shape)))
        return super().rsample(torch.Size(sample_shape))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Samples as of `rsample`, without a gradient."""
        return self.rsample(sample_shape).detach()

    def _validate_sample(self, value: Tensor) -> None:
        require_in_support(self, value, lambda x: x == x)
