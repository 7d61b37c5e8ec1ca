"""The terms of the loss of a `GatedModel` and its own guide, computed without traces.

On a small network, tracing model and guide takes about half as long as the step of the network. The
traces are needed only if effect handlers are active, or if the network or the likelihood contains
sample sites.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_sbp.distributions import TruncatedLogNormal
from pyro_sbp.models.gated_guide import TruncatedLogNormalGuide
from pyro_sbp.models.gated_model import GatedModel
from pyro_sbp.models.sites import batch_size, check_observed

__all__ = ["untraced_kl", "untraced_terms"]


class _Sites(Messenger):
    """Record whether sample sites occur."""

    seen = False

    def _pyro_sample(self, msg: Any) -> None:
        self.seen = True


def untraced_terms(
    model: Any, guide: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """The negative log-likelihood and the weighted KL divergence of one draw of the guide.

    For the same state of the random number generator, they equal those of the traces.

    Args:
        model, guide: the Pyro model and its guide.
        args, kwargs: the arguments of the model.

    Returns:
        The two scalars in nats, or None if the traces are needed: model and guide are not a
        `GatedModel` and the `TruncatedLogNormalGuide` made for it, a method or a hook of the user
        changes them, an effect handler is active, there are no labels, the network or the
        likelihood contains sample sites, or the likelihood does not have one value per example.

    Raises:
        ValueError: the minibatch is empty, or the shapes of the likelihood or of the labels are
            wrong.
    """
    if kwargs or len(args) != 2 or args[1] is None:
        return None
    if not _are_plain(model, guide) or model.has_sites_inside:
        return None
    x, y = args
    size = batch_size(x)
    with guide._pyro_context:
        q = guide.joint_posterior()
    if q is None:
        return None
    with model._pyro_context:
        gated = model.gated  # Pyro records the parameters of the network here
        with _Sites() as sites:
            likelihood = model.likelihood(gated(x, _draw(model, q, size)))
            known = isinstance(likelihood, TorchDistributionMixin)
            log_prob = None
            if known and not sites.seen:
                check_observed(likelihood, size, y)
                log_prob = likelihood.log_prob(y)
    if sites.seen:
        model.has_sites_inside = True  # do not compute the network twice in the next steps
    if log_prob is None or sites.seen or list(log_prob.shape) != [size]:
        return None
    return log_prob.sum() * (-model.num_data / size), _weighted_kl(model, q)


def untraced_kl(model: Any, guide: Any) -> Tensor | None:
    """The weighted KL divergence, without a draw of the guide.

    It has the value and the gradient of the term `kl` of `ClosedFormELBO.parts`.

    Args:
        model, guide: the Pyro model and its guide.

    Returns:
        A scalar in nats, or None if the traces are needed: model and guide are not a `GatedModel`
        and the `TruncatedLogNormalGuide` made for it, a method or a hook of the user changes them,
        or an effect handler is active.
    """
    if not _are_plain(model, guide):
        return None
    with guide._pyro_context:
        q = guide.joint_posterior()
    return None if q is None else _weighted_kl(model, q)


def _are_plain(model: Any, guide: Any) -> bool:
    """Whether a call of model and guide does what their classes define, and nothing else."""
    if type(model) is not GatedModel or type(guide) is not TruncatedLogNormalGuide:
        return False
    if guide.model is not model or am_i_wrapped():
        return False
    methods = ("forward", "sample_sites", "prior")
    changed = any(name in vars(m) for m in (model, guide) for name in methods)
    return not changed and not any(_has_hooks(m) for m in (model, guide))


def _has_hooks(module: Any) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


def _draw(model: GatedModel, q: TruncatedLogNormal, size: int) -> dict[str, Tensor]:
    """Theta of every gate, as `GatedModel.sample_sites` draws it."""
    names, sizes = [gate.name for gate in model.gates], [gate.size for gate in model.gates]
    if model.noise_per == "batch":
        return dict(zip(names, q.rsample().split(sizes), strict=True))
    draws = (part.rsample([size]) for part in q.split(sizes))
    return dict(zip(names, draws, strict=True))


def _weighted_kl(model: GatedModel, q: TruncatedLogNormal) -> Tensor:
    """The sum of the KL divergences of all gates with their weights."""
    kl = kl_divergence(q, model.joint_prior())
    weights = [model.kl_scale[gate.name] for gate in model.gates]
    if len(set(weights)) == 1 and weights[0]:
        return kl.sum() * weights[0]
    of_gates = zip(weights, kl.split([gate.size for gate in model.gates]), strict=True)
    # A weight of 0 masks a gate: its divergence need not be finite.
    terms = [of_gate.sum() * weight for weight, of_gate in of_gates if weight]
    return sum(terms[1:], terms[0]) if terms else kl.new_zeros(())
