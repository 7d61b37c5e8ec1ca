"""What a mean-field guide says of its posteriors, site by site."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["SiteStatistics", "check_statistics"]


class SiteStatistics:
    """Statistics of a guide whose `posteriors` gives a distribution over every site's elements."""

    def posteriors(self) -> dict[str, Any]:
        """The posterior of every site, from site name to a distribution over its elements."""
        raise NotImplementedError

    def _statistic(self, function: Callable[[Any], Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            return {name: function(q).detach() for name, q in self.posteriors().items()}

    def mean(self) -> dict[str, Tensor]:
        """The posterior mean of every element, by site."""
        return self._statistic(lambda q: q.mean)

    def snr(self) -> dict[str, Tensor]:
        """The signal-to-noise ratio, mean over standard deviation, of every element, by site."""
        return self._statistic(lambda q: q.snr)

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The posterior median of every element, by site."""
        return {name: q[0] for name, q in self.quantiles([0.5]).items()}

    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Posterior quantiles, by site: a tensor ``[len(quantiles), *site shape]``.

        Args:
            quantiles: a list or tensor of probabilities between 0 and 1.
        """

        def of(q: Any) -> Tensor:
            p = torch.as_tensor(quantiles, dtype=q.loc.dtype, device=q.loc.device)
            return q.icdf(p.reshape(-1, *[1] * q.loc.ndim))

        return self._statistic(of)


def check_statistics(guide: Any) -> None:
    """Raise ValueError unless a guide has the mean and the signal-to-noise ratio of its sites."""
    if not all(callable(getattr(guide, name, None)) for name in ("mean", "snr")):
        raise ValueError(
            f"{type(guide).__name__} has no mean() and snr() by site, which decide what is kept: "
            "use TruncatedLogNormalGuide, or choose theta yourself and call shrink"
        )
