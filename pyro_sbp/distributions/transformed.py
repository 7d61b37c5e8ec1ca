"""The transformed distribution of Pyro, with a type: Pyro creates the class at run time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from pyro.distributions.torch_distribution import TorchDistributionMixin

    class TransformedDistribution(
        torch.distributions.TransformedDistribution, TorchDistributionMixin
    ):
        """The class as Pyro creates it."""

        has_rsample: bool

else:
    from pyro.distributions.torch import TransformedDistribution

__all__ = ["TransformedDistribution"]
