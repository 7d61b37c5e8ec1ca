"""The mean-field truncated log-normal posterior of multiplicative noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroModule
from pyro.nn.module import PyroParam
from torch import Tensor
from torch.distributions import constraints

from pyro_sbp.distributions import TruncatedLogNormal, TruncatedLogUniform
from pyro_sbp.models.gated_model import GatedModel, widest
from pyro_sbp.models.site_statistics import SiteStatistics
from pyro_sbp.models.sites import CopiedUnderOwnName, unique_name

__all__ = ["TruncatedLogNormalGuide"]

_PRIORS = (TruncatedLogUniform, TruncatedLogNormal)
#: How far loc may leave the support of log theta, and the range of log scale: the box in which the
#: numerics of the truncated normal are proven.
LOC_MARGIN = 5.0
LOG_SCALE_RANGE = (-10.0, 5.0)
#: Initial location and log scale of log theta.
INIT_LOC, INIT_LOG_SCALE = 0.0, -5.0
#: An initial value of all sites, or of each by name.
Initial = float | Tensor | Mapping[str, float | Tensor]


class TruncatedLogNormalGuide(CopiedUnderOwnName, SiteStatistics, AutoGuide):
    """Independent truncated log-normal posteriors (arXiv 1705.07283), one per element.

    The parameters `locs` and `log_scales` exist from the start, so that an optimizer may be made
    before the first step and a state dict loads at any time. Every call first puts them back into
    the box loc in [log_low - 5, log_high + 5], log scale in [-10, 5] or up to `max_log_scale`.

    Args:
        model: a `GatedModel`, or any Pyro model whose latent sites all have a `TruncatedLogUniform`
            or `TruncatedLogNormal` prior with constant bounds (hide other sites with
            `pyro.poutine.block`, and combine guides in an `AutoGuideList`).
        example_args: arguments on which a general model is traced once; a `GatedModel` needs none.
        init_loc: the initial location of log theta, a number or a tensor that broadcasts to a site,
            for all sites or for each by name.
        init_log_scale: the initial log scale of log theta, likewise.
        max_log_scale: the largest log scale, at most 5. By default it is 5 for a `GatedModel`, or
            the log of its `prior_scale`, and otherwise the log of the width of the support: a
            wider posterior is flat, and its gradient does not lead back.
        init_loc_fn: from a site of the model to the initial value of theta, as of Pyro's
            autoguides (`pyro.infer.autoguide.initialization`), in place of `init_loc`.

    Raises:
        ValueError: the model has a latent site with another prior, or none at all;
            `max_log_scale` is out of [-10, 5]; an initial value names no site or does not fit its
            shape; or `init_loc` and `init_loc_fn` are both given.
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
            raise ValueError("give init_loc or init_loc_fn, not both")
        init_loc = INIT_LOC if init_loc is None else init_loc
        self._pyro_name = unique_name(type(self).__name__)
        if isinstance(model, GatedModel):
            priors: dict[str, Any] = {g.name: model.prior(g.name).to_event(1) for g in model.gates}
        else:
            self._setup_prototype(*example_args)
            priors = {name: site["fn"] for name, site in self._prototype_sites()}
        if not priors:
            raise ValueError("the model has no latent site to infer")
        for given in (init_loc, init_log_scale):
            _check_names(given, priors)
        self.locs, self.log_scales = PyroModule(), PyroModule()
        self._bounds: dict[str, tuple[float, float]] = {}
        self._most: dict[str, float] = {}  # the largest log scales
        self._priors: dict[str, TruncatedLogNormal] = {}  # those that are not log-uniform
        for name, prior in priors.items():
            base = _base(prior)
            if not isinstance(base, _PRIORS):
                raise ValueError(
                    f"site {name!r} has the prior {type(base).__name__}; this guide is for "
                    "TruncatedLogUniform and TruncatedLogNormal sites: hide the others with "
                    "pyro.poutine.block"
                )
            shape = self._full_shape(name, prior)
            low, high = float(base.log_low.min()), float(base.log_high.max())
            if low != float(base.log_low.max()) or high != float(base.log_high.min()):
                raise ValueError(f"site {name!r} has several bounds; this guide takes one pair")
            self._bounds[name] = low, high
            if isinstance(base, TruncatedLogNormal):
                self._priors[name] = base
            if max_log_scale is not None:
                self._most[name] = max_log_scale
            elif isinstance(model, GatedModel):
                self._most[name] = widest(model.prior_scale)
            else:
                self._most[name] = min(most, math.log(high - low))
            like = base.log_low
            loc = _initial(init_loc, INIT_LOC, name, like, shape)
            if init_loc_fn is not None:
                value = init_loc_fn({"type": "sample", "name": name, "fn": prior, "value": None})
                log_value = value.detach().log().clamp(low, high)
                loc = _initial(log_value, INIT_LOC, name, like, shape)
            _set(self.locs, name, loc, prior.event_dim)
            log_scale = _initial(init_log_scale, INIT_LOG_SCALE, name, like, shape)
            _set(self.log_scales, name, log_scale, prior.event_dim)

    def set_posteriors(self, posteriors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Set location and log scale of sites, by name; of the shapes that they have."""
        with torch.no_grad():
            for name, (loc, log_scale) in posteriors.items():
                _get(self.locs, name).copy_(loc)
                _get(self.log_scales, name).copy_(log_scale)

    def _prototype_sites(self) -> Iterable[tuple[str, dict[str, Any]]]:
        """The latent sites of a general model, by name, as it was traced once."""
        assert self.prototype_trace is not None
        return self.prototype_trace.iter_stochastic_nodes()

    def _full_shape(self, name: str, prior: Any) -> list[int]:
        """The shape of a site over all of its plates, subsampled ones at their full size."""
        shape = list(prior.shape())
        if self.prototype_trace is not None:
            for frame in self.prototype_trace.nodes[name]["cond_indep_stack"]:
                shape[frame.dim - prior.event_dim] = frame.full_size or frame.size
        return shape

    def _in_the_box(self, name: str) -> tuple[Tensor, Tensor]:
        """Location and log scale of a site, put back into the box."""
        loc, log_scale = _get(self.locs, name), _get(self.log_scales, name)
        low, high = self._bounds[name]
        # `detach`, which `torch.jit.trace` records, as it does not `no_grad`.
        loc.detach().clamp_(low - LOC_MARGIN, high + LOC_MARGIN)
        log_scale.detach().clamp_(LOG_SCALE_RANGE[0], self._most[name])
        return loc, log_scale

    def _posterior(self, name: str) -> TruncatedLogNormal:
        loc, log_scale = self._in_the_box(name)
        return TruncatedLogNormal(loc, log_scale.exp(), *self._bounds[name])

    def _joint_posteriors(self) -> dict[str, TruncatedLogNormal]:
        """The posteriors of a `GatedModel`, which draw and compute together."""
        bounds = set(self._bounds.values())
        if len(bounds) > 1:
            return self.posteriors()
        locs, log_scales = zip(*map(self._in_the_box, self._bounds), strict=True)
        whole = TruncatedLogNormal(torch.cat(locs), torch.cat(log_scales).exp(), *bounds.pop())
        return dict(zip(self._bounds, whole.split([len(loc) for loc in locs]), strict=True))

    def posteriors(self) -> dict[str, TruncatedLogNormal]:
        """The posterior of every site, from site name to a distribution over its elements."""
        return {name: self._posterior(name) for name in self._bounds}

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every site from its posterior, with the arguments of the model."""
        if isinstance(self.model, GatedModel):
            return self.model.sample_sites(self._joint_posteriors().__getitem__, *args[:1])
        plates = self._create_plates(*args, **kwargs)
        values = {}
        for name, site in self._prototype_sites():
            with ExitStack() as stack:
                for frame in site["cond_indep_stack"]:
                    stack.enter_context(plates[frame.name])
                posterior = self._posterior(name).to_event(site["fn"].event_dim)
                values[name] = pyro.sample(name, posterior)
        return values

    def kl(self) -> dict[str, Tensor]:
        """The KL divergence from posterior to prior of every element in nats, by site.

        The prior is the one that the site had when the guide was made.
        """
        with torch.no_grad():
            return {
                name: torch.distributions.kl_divergence(q, self._prior(name, q))
                for name, q in self.posteriors().items()
            }

    def _prior(self, name: str, q: TruncatedLogNormal) -> TruncatedLogUniform | TruncatedLogNormal:
        if name not in self._priors:
            return TruncatedLogUniform(q.log_low, q.log_high).expand(q.batch_shape)
        p = self._priors[name]
        loc, scale = (x.detach().to(q.loc) for x in (p.loc, p.scale))
        return TruncatedLogNormal(loc, scale, *self._bounds[name]).expand(q.batch_shape)


def _check_names(given: Initial, sites: Mapping[str, Any]) -> None:
    """Raise ValueError if initial values are for a site that is not there."""
    for name in given if isinstance(given, Mapping) else ():
        if name not in sites:
            raise ValueError(
                f"there is no site {name!r} to set an initial value of; the sites are "
                f"{', '.join(sites)}"
            )


def _initial(given: Initial, default: float, name: str, like: Tensor, shape: list[int]) -> Tensor:
    """The initial values of a site as a new tensor of its shape; the default if it is not named."""
    value = given.get(name, default) if isinstance(given, Mapping) else given
    value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    try:
        return value.expand(shape).clone()
    except RuntimeError as error:
        raise ValueError(
            f"the initial value of site {name!r} has shape {list(value.shape)}; expected one that "
            f"broadcasts to {shape}"
        ) from error


def _parent(root: PyroModule, name: str) -> tuple[PyroModule, str]:
    """The module that holds the parameter of a dotted name, which is made, and the last part.

    Sites may nest (``fc1`` and ``fc1.lora``), so a module can have a parameter and a child of one
    name, which `getattr` does not tell apart.
    """
    *path, leaf = name.split(".")
    for part in path:
        child = root._modules.get(part)
        if child is None:
            child = PyroModule()
            child._pyro_set_supermodule(f"{root._pyro_name}.{part}", root._pyro_context)
            root._modules[part] = child
        assert isinstance(child, PyroModule)
        root = child
    return root, leaf


def _set(root: PyroModule, name: str, value: Tensor, event_dim: int) -> None:
    """Put a parameter at a dotted name into nested modules, as Pyro's own guides do."""
    module, leaf = _parent(root, name)
    child = module._modules.pop(leaf, None)  # setting the parameter would delete it
    setattr(module, leaf, PyroParam(value, constraints.real, event_dim))
    if child is not None:
        module._modules[leaf] = child


def _get(root: PyroModule, name: str) -> Tensor:
    """The parameter at a dotted name."""
    module, leaf = _parent(root, name)
    value: Tensor = getattr(module, leaf)
    return value


def _base(distribution: Any) -> Any:
    """The distribution inside `to_event` and `mask`."""
    while hasattr(distribution, "base_dist") and not isinstance(distribution, _PRIORS):
        distribution = distribution.base_dist
    return distribution
