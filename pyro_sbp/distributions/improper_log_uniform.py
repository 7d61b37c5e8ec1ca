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
    """The density 1 / |w| over all numbers, which has no integral (arXiv 1701.05369, equation 10).

    It has no samples. KL divergences to it are known up to a constant, which is chosen so that
    that of a posterior goes to 0 as alpha goes to infinity.

    Args:
        batch_shape: of how many weights.
        exact: whether KL divergences from normals to it are exact; otherwise they are the paper's
            approximation, which is off by up to 0.01 nats and cheaper.
        start: what stands in for a sample where a model is run before its guide, as Pyro's
            `Predictive` does to see its shapes; of the batch shape.
        validate_args: check values; Pyro's global setting of now if not given.
    """

    has_rsample = False
    arg_constraints = {}  # noqa: RUF012 (as torch's own distributions have it)

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
        """A new instance of the batch shape."""
        check_expand(self, batch_shape)
        new = self._get_checked_instance(ImproperLogUniform, _instance)
        new.exact, new.start = self.exact, self.start
        TorchDistribution.__init__(new, torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats at `value`, which broadcasts, up to a constant: -log |value|.

        Raises:
            ValueError: a value is NaN, under validation.
        """
        if self._validate_args:
            require_in_support(self, value, lambda x: x == x)
        shape = torch.broadcast_shapes(value.shape, self.batch_shape)
        return -value.abs().log().expand(shape)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """`start`, of shape `sample_shape + batch_shape`.

        Raises:
            NotImplementedError: there is none.
        """
        if self.start is None:
            raise NotImplementedError(
                "ImproperLogUniform has no samples: its density has no integral. Take those of a "
                "guide, or give start="
            )
        return self.start.detach().expand(self._extended_shape(torch.Size(sample_shape)))
