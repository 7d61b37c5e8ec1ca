"""Draws from the posterior of a guide, by site."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuideList
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_sbp.models.site_statistics import SiteStatistics
from pyro_sbp.models.sparse_guide import AdditiveNormalGuide

__all__ = ["draw_sites", "posterior_draws"]


@torch.no_grad()
def draw_sites(guide: Callable[..., Any], num_samples: int, *args: Any) -> dict[str, Tensor]:
    """Independent draws of all sites of a guide, except for auxiliary sites.

    Args:
        guide: the guide.
        num_samples: the number of draws.
        args: the arguments of the model. Autoguides of Pyro and functions need them.

    Returns:
        From site name to a tensor ``[num_samples, *site shape]``. For a gate the shape is
        ``[num_samples, units]``.

    Raises:
        ValueError: `num_samples` is less than 1, or the guide is that of a `SparseModel` with local
            noise, whose sites are the means of the weights.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; expected at least 1")
    parts = list(guide) if isinstance(guide, AutoGuideList) else [guide]
    draws: dict[str, Tensor] = {}
    for part in parts:
        if isinstance(part, AdditiveNormalGuide) and part.model.noise == "local":
            raise ValueError(
                "with local noise the sites of a SparseModel are the means of the weights, not "
                'draws; set model.noise = "weight" to draw weights'
            )
        if isinstance(part, SiteStatistics):
            draws |= {n: q.sample((num_samples,)) for n, q in part.posteriors().items()}
    if all(isinstance(part, SiteStatistics) for part in parts):
        return draws
    traced: dict[str, list[Tensor]] = {}
    for _ in range(num_samples):
        trace = prune_subsample_sites(poutine.trace(guide).get_trace(*args))
        for name in trace.stochastic_nodes:
            site: Any = trace.nodes[name]
            if name not in draws and not site["infer"].get("is_auxiliary"):
                traced.setdefault(name, []).append(site["value"])
    return draws | {name: torch.stack(values) for name, values in traced.items()}


def posterior_draws(
    guide: Callable[..., Any], *args: Any, num_samples: int = 1000, num_chains: int = 1
) -> dict[str, Any]:
    """Posterior draws in the format of ArviZ.

    To convert them, call ``arviz.from_dict(posterior=posterior_draws(guide))``. This function does
    not need ArviZ. The draws are independent, so they can be divided into any number of chains.

    Args:
        guide: a guide of this package, an autoguide of Pyro, or a function.
        args: the arguments of the model. Autoguides of Pyro and functions need them.
        num_samples: the number of draws in each chain.
        num_chains: the number of chains. The diagnostics of ArviZ need at least two.

    Returns:
        From site name to a NumPy array ``[num_chains, num_samples, *site shape]``. For a gate the
        shape is ``[num_chains, num_samples, units]``.

    Raises:
        ValueError: `num_samples` or `num_chains` is less than 1, or the guide is that of a
            `SparseModel` with local noise.
    """
    if num_chains < 1:
        raise ValueError(f"num_chains is {num_chains}; expected at least 1")
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; expected at least 1")
    return {
        name: values.unflatten(0, (num_chains, num_samples)).cpu().numpy()
        for name, values in draw_sites(guide, num_chains * num_samples, *args).items()
    }
