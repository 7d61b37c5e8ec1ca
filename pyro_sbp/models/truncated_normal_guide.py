"""The mean-field guide for sites whose support is an interval, with truncated normal posteriors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_sbp.distributions import TruncatedNormal
from pyro_sbp.models.truncated_guide import (
    Box,
    Initial,
    TruncatedGuide,
    base_of,
    check_names,
    initial_value,
    single_bounds,
)

__all__ = ["TruncatedNormalGuide"]

#: The numerics have been verified for a support of width 20. Other supports are scaled to it.
PROVEN_WIDTH = 20.0
LOC_MARGIN = 5.0
LOG_SCALE_RANGE = (-10.0, 5.0)
#: The initial scale, in standard deviations of the prior. Pyro's autoguides have the same default.
INIT_SCALE = 0.1
#: The default: no site has an initial value.
NOT_GIVEN: Mapping[str, float | Tensor] = MappingProxyType({})


class TruncatedNormalGuide(TruncatedGuide):
    """A mean-field guide with truncated normal posteriors on the support of the prior.

    Every element of every site has an independent posterior. The guide supports all priors to which
    the KL divergence has a closed form: `TruncatedNormal`, `Uniform`, `HalfNormal`, `Exponential`
    and `Normal`. The parameters `locs` and `log_scales` are created in the constructor. Every call
    first clamps them. The location may lie outside the support by at most a quarter of its width,
    and the scale is between 2e-6 times the width and the width. If a bound is infinite, the
    standard deviation of the prior replaces the width: the location may lie at most 5 deviations
    outside the other bound, and the scale is between e^-10 and e^5 deviations.

    Args:
        model: a Pyro model whose latent sites all have such a prior with constant bounds. Hide
            other sites with `pyro.poutine.block`, and combine guides in an `AutoGuideList`.
        example_args: arguments of the model. It is run twice on them, to find its sites and to find
            out which priors are learned.
        init_loc: the initial location: a number, or a tensor that broadcasts to the shape of every
            site. A mapping from site name to such a value gives each site its own. The default is
            the mean of the prior.
        init_log_scale: the initial log scale, in the same format. The default is the log of a tenth
            of the standard deviation of the prior.
        init_loc_fn: from a site of the model to the initial location, as in Pyro's autoguides
            (`pyro.infer.autoguide.initialization`). It replaces `init_loc`.

    Raises:
        ValueError: the model has a latent site with another prior, or has no latent site; the
            bounds of a site differ between elements; an initial value is for an unknown site or
            does not fit its shape; or `init_loc` and `init_loc_fn` are both given.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *example_args: Any,
        init_loc: Initial | None = None,
        init_log_scale: Initial = NOT_GIVEN,
        init_loc_fn: Callable[[dict[str, Any]], Tensor] | None = None,
    ) -> None:
        super().__init__(model)
        if init_loc is not None and init_loc_fn is not None:
            raise ValueError("init_loc and init_loc_fn are both given; give only one of them")
        init_loc = NOT_GIVEN if init_loc is None else init_loc
        sites = self._trace_model(*example_args)
        for given in (init_loc, init_log_scale):
            check_names(given, sites)
        for name, site in sites.items():
            prior, base = site["fn"], base_of(site["fn"])
            low, high = single_bounds(
                name,
                getattr(base.support, "lower_bound", -math.inf),
                getattr(base.support, "upper_bound", math.inf),
            )
            _check_kl(name, base, low, high)
            shape, like = self._full_shape(name, prior), base.mean
            mean, log_deviation = base.mean, base.stddev.log()
            if list(mean.shape) != shape:  # in a subsampled plate
                mean, log_deviation = mean.mean(), log_deviation.mean()
            if init_loc_fn is not None:
                mean = init_loc_fn({"type": "sample", "name": name, "fn": prior, "value": None})
            loc = initial_value(init_loc, mean, name, like, shape)
            log_scale = initial_value(
                init_log_scale, log_deviation + math.log(INIT_SCALE), name, like, shape
            )
            self._add(name, _box(low, high, base), loc, log_scale, prior.event_dim)

    def _posterior_of(self, loc: Tensor, scale: Tensor, low: float, high: float) -> TruncatedNormal:
        return TruncatedNormal(loc, scale, low, high)


def _box(low: float, high: float, prior: Any) -> Box:
    """The support of a site and the ranges of its parameters."""
    least, most = LOG_SCALE_RANGE
    width = high - low
    unit = width / PROVEN_WIDTH if math.isfinite(width) else float(prior.stddev.max())
    margin, log_unit = LOC_MARGIN * unit, math.log(unit)
    widest = min(log_unit + most, math.log(width))
    return Box(low, high, low - margin, high + margin, log_unit + least, widest)


def _check_kl(name: str, prior: Any, low: float, high: float) -> None:
    """Raise ValueError if there is no closed-form KL divergence to a prior."""
    like = getattr(prior, next(iter(prior.arg_constraints), ""), torch.zeros((), device="cpu"))
    try:
        kl_divergence(TruncatedNormal(like.new_zeros(()), 1.0, low, high), prior)
    except NotImplementedError:
        raise ValueError(
            f"site {name!r} has the prior {type(prior).__name__}; this guide supports only priors "
            "with a closed-form KL divergence from TruncatedNormal, such as TruncatedNormal, "
            "Uniform, HalfNormal, Exponential and Normal: hide other sites with pyro.poutine.block"
        ) from None
