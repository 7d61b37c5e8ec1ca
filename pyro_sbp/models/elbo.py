"""An ELBO with closed-form KL divergences that returns its two terms separately."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.elbo import ELBO
from pyro.infer.trace_mean_field_elbo import _check_mean_field_requirement
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape, warn_if_nan
from torch import Tensor
from torch.distributions import Independent, kl_divergence

from pyro_sbp.models.untraced import untraced_terms

__all__ = ["ClosedFormELBO", "Parts"]


class Parts(NamedTuple):
    """The two terms of the negative ELBO over the whole data set, in nats.

    Attributes:
        nll: the negative log-likelihood, a scalar.
        kl: the sum of the KL divergences with their weights, a scalar.
    """

    nll: Tensor
    kl: Tensor

    @property
    def loss(self) -> Tensor:
        """The negative ELBO, `nll` + `kl`."""
        return self.nll + self.kl


class ClosedFormELBO(ELBO):
    """The negative ELBO of a mean-field guide, with closed-form KL divergences.

    For the same draws it has the same value as `TraceMeanField_ELBO`. If validation is enabled, it
    makes the same checks of models and guides. Unlike `TraceMeanField_ELBO`, it does not fall back
    to a Monte Carlo estimate: a site without a registered KL divergence raises
    NotImplementedError. Auxiliary sites of a guide, such as those of Pyro's autoguides, contribute
    their log density, as in `TraceMeanField_ELBO`.

    A `GatedModel` and its own guide are traced only if an effect handler is active, a method or a
    hook changes them, or the network or the likelihood contains sample sites.

    Args:
        num_particles: the number of draws to average over.
        max_plate_nesting: as for `pyro.infer.ELBO`.
        vectorize_particles, retain_graph: as for `pyro.infer.ELBO`.
    """

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        unwrapped = poutine.unwrap(guide)
        if isinstance(unwrapped, poutine.messenger.Messenger):  # the guide is an effect handler
            guide(*args, **kwargs)
            traced: Any = unwrapped
            model_trace, guide_trace = traced.get_traces()
        else:
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            replayed = poutine.replay(model, trace=guide_trace)
            model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
        if is_validation_enabled():
            check_model_guide_match(model_trace, guide_trace, self.max_plate_nesting)
        model_trace, guide_trace = map(prune_subsample_sites, (model_trace, guide_trace))
        if is_validation_enabled():
            _check_mean_field_requirement(model_trace, guide_trace)
        return model_trace, guide_trace

    def parts(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Parts:
        """The negative log-likelihood and the weighted KL divergence, averaged over the draws.

        Args:
            model: the Pyro model.
            guide: its guide.
            args, kwargs: the arguments of the model and the guide.

        Raises:
            NotImplementedError: a site has no closed-form KL divergence, or its posterior is not
                reparameterized.
            ValueError: a latent site of the model is not in the guide; a site of the guide is not
                in the model and not marked as auxiliary; or, with validation enabled, the shape of
                a site does not fit its plates.
        """
        parts: Any = self._untraced(model, guide, args, kwargs) or [
            self._of_traces(*traces) for traces in self._get_traces(model, guide, args, kwargs)
        ]
        nll, kl = (sum(of) / self.num_particles for of in zip(*parts, strict=True))
        # If a trace has no site of a kind, the sum is the number 0.
        values = (x if isinstance(x, Tensor) else torch.tensor(x, device="cpu") for x in (nll, kl))
        return Parts(*values)

    def _untraced(
        self, model: Any, guide: Any, args: Any, kwargs: Any
    ) -> list[tuple[Tensor, Tensor]]:
        """The terms of every draw without traces, or an empty list if the traces are needed."""
        if self.vectorize_particles or self.max_plate_nesting < 1:
            return []
        found = []
        for _ in range(self.num_particles):
            terms = untraced_terms(model, guide, args, kwargs)
            if terms is None:
                return []
            found.append(terms)
        return found

    def _of_traces(self, model_trace: Any, guide_trace: Any) -> tuple[Any, Any]:
        """The negative log-likelihood and the KL divergence of one pair of traces."""
        nll: Any = 0.0
        kl: Any = 0.0
        for name, site in _samples(model_trace):
            if site["is_observed"]:
                log_prob = site["fn"].log_prob(site["value"])
                nll = nll - self._total(log_prob, site, site)
                continue
            if name not in guide_trace.nodes:
                raise ValueError(f"the latent site {name!r} of the model is not in the guide")
            q = guide_trace.nodes[name]
            _check_reparameterized(name, q)
            kl = kl + self._total(_divergence(q["fn"], site["fn"]), q, site)
        for name, q in _samples(guide_trace):
            if name in model_trace.nodes:
                continue
            if not q["infer"].get("is_auxiliary"):
                raise ValueError(
                    f"the site {name!r} of the guide is not in the model; if other sites of the "
                    'guide are computed from it, mark it with infer={"is_auxiliary": True}'
                )
            _check_reparameterized(name, q)
            kl = kl + self._total(q["fn"].log_prob(q["value"]), q, q)
        return nll, kl

    def _total(self, values: Any, weighed_as: Any, site: Any) -> Tensor:
        """Check the shape of the values of a site, and sum them with its scale and mask."""
        if is_validation_enabled():
            for checked in (site, weighed_as):
                check_site_shape({**checked, "log_prob": values}, self.max_plate_nesting)
        return scale_and_mask(values, weighed_as["scale"], weighed_as["mask"]).sum()

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The negative ELBO as a differentiable scalar tensor, averaged over the draws."""
        return self.parts(model, guide, *args, **kwargs).loss

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The negative ELBO as a number."""
        with torch.no_grad():
            return _checked_number(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The negative ELBO as a number, after adding its gradients to those of the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return _checked_number(loss.detach())


def _checked_number(loss: Tensor) -> float:
    """The loss as a number, with Pyro's warning if it is NaN."""
    warn_if_nan(loss, "loss")
    return float(loss)


def _samples(trace: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The sample sites of a trace with their names."""
    return ((name, site) for name, site in trace.nodes.items() if site["type"] == "sample")


def _divergence(q: Any, p: Any) -> Tensor:
    """The KL divergence. For distributions that a plate has expanded, events are summed once."""
    events = getattr(q, "reinterpreted_batch_ndims", 0)
    if not (isinstance(q, Independent) and isinstance(p, Independent)) or (
        events != p.reinterpreted_batch_ndims
    ):
        return kl_divergence(q, p)
    kl = single = _divergence(q.base_dist, p.base_dist)
    for dim in range(kl.ndim - events):
        if kl.stride(dim) == 0 and kl.size(dim) > 1:
            single = single.narrow(dim, 0, 1)
    shape = kl.shape[: kl.ndim - events]
    return single.sum(list(range(-events, 0))).expand(shape) if events else kl


def _check_reparameterized(name: str, site: Any) -> None:
    if not site["fn"].has_rsample:
        raise NotImplementedError(
            f"the posterior of site {name!r} is not reparameterized "
            f"({type(site['fn']).__name__} has no rsample), so the gradients would be wrong"
        )
