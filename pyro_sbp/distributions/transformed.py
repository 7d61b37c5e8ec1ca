"""Pyro's transformed distribution, which Pyro makes at run time so that its type is not seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from pyro.distributions.torch_distribution import TorchDistributionMixin

    class TransformedDistribution(
        torch.distributions.TransformedDistribution, TorchDistributionMixin
    ):
        """The class as Pyro makes it."""

        has_rsample: bool

else:
    from pyro.distributions.torch import TransformedDistribution

__all__ = ["TransformedDistribution"]
