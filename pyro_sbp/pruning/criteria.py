"""The scores of units, one function for each criterion.

References:
    [1] Neklyudov et al. 2017, arXiv 1705.07283, section 4: the signal-to-noise ratio.
    [2] Wright et al. 2024, arXiv 2406.01345: Bayesian model reduction for structured pruning.

Bayesian model reduction [2] compares the prior p of theta with a reduced prior p~, under which the
unit is removed. By Bayes' rule, dF = log E_q[p~ / p] is the log evidence of the reduced model minus
that of the full model. It is computed from the posterior q and the two priors; the reduced model is
not trained. The score is -dF in nats, the log Bayes factor for keeping the unit. It is 0 if the
posterior equals the prior.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_sbp import special
from pyro_sbp.distributions import TruncatedLogNormal, TruncatedLogUniform
from pyro_sbp.models.gated_model import theta_prior
from pyro_sbp.recipes.criteria import find_criterion

__all__ = ["LOG_GONE", "SCORES", "check_prior", "guide_scores", "scores"]

Prior = TruncatedLogUniform | TruncatedLogNormal
#: The log of 2^-8, the resolution of 8 bits. BMRS_U counts a unit with a smaller theta as removed
#: [2].
LOG_GONE = -8 * math.log(2)


def _snr(posterior: Any, prior: Any) -> Tensor:
    """E[theta] / sd[theta] [1]."""
    snr: Tensor = posterior.snr
    return snr


def _bmrs_n(posterior: TruncatedLogNormal, prior: Prior) -> Tensor:
    """-dF of BMRS_N [2], whose reduced prior is a spike at the lower bound of theta.

    In the limit of a narrow spike, dF is the log of the ratio of the densities of q and p at the
    bound (the Savage-Dickey ratio). The densities of log theta and of theta have the same ratio.
    """
    return _log_density_at_low(prior) - _log_density_at_low(posterior)


def _log_density_at_low(theta: Prior) -> Tensor:
    return theta.base_dist.log_prob(theta.log_low)


def _bmrs_u(posterior: TruncatedLogNormal, prior: Prior) -> Tensor:
    """-dF of BMRS_U [2], whose reduced prior is p where theta < 2^-8 and zero elsewhere.

    So dF = log q(theta < 2^-8) - log p(theta < 2^-8). Unlike in [2], where the region begins at
    2^-23, it begins at the lower bound, so a unit with a smaller theta counts as removed too.
    """
    below = torch.tensor(LOG_GONE, dtype=torch.float64, device=posterior.loc.device)
    return (_log_below(prior, below) - _log_below(posterior, below)).to(posterior.loc)


def _log_below(theta: Prior, value: Tensor) -> Tensor:
    """The log probability that log theta is below a value, in float64 and without underflow."""
    if isinstance(theta, TruncatedLogUniform):
        width = theta.log_high.double() - theta.log_low.double()
        return ((value - theta.log_low.double()) / width).log()
    parameters = theta.loc, theta.scale, theta.log_low
    part = special.log_normalizer(*parameters, value.expand(theta.loc.shape))
    return part - special.log_normalizer(*parameters, theta.log_high)


#: A function from the posterior and the prior of the units of a gate to their scores, ``[units]``.
SCORES: dict[str, Callable[[Any, Any], Tensor]] = {
    "snr": _snr,
    "bmrs-n": _bmrs_n,
    "bmrs-u": _bmrs_u,
}


def scores(
    posteriors: Mapping[str, Any], priors: Mapping[str, Any], criterion: str = "snr"
) -> dict[str, Tensor]:
    """The score of every element by a criterion, from site name to a tensor of the site's shape.

    Args:
        posteriors, priors: the distributions, by site. BMRS needs `TruncatedLogNormal` posteriors.
        criterion: a name of `pyro_sbp.recipes.criteria.CRITERIA`.

    Raises:
        ValueError: the criterion is unknown.
    """
    score = SCORES[find_criterion(criterion).name]
    with torch.no_grad():
        return {name: score(q, priors[name]).detach() for name, q in posteriors.items()}


def guide_scores(guide: Any, criterion: str = "snr") -> dict[str, Tensor]:
    """The score of every element of a guide by a criterion, from site name to a tensor.

    Args:
        guide: a guide with `snr` for the signal-to-noise ratio, or with `posteriors` and `priors`
            for BMRS.
        criterion: as for `scores`.

    Raises:
        ValueError: the criterion is unknown.
    """
    if find_criterion(criterion).name == "snr":
        ratios: dict[str, Tensor] = guide.snr()
        return ratios
    return scores(guide.posteriors(), guide.priors(), criterion)


def check_prior(scale: float | None, threshold: float, criterion: str = "snr") -> None:
    """Raise ValueError if a unit whose posterior equals its prior would reach the threshold.

    Args:
        scale: the `prior_scale` of `GatedModel`.
        threshold, criterion: the threshold and the criterion that decide which units are kept.
    """
    if scale is None:
        return
    prior = {"": theta_prior(scale, 1, torch.zeros((), device="cpu"))}
    score = float(scores(prior, prior, criterion)[""])
    if 0 < threshold <= score:
        raise ValueError(
            f"prior_scale {scale:g} is too narrow for the threshold {threshold:g}: a unit whose "
            f"posterior equals this prior has a {find_criterion(criterion).title} of {score:.3g} "
            "and would be kept"
        )
