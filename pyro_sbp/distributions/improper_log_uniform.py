"""The improper log-uniform prior of weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_sbp.distributions.checks import check_expand, require_in_support, validates

__all__ = ["ImproperLogUniform"]


class ImproperLogUniform(TorchDistribution):
    """The improper density 1 / abs(w) of a real number w (arXiv 1701.05369, equation 10).

    It is the prior of a weight in SparseVD. The density has no finite integral, so there are no
    samples. KL divergences to it are defined up to a constant. The constant is chosen so that the
    KL divergence from N(loc, alpha loc^2) tends to 0 as alpha tends to infinity.

    Args:
        batch_shape: the shape of the weights.
        exact: whether KL divergences from normal distributions are exact. Otherwise they are the
            approximation of the paper, which has an error of up to 0.01 nats and is cheaper.
        start: a tensor of the batch shape that `sample` returns. It is needed where a model runs
            before its guide: `Predictive` of Pyro does this to find the shapes of the sites.
        validate_args: whether to check values; by default the global setting of Pyro.
    """

    has_rsample = False
    arg_constraints = {}  # noqa: RUF012 (the distributions of torch do the same)

    def __init__(
        self,
        batch_shape: Sequence[int] = (),
        exact: bool = False,
        start: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.exact, self.start = exact, start
        super().__init__(torch.Size(batch_shape), validate_args=False)
        self._validate_args = validates(validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        return constraints.real

    def expand(
        self, batch_shape: Sequence[int], _instance: ImproperLogUniform | None = None
    ) -> ImproperLogUniform:
        """Return a new instance with the given batch shape."""
        check_expand(self, batch_shape)
        new = self._get_checked_instance(ImproperLogUniform, _instance)
        new.exact, new.start = self.exact, self.start
        TorchDistribution.__init__(new, torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density in nats up to a constant, -log(abs(value)), of the shape of `value`.

        Raises:
            ValueError: a value is NaN, with validation.
        """
        if self._validate_args:
            require_in_support(self, value, lambda x: x == x)
        shape = torch.broadcast_shapes(value.shape, self.batch_shape)
        return -value.abs().log().expand(shape)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Return `start`, expanded to the shape `sample_shape + batch_shape`.

        Raises:
            NotImplementedError: `start` was not given.
        """
        if self.start is None:
            raise NotImplementedError(
                "ImproperLogUniform has no samples: its density has no integral. Sample from a "
                "guide instead, or pass start="
            )
        return self.start.detach().expand(self._extended_shape(torch.Size(sample_shape)))
