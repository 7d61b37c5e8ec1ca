"""Parts of one distribution that compute together what they are asked for one by one.

The gates of a network are sample sites of their own, and a draw or a KL is some forty small
operations whatever the number of units: done for all gates at once they cost what one gate costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Part", "Whole"]


class Whole:
    """A distribution of batch shape ``[n]``, and what has been computed for all of it.

    Args:
        sizes: of its parts, ``n`` together.
        statistic: from a function of the parameters to its values ``[n]``.
        draw: gives a sample ``[n]``.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        statistic: Callable[[Callable[..., Tensor]], Tensor],
        draw: Callable[[], Tensor],
    ) -> None:
        self.sizes = list(sizes)
        self._statistic, self._draw = statistic, draw
        # What was computed without gradients does not serve those who want them.
        self._statistics: dict[tuple[Callable[..., Tensor], bool], Sequence[Tensor]] = {}
        self._draws: dict[tuple[int, bool], Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        # What was computed is part of a graph, which cannot be copied.
        return self.__dict__ | {"_statistics": {}, "_draws": {}}

    def statistic(self, function: Callable[..., Tensor], part: int) -> Tensor:
        """What the function of the parameters is on a part, computed once."""
        key = function, torch.is_grad_enabled()
        if key not in self._statistics:
            self._statistics[key] = self._statistic(function).split(self.sizes)
        return self._statistics[key][part]

    def draw(self, part: int) -> Tensor:
        """A sample of a part. Every part takes a draw once; who asks again begins the next."""
        grad = torch.is_grad_enabled()
        if (part, grad) not in self._draws:
            draws = self._draw().split(self.sizes)
            self._draws.update({(index, grad): draw for index, draw in enumerate(draws)})
        return self._draws.pop((part, grad))


class Part:
    """One part of a `Whole`, for the distribution that stands for it."""

    def __init__(self, whole: Whole, index: int) -> None:
        self.whole, self.index = whole, index

    def statistic(self, function: Callable[..., Tensor]) -> Tensor:
        """As `Whole.statistic`."""
        return self.whole.statistic(function, self.index)

    def draws(self, shape: torch.Size) -> bool:
        """Whether a sample of this shape is drawn together: many examples are work enough alone."""
        return shape == (self.whole.sizes[self.index],)

    def draw(self) -> Tensor:
        """As `Whole.draw`."""
        return self.whole.draw(self.index)
