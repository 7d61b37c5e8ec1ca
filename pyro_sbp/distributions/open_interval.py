"""A constraint with bounds that may be infinite in some elements, and its transform."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints, transform_to
from torch.distributions.transforms import Transform
from torch.nn.functional import logsigmoid

__all__ = ["OpenInterval", "OpenIntervalTransform"]


class OpenInterval(constraints.Constraint):
    """Numbers in ``[lower_bound, upper_bound]``, where bounds may be infinite in some elements."""

    def __init__(self, lower_bound: Tensor, upper_bound: Tensor) -> None:
        self.lower_bound, self.upper_bound = lower_bound, upper_bound
        super().__init__()

    def __repr__(self) -> str:
        return f"OpenInterval(lower_bound={self.lower_bound}, upper_bound={self.upper_bound})"

    def check(self, value: Tensor) -> Tensor:
        return (self.lower_bound <= value) & (value <= self.upper_bound)


class OpenIntervalTransform(Transform):
    """The bijection from the real numbers to an `OpenInterval`, elementwise.

    For an element without bounds it is the identity, with one bound ``low + exp(x)`` or
    ``high - exp(x)``, and with two bounds ``low + (high - low) sigmoid(x)``. The transforms of
    torch for these constraints are the same, except for the sign in ``high - exp(x)``.
    """

    bijective = True
    domain = constraints.real

    def __init__(self, low: Tensor, high: Tensor, cache_size: int = 0) -> None:
        super().__init__(cache_size=cache_size)
        self.low, self.high = low, high
        self._has_low, self._has_high = low.isfinite(), high.isfinite()
        self._both = self._has_low & self._has_high
        self._one = self._has_low ^ self._has_high
        # Replace infinite bounds: the gradients of branches that are not used must be finite too.
        self._step = torch.where(self._has_low, 1.0, -1.0).to(low.dtype)
        self._end = torch.where(self._has_low, low, torch.where(self._has_high, high, 0.0))
        self._width = torch.where(self._both, high, 1.0) - torch.where(self._both, low, 0.0)

    @property
    def codomain(self) -> constraints.Constraint:
        return OpenInterval(self.low, self.high)

    @codomain.setter
    def codomain(self, _: constraints.Constraint) -> None:
        raise AttributeError("codomain cannot be set: it is computed from low and high")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, OpenIntervalTransform):
            return False
        return torch.equal(self.low, other.low) and torch.equal(self.high, other.high)

    __hash__ = Transform.__hash__

    def with_cache(self, cache_size: int = 1) -> OpenIntervalTransform:
        if self._cache_size == cache_size:
            return self
        return OpenIntervalTransform(self.low, self.high, cache_size=cache_size)

    def _call(self, x: Tensor) -> Tensor:
        info = torch.finfo(x.dtype)
        share = torch.clamp(torch.sigmoid(x), min=info.tiny, max=1 - info.eps)
        half = self._end + self._step * torch.where(self._one, x, 0.0).exp()
        return torch.where(self._both, self._end + self._width * share, self._or_whole(half, x))

    def _inverse(self, y: Tensor) -> Tensor:
        info = torch.finfo(y.dtype)
        distance = self._step * (y - self._end)
        share = torch.where(self._both, distance / self._width, 0.5)
        share = share.clamp(min=info.tiny, max=1 - info.eps)
        half = torch.where(self._one, distance, 1.0).log()
        return torch.where(self._both, share.log() - (-share).log1p(), self._or_whole(half, y))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        both = self._width.log() + logsigmoid(x) + logsigmoid(-x)
        return torch.where(self._both, both, self._or_whole(x, torch.zeros_like(x)))

    def _or_whole(self, half: Tensor, whole: Tensor) -> Tensor:
        return torch.where(self._one, half, whole)


@biject_to.register(OpenInterval)
@transform_to.register(OpenInterval)
def _bijection(constraint: OpenInterval) -> OpenIntervalTransform:
    return OpenIntervalTransform(constraint.lower_bound, constraint.upper_bound)
