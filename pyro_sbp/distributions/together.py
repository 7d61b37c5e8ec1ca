"""Parts of one distribution that share their computations.

Every gate of a network is a sample site with a distribution. A draw or a KL divergence takes about
forty small operations, for any number of units. Computed for all gates at once, they cost as much
as for one gate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Part", "Whole"]


class Whole:
    """A distribution of batch shape ``[n]``, with a cache of its statistics and draws.

    Args:
        sizes: the sizes of its parts, whose sum is ``n``.
        statistic: from a function of the parameters to its values ``[n]``.
        draw: returns a sample ``[n]``.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        statistic: Callable[[Callable[..., Tensor]], Tensor],
        draw: Callable[[], Tensor],
    ) -> None:
        self.sizes = list(sizes)
        self._statistic, self._draw = statistic, draw
        # The key contains whether gradients are enabled, because a value that was computed without
        # them cannot be differentiated.
        self._statistics: dict[tuple[Callable[..., Tensor], bool], Sequence[Tensor]] = {}
        self._draws: dict[tuple[int, bool], Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        # The cached values belong to a graph, which cannot be copied.
        return self.__dict__ | {"_statistics": {}, "_draws": {}}

    def statistic(self, function: Callable[..., Tensor], part: int) -> Tensor:
        """The values of a function of the parameters on one part. They are computed once."""
        key = function, torch.is_grad_enabled()
        if key not in self._statistics:
            self._statistics[key] = self._statistic(function).split(self.sizes)
        return self._statistics[key][part]

    def draw(self, part: int) -> Tensor:
        """A sample of one part. Each joint draw gives one sample to every part. A second call for
        the same part makes a new joint draw."""
        grad = torch.is_grad_enabled()
        if (part, grad) not in self._draws:
            draws = self._draw().split(self.sizes)
            self._draws.update({(index, grad): draw for index, draw in enumerate(draws)})
        return self._draws.pop((part, grad))


class Part:
    """One part of a `Whole`. The distributions that `split` returns refer to their parts."""

    def __init__(self, whole: Whole, index: int) -> None:
        self.whole, self.index = whole, index

    def statistic(self, function: Callable[..., Tensor]) -> Tensor:
        """The values of a function of the parameters, see `Whole.statistic`."""
        return self.whole.statistic(function, self.index)

    def draws(self, shape: torch.Size) -> bool:
        """Whether to draw a sample of this shape jointly. Larger samples are not faster jointly."""
        return shape == (self.whole.sizes[self.index],)

    def draw(self) -> Tensor:
        """A sample, see `Whole.draw`."""
        return self.whole.draw(self.index)
