"""The mean-field guide of a `SparseModel`, with normal posteriors of the weights."""

from __future__ import annotations

from typing import Any

from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_sbp.distributions import AdditiveNormal
from pyro_sbp.models.site_statistics import SiteStatistics
from pyro_sbp.models.sites import CopiedUnderOwnName, unique_name
from pyro_sbp.models.sparse_model import SparseModel

__all__ = ["AdditiveNormalGuide"]


class AdditiveNormalGuide(CopiedUnderOwnName, SiteStatistics, AutoGuide):
    """Independent normal posteriors of the weights of a `SparseModel` (arXiv 1701.05369).

    The parameters belong to the model: the weights of the network are the means, and
    ``model.noisy`` has the log variances. Every call first raises log variances that are below
    their range.

    Args:
        model: the model.
    """

    def __init__(self, model: SparseModel) -> None:
        super().__init__(model)
        self._pyro_name = unique_name(type(self).__name__)

    def posteriors(self) -> dict[str, AdditiveNormal]:
        """From the name of a layer to the posterior of its weight."""
        return self._posteriors(self.model.noisy.in_range())

    def _posteriors(self, log_variances: dict[str, Tensor]) -> dict[str, AdditiveNormal]:
        local = self.model.noise == "local"
        means = self.model.noisy.means()
        return {n: AdditiveNormal(w, log_variances[n], local) for n, w in means.items()}

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every site from its posterior. With local noise, the samples are the means."""
        log_variances = self.model.noisy.in_range()
        self.model.set_log_variances(log_variances)
        return self.model.sample_sites(self._posteriors(log_variances).__getitem__)

    def kl(self) -> dict[str, Tensor]:
        """From layer name to the KL divergence from posterior to prior of every weight, in nats."""
        posteriors = self.posteriors()
        return {n: kl_divergence(q, self.model.prior(n)).detach() for n, q in posteriors.items()}
