"""An ELBO of closed-form KLs whose parts can be looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.elbo import ELBO
from torch import Tensor
from torch.distributions import kl_divergence

__all__ = ["ClosedFormELBO", "Parts"]


class Parts(NamedTuple):
    """The parts of a loss over the whole data set, in nats, scalars; the KL with its weights."""

    nll: Tensor
    kl: Tensor

    @property
    def loss(self) -> Tensor:
        """Negative log-likelihood and KL together."""
        return self.nll + self.kl


class ClosedFormELBO(ELBO):
    """The negative ELBO of a mean-field guide, of `TraceMeanField_ELBO`'s value.

    It never falls back to Monte Carlo: where a site has no registered KL it raises. And it gives
    the loss in parts.
    """

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(model, trace=guide_trace)
        return poutine.trace(replayed).get_trace(*args, **kwargs), guide_trace

    def parts(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Parts:
        """One draw of the loss: negative log-likelihood and weighted KL.

        Raises:
            NotImplementedError: a site has no closed-form KL, or is not in the guide.
        """
        model_trace, guide_trace = self._get_trace(model, guide, args, kwargs)
        nll: Any = 0.0
        kl: Any = 0.0
        for name, site in model_trace.nodes.items():
            if site["type"] != "sample" or type(site["fn"]).__name__ == "_Subsample":
                continue
            if site["is_observed"]:
                log_prob = site["fn"].log_prob(site["value"])
                nll = nll - scale_and_mask(log_prob, site["scale"], site["mask"]).sum()
                continue
            if name not in guide_trace.nodes:
                raise NotImplementedError(f"site {name!r} is not in the guide")
            q = guide_trace.nodes[name]
            site_kl = kl_divergence(q["fn"], site["fn"])
            kl = kl + scale_and_mask(site_kl, q["scale"], q["mask"]).sum()
        return Parts(torch.as_tensor(nll), torch.as_tensor(kl))

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss as a scalar tensor to differentiate, the mean over `num_particles` draws."""
        draws = [self.parts(model, guide, *args, **kwargs).loss for _ in range(self.num_particles)]
        return torch.stack(draws).mean()

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss as a number."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss as a number; its gradients are added to those of the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        return float(loss.detach())
