"""Statistics of the posteriors of a mean-field guide, by site."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["SiteStatistics", "check_statistics"]


class SiteStatistics:
    """Statistics of a guide that has a method `posteriors`."""

    def posteriors(self) -> dict[str, Any]:
        """From site name to the posterior of the site, a distribution of the shape of the site."""
        raise NotImplementedError

    def _statistic(self, function: Callable[[Any], Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            return {name: function(q).detach() for name, q in self.posteriors().items()}

    def mean(self) -> dict[str, Tensor]:
        """From site name to the posterior mean of every element."""
        return self._statistic(lambda q: q.mean)

    def snr(self) -> dict[str, Tensor]:
        """From site name to the signal-to-noise ratio of every element: the mean divided by the
        standard deviation."""
        return self._statistic(lambda q: q.snr)

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """From site name to the posterior median of every element."""
        return {name: q[0] for name, q in self.quantiles([0.5]).items()}

    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """From site name to posterior quantiles, a tensor ``[len(quantiles), *site shape]``.

        Args:
            quantiles: a list or a tensor of probabilities between 0 and 1.
        """

        def of(q: Any) -> Tensor:
            p = torch.as_tensor(quantiles, dtype=q.loc.dtype, device=q.loc.device)
            return q.icdf(p.reshape(-1, *[1] * q.loc.ndim))

        return self._statistic(of)


def check_statistics(guide: Any) -> None:
    """Raise ValueError if a guide lacks the methods `mean` and `snr`."""
    if not all(callable(getattr(guide, name, None)) for name in ("mean", "snr")):
        raise ValueError(
            f"{type(guide).__name__} has no methods mean() and snr(), which pruning needs: use "
            "TruncatedLogNormalGuide, or choose theta yourself and call shrink"
        )
