"""The mean-field truncated log-normal posterior of multiplicative noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_sbp.distributions import TruncatedLogNormal, TruncatedLogUniform
from pyro_sbp.models.gated_model import GatedModel, widest
from pyro_sbp.models.truncated_guide import (
    Box,
    Initial,
    TruncatedGuide,
    base_of,
    check_names,
    initial_value,
    single_bounds,
)

__all__ = ["TruncatedLogNormalGuide"]

_PRIORS = (TruncatedLogUniform, TruncatedLogNormal)
#: How far loc may lie outside the support of log theta, and the range of log scale. In this range
#: the numerics of the truncated normal distribution have been verified.
LOC_MARGIN = 5.0
LOG_SCALE_RANGE = (-10.0, 5.0)
#: The initial location and log scale of log theta.
INIT_LOC, INIT_LOG_SCALE = 0.0, -5.0


class TruncatedLogNormalGuide(TruncatedGuide):
    """A mean-field guide with truncated log-normal posteriors (arXiv 1705.07283).

    Every element of every site has an independent posterior. The constructor creates the parameters
    `locs` and `log_scales`, so that an optimizer can be made before the first step, and a state
    dict can be loaded at any time. Every call first clamps them: loc to [log_low - 5,
    log_high + 5], and log scale to [-10, `max_log_scale`].

    Args:
        model: a `GatedModel`, or any Pyro model whose latent sites all have a `TruncatedLogUniform`
            or `TruncatedLogNormal` prior with constant bounds. Hide other sites with
            `pyro.poutine.block`, and combine guides in an `AutoGuideList`.
        example_args: arguments of the model. A general model is run twice on them, to find its
            sites and to find out which priors are learned. A `GatedModel` needs none.
        init_loc: the initial location of log theta: a number, or a tensor that broadcasts to the
            shape of every site. A mapping from site name to such a value gives each site its own.
        init_log_scale: the initial log scale of log theta, in the same format.
        max_log_scale: the largest log scale, at most 5. The default for a `GatedModel` is 5, or the
            log of its `prior_scale`. The default for other models is the log of a third of the
            width of the support, or of the scale of the prior if this is larger: wider posteriors
            are nearly flat, and their gradients are small. The limit adds 0.05 nats to the KL
            divergence of an element about which the data give no information.
        init_loc_fn: from a site of the model to the initial value of theta, as in Pyro's autoguides
            (`pyro.infer.autoguide.initialization`). It replaces `init_loc`.

    Raises:
        ValueError: the model has a latent site with another prior, or has no latent site;
            `max_log_scale` is not in [-10, 5]; an initial value is for an unknown site or does not
            fit its shape; or `init_loc` and `init_loc_fn` are both given.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *example_args: Any,
        init_loc: Initial | None = None,
        init_log_scale: Initial = INIT_LOG_SCALE,
        max_log_scale: float | None = None,
        init_loc_fn: Callable[[dict[str, Any]], Tensor] | None = None,
    ) -> None:
        super().__init__(model)
        least, most = LOG_SCALE_RANGE
        if max_log_scale is not None and not least <= max_log_scale <= most:
            raise ValueError(f"max_log_scale is {max_log_scale}; expected a number in [-10, 5]")
        if init_loc is not None and init_loc_fn is not None:
            raise ValueError("init_loc and init_loc_fn are both given; give only one of them")
        init_loc = INIT_LOC if init_loc is None else init_loc
        if isinstance(model, GatedModel):
            priors: dict[str, Any] = {g.name: model.prior(g.name).to_event(1) for g in model.gates}
        else:
            priors = {name: site["fn"] for name, site in self._trace_model(*example_args).items()}
        for given in (init_loc, init_log_scale):
            check_names(given, priors)
        for name, prior in priors.items():
            base = base_of(prior)
            if not isinstance(base, _PRIORS):
                raise ValueError(
                    f"site {name!r} has the prior {type(base).__name__}; this guide supports only "
                    "TruncatedLogUniform and TruncatedLogNormal: hide other sites with "
                    "pyro.poutine.block"
                )
            shape, like = self._full_shape(name, prior), base.log_low
            low, high = single_bounds(name, base.log_low, base.log_high)
            if max_log_scale is not None:
                widest_here = max_log_scale
            elif isinstance(model, GatedModel):
                widest_here = widest(model.prior_scale)
            else:
                of_prior = isinstance(base, TruncatedLogNormal)
                scale = float(base.scale.detach().max()) if of_prior else 0.0
                widest_here = math.log(max((high - low) / 3, scale))
                widest_here = max(least, min(most, widest_here))
            loc = initial_value(init_loc, INIT_LOC, name, like, shape)
            if init_loc_fn is not None:
                value = init_loc_fn({"type": "sample", "name": name, "fn": prior, "value": None})
                log_value = value.detach().log().clamp(low, high)
                loc = initial_value(log_value, INIT_LOC, name, like, shape)
            box = Box(low, high, low - LOC_MARGIN, high + LOC_MARGIN, least, widest_here)
            log_scale = initial_value(init_log_scale, INIT_LOG_SCALE, name, like, shape)
            self._add(name, box, loc, log_scale, prior.event_dim)

    def _posterior_of(
        self, loc: Tensor, scale: Tensor, low: float, high: float
    ) -> TruncatedLogNormal:
        return TruncatedLogNormal(loc, scale, low, high)

    def joint_posterior(self) -> TruncatedLogNormal | None:
        """The posterior of all sites of a `GatedModel`, ``[units]``, in the order of the gates.

        None if the sites have different bounds.
        """
        bounds = {(box.low, box.high) for box in self._boxes.values()}
        if len(bounds) > 1:
            return None
        locs, log_scales = zip(*map(self._in_the_box, self._boxes), strict=True)
        return TruncatedLogNormal(torch.cat(locs), torch.cat(log_scales).exp(), *bounds.pop())

    def _joint_posteriors(self) -> dict[str, TruncatedLogNormal]:
        """The posteriors of a `GatedModel`, which share their computations."""
        whole = self.joint_posterior()
        if whole is None:
            return self.posteriors()
        sizes = [gate.size for gate in self.model.gates]
        return dict(zip(self._boxes, whole.split(sizes), strict=True))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every site from its posterior. The arguments are those of the model."""
        if isinstance(self.model, GatedModel):
            return self.model.sample_sites(self._joint_posteriors().__getitem__, *args[:1])
        return super().forward(*args, **kwargs)

    def priors(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The prior of every site, see `TruncatedGuide.priors`."""
        if isinstance(self.model, GatedModel):
            return {name: self.model.prior(name) for name in self._boxes}
        return super().priors(*args, **kwargs)
