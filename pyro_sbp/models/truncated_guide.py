"""The base class of the mean-field guides with truncated posteriors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroModule
from pyro.nn.module import PyroParam
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor
from torch.distributions import constraints, kl_divergence

from pyro_sbp.models.site_statistics import SiteStatistics
from pyro_sbp.models.sites import CopiedUnderOwnName, unique_name

__all__ = [
    "Box",
    "Initial",
    "TruncatedGuide",
    "base_of",
    "check_names",
    "initial_value",
    "single_bounds",
]

#: An initial value for all sites, or a mapping from site name to the value.
Initial = float | Tensor | Mapping[str, float | Tensor]


class Box(NamedTuple):
    """The support of a posterior, before `exp` is applied, and the ranges of its parameters."""

    low: float
    high: float
    least_loc: float
    most_loc: float
    least_log_scale: float
    most_log_scale: float


class TruncatedGuide(CopiedUnderOwnName, SiteStatistics, AutoGuide):
    """Independent posteriors with a location and a log scale for every element of every site.

    The constructor creates the parameters `locs` and `log_scales`, so that an optimizer can be made
    before the first step, and a state dict can be loaded at any time. Every call first clamps them
    to the `Box` of their site.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        super().__init__(model)
        self._pyro_name = unique_name(type(self).__name__)
        self.locs, self.log_scales = PyroModule(), PyroModule()
        self._boxes: dict[str, Box] = {}
        # From site name to its prior, or None if the prior is not the same in every call.
        self._constant_priors: dict[str, Any] = {}

    def _posterior_of(self, loc: Tensor, scale: Tensor, low: float, high: float) -> Any:
        """The posterior of a site, of the shape of its parameters."""
        raise NotImplementedError

    def _add(self, name: str, box: Box, loc: Tensor, log_scale: Tensor, event_dim: int) -> None:
        """Add the parameters of a site."""
        self._boxes[name] = box
        _set(self.locs, name, loc, event_dim)
        _set(self.log_scales, name, log_scale, event_dim)

    def _trace_model(self, *args: Any) -> dict[str, Any]:
        """Run a general model twice, to find its latent sites and which priors are constant.

        Returns:
            From name to latent site.

        Raises:
            ValueError: there are no latent sites, or the bounds of a site are not constant.
        """
        self._takes_arguments = bool(args)
        self._setup_prototype(*args)
        sites = dict(self._prototype_sites())
        if not sites:
            raise ValueError("the model has no latent site, so there is nothing to infer")
        state = get_rng_state()
        again = poutine.block(poutine.trace(self.model).get_trace)(*args)
        set_rng_state(state)
        for name, site in sites.items():
            prior, second = base_of(site["fn"]), base_of(again.nodes[name]["fn"])
            if not _have_constant_bounds(prior, second):
                raise ValueError(
                    f"site {name!r} has bounds that are learned or depend on other sites; this "
                    "guide supports only constant bounds"
                )
            self._constant_priors[name] = prior if _is_constant(prior, second) else None
        return sites

    def _prototype_sites(self) -> Iterable[tuple[str, dict[str, Any]]]:
        """The latent sites of a general model in its prototype trace, with their names."""
        assert self.prototype_trace is not None
        return self.prototype_trace.iter_stochastic_nodes()

    def _full_shape(self, name: str, prior: Any) -> list[int]:
        """The shape of a site in all of its plates, where subsampled plates have full size."""
        shape = list(prior.shape())
        if self.prototype_trace is not None:
            for frame in self.prototype_trace.nodes[name]["cond_indep_stack"]:
                shape[frame.dim - prior.event_dim] = frame.full_size or frame.size
        return shape

    def _in_the_box(self, name: str) -> tuple[Tensor, Tensor]:
        """The location and the log scale of a site, clamped to its box in place."""
        loc, log_scale = _get(self.locs, name), _get(self.log_scales, name)
        box = self._boxes[name]
        # `torch.jit.trace` records `detach`, but not `no_grad`.
        loc.detach().clamp_(box.least_loc, box.most_loc)
        log_scale.detach().clamp_(box.least_log_scale, box.most_log_scale)
        return loc, log_scale

    def set_posteriors(self, posteriors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Set the parameters of sites.

        Args:
            posteriors: from site name to the location and the log scale, each of the shape of the
                site.
        """
        with torch.no_grad():
            for name, (loc, log_scale) in posteriors.items():
                _get(self.locs, name).copy_(loc)
                _get(self.log_scales, name).copy_(log_scale)

    def _posterior(self, name: str) -> Any:
        loc, log_scale = self._in_the_box(name)
        box = self._boxes[name]
        # A copy, because a parameter has a weak reference of Pyro, which cannot be pickled.
        return self._posterior_of(loc.clone(), log_scale.exp(), box.low, box.high)

    def posteriors(self) -> dict[str, Any]:
        """From site name to the posterior of the site, a distribution of the shape of the site."""
        return {name: self._posterior(name) for name in self._boxes}

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every site from its posterior. The arguments are those of the model.

        Returns:
            From site name to the sample.
        """
        plates = self._create_plates(*args, **kwargs)
        values = {}
        for name, site in self._prototype_sites():
            with ExitStack() as stack:
                for frame in site["cond_indep_stack"]:
                    stack.enter_context(plates[frame.name])
                posterior = self._posterior(name).to_event(site["fn"].event_dim)
                values[name] = pyro.sample(name, posterior)
        return values

    def kl(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """From site name to the KL divergence from posterior to prior of every element, in nats.

        The result has no gradient. Use `ClosedFormELBO.parts` to differentiate the loss.

        Args:
            args, kwargs: the arguments of the model. They are needed only if a prior is learned or
                depends on other sites of the guide. In the latter case, the result is for one draw.

        Raises:
            ValueError: the prior of a site is not constant, and the arguments are missing, the
                prior depends on a site that is not in the guide, or the site is in a subsampled
                plate.
        """
        with torch.no_grad():
            priors = self.priors(*args, **kwargs)
            return {name: kl_divergence(q, priors[name]) for name, q in self.posteriors().items()}

    def priors(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """From site name to the prior of the site, a distribution of the shape of the site.

        Args:
            args, kwargs: as for `kl`.

        Raises:
            ValueError: as for `kl`.
        """
        learned = [name for name, prior in self._constant_priors.items() if prior is None]
        priors = {**self._constant_priors, **self._priors_at(learned, args, kwargs)}
        for name, prior in priors.items():
            shape = _get(self.locs, name).shape
            if prior.batch_shape != shape:
                first = {k: x.flatten()[:1] for k, x in _parameters(prior).items()}
                if any(bool((x != first[k]).any()) for k, x in _parameters(prior).items()):
                    raise ValueError(
                        f"the prior of site {name!r} differs by element, and the site is in a "
                        "subsampled plate, so kl() knows only the prior of the subsample"
                    )
                priors[name] = type(prior)(**{k: x[0] for k, x in first.items()}).expand(shape)
        return priors

    def _priors_at(self, names: Sequence[str], args: Any, kwargs: Any) -> dict[str, Any]:
        """The priors of some sites for one draw of the guide."""
        if not names:
            return {}
        if not args and not kwargs and self._takes_arguments:
            raise ValueError(
                f"the prior of site {names[0]!r} is learned or depends on other sites: call kl() "
                "with the arguments of the model"
            )
        with poutine.block():
            drawn = poutine.trace(self).get_trace(*args, **kwargs)
            replayed = poutine.replay(self.model, trace=drawn)
            first, second = (poutine.trace(replayed).get_trace(*args, **kwargs) for _ in range(2))
        priors = {}
        for name in names:
            priors[name], other = (base_of(trace.nodes[name]["fn"]) for trace in (first, second))
            if not _equal(priors[name], other):
                raise ValueError(
                    f"the prior of site {name!r} depends on a site that this guide does not have, "
                    "so kl() cannot compute its KL divergence: use ClosedFormELBO instead"
                )
        return priors


def single_bounds(name: str, low: Any, high: Any) -> tuple[float, float]:
    """The bounds of a site as two numbers.

    Raises:
        ValueError: the bounds differ between elements.
    """
    low, high = (x if isinstance(x, Tensor) else torch.tensor(x, device="cpu") for x in (low, high))
    if bool((low != low.min()).any()) or bool((high != high.min()).any()):
        raise ValueError(
            f"the bounds of site {name!r} differ by element; expected one pair of bounds"
        )
    return float(low.min()), float(high.min())


def check_names(given: Initial, sites: Mapping[str, Any]) -> None:
    """Raise ValueError if initial values name a site that does not exist."""
    for name in given if isinstance(given, Mapping) else ():
        if name not in sites:
            raise ValueError(
                f"there is no site {name!r}, for which an initial value is given; the sites are "
                f"{', '.join(sites)}"
            )


def initial_value(
    given: Initial, default: Any, name: str, like: Tensor, shape: list[int]
) -> Tensor:
    """The initial values of a site, or the default if `given` does not name it, as a new tensor."""
    value = given.get(name, default) if isinstance(given, Mapping) else given
    value = torch.as_tensor(value, dtype=like.dtype, device=like.device).detach()
    try:
        return value.expand(shape).clone()
    except RuntimeError as error:
        raise ValueError(
            f"the initial value of site {name!r} has shape {list(value.shape)}; expected one that "
            f"broadcasts to {shape}"
        ) from error


def base_of(distribution: Any) -> Any:
    """The distribution without `to_event` and `mask`."""
    while isinstance(distribution, (dist.Independent, dist.MaskedDistribution)):
        distribution = distribution.base_dist
    return distribution


def _parameters(distribution: Any) -> dict[str, Tensor]:
    return {name: getattr(distribution, name) for name in distribution.arg_constraints}


def _equal(first: Any, second: Any) -> bool:
    """Whether two distributions have the same type and parameters."""
    theirs = _parameters(second) if type(first) is type(second) else {}
    return bool(theirs) and all(torch.equal(x, theirs[k]) for k, x in _parameters(first).items())


def _is_constant(first: Any, second: Any) -> bool:
    """Whether a prior is the same in two runs of a model, without learned parameters."""
    learned = any(x.requires_grad for x in _parameters(first).values())
    return not learned and _equal(first, second)


def _have_constant_bounds(first: Any, second: Any) -> bool:
    """Whether the support of a site is the same in two runs of a model, and not learned."""
    for name in ("lower_bound", "upper_bound"):
        one, other = (getattr(prior.support, name, None) for prior in (first, second))
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            if one.requires_grad or not torch.equal(one, other):
                return False
        elif one != other:
            return False
    return True


def _parent(root: PyroModule, name: str) -> tuple[PyroModule, str]:
    """The module that owns the parameter with a dotted name, and the last part of the name.

    Missing modules are created. The names of sites may nest (``fc1`` and ``fc1.lora``), so a module
    can have a parameter and a child with the same name. `getattr` does not distinguish them.
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
    """Register a parameter under a dotted name in nested modules, as the guides of Pyro do."""
    module, leaf = _parent(root, name)
    child = module._modules.pop(leaf, None)  # setting the parameter would delete it
    setattr(module, leaf, PyroParam(value, constraints.real, event_dim))
    if child is not None:
        module._modules[leaf] = child


def _get(root: PyroModule, name: str) -> Tensor:
    """The parameter with a dotted name."""
    module, leaf = _parent(root, name)
    value: Tensor = getattr(module, leaf)
    return value
