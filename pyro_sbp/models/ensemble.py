"""The posterior predictive distribution of a gated network, as an ensemble over draws of theta."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuideList
from torch import Tensor, nn

from pyro_sbp.gates.calling import call, evaluating
from pyro_sbp.models.calibration import BINS, Measured, measured, sums
from pyro_sbp.models.draws import draw_sites
from pyro_sbp.models.gated_model import GatedModel

__all__ = ["Ensemble"]


class Ensemble:
    """An ensemble of networks, one for each posterior draw of theta.

    Called on an input, it returns the log predictive probabilities ``[batch, classes]``, where the
    probabilities are averaged over the draws. They can be used as logits. Theta is drawn once, when
    the ensemble is made, so that all inputs pass through the same networks. The network is called
    in evaluation mode.

    Args:
        model: the gated network.
        guide: its guide. If the likelihood has latent sites, an `AutoGuideList` with a guide for
            them.
        example_input: an input of the network.
        num_samples: the number of draws.

    Attributes:
        draws: from site name to a tensor ``[num_samples, *site shape]``. For a gate the shape is
            ``[num_samples, units]``.
        mean: from site name to its value in the deterministic network. This is E[theta] for a gate,
            and the median for a site whose guide has no mean.

    Raises:
        ValueError: `num_samples` is less than 1.
    """

    def __init__(
        self,
        model: GatedModel,
        guide: Callable[..., Any],
        example_input: Any,
        num_samples: int = 30,
    ) -> None:
        self.model = model
        self.draws = draw_sites(guide, num_samples, example_input)
        self.mean = _means(guide, example_input)

    def __len__(self) -> int:
        return len(next(iter(self.draws.values())))

    def __call__(self, x: Any) -> Tensor:
        """The log predictive probabilities for an input, ``[batch, classes]``.

        Raises:
            ValueError: the likelihood of the model is not categorical.
        """
        members = torch.stack([_log_probabilities(fn) for fn in self._likelihoods(x)])
        return members.logsumexp(0) - math.log(len(members))

    def deterministic(self, x: Any) -> Tensor:
        """The log probabilities ``[batch, classes]`` of the network with the noise at its mean.

        Raises:
            ValueError: the likelihood of the model is not categorical.
        """
        with torch.no_grad(), evaluating(self.model):
            return _log_probabilities(self._likelihood(x, self.mean))

    def log_likelihood(self, x: Any, y: Tensor) -> Tensor:
        """The log density in nats of every label under every draw, ``[num_samples, batch]``.

        The negative log-likelihood of an example under the posterior predictive distribution is
        ``log(num_samples) - value.logsumexp(0)``. Pass the value to ArviZ as
        ``log_likelihood={"obs": value[None].numpy()}``.

        Args:
            x: the input of the network.
            y: the labels, as for the likelihood of the model.
        """
        return torch.stack([fn.log_prob(y) for fn in self._likelihoods(x)])

    def compare(
        self, batches: Iterable[tuple[Any, Tensor]], **networks: Callable[..., Tensor]
    ) -> dict[str, Measured]:
        """Compare the ensemble, the deterministic network and other networks on the same data.

        Args:
            batches: pairs of an input and labels ``[batch]``, such as a `DataLoader` of test data.
            networks: other networks, or functions from inputs to logits, by name, such as
                ``pruned=small``. Modules are called in evaluation mode.

        Returns:
            The error, the negative log-likelihood and the calibration, for ``"ensemble"``,
            ``"deterministic"`` and each name of `networks`.

        Raises:
            ValueError: the likelihood of the model is not categorical, there is no batch, or a
                network is named "ensemble" or "deterministic".
        """
        taken = {"ensemble", "deterministic"} & set(networks)
        if taken:
            raise ValueError(
                f"a network is named {taken.pop()!r}, which is a reserved name: rename it"
            )
        own: dict[str, Callable[..., Tensor]] = {
            "ensemble": self,
            "deterministic": self.deterministic,
        }
        all_of_them = own | networks
        zeros = torch.zeros(2 + BINS, dtype=torch.float64, device="cpu")
        totals = {name: zeros.clone() for name in all_of_them}
        count = 0
        with torch.no_grad(), ExitStack() as stack:
            for net in networks.values():
                if isinstance(net, nn.Module):
                    stack.enter_context(evaluating(net))
            for x, y in batches:
                count += len(y)
                for name, net in all_of_them.items():
                    # The two networks of this class unpack the input themselves.
                    logits = call(net, x) if name in networks else net(x)
                    totals[name] += sums(logits, y).cpu()
        if not count:
            raise ValueError("there is no batch: batches is empty")
        return {name: measured(total, count) for name, total in totals.items()}

    def _likelihoods(self, x: Any) -> list[Any]:
        """The distribution of the labels under every draw."""
        with torch.no_grad(), evaluating(self.model):
            return [
                self._likelihood(x, {name: value[index] for name, value in self.draws.items()})
                for index in range(len(self))
            ]

    def _likelihood(self, x: Any, sites: Mapping[str, Tensor]) -> Any:
        theta = {gate.name: sites[gate.name] for gate in self.model.gates}
        # A likelihood may have latent sites, such as a scale.
        return poutine.condition(self.model.likelihood, data=dict(sites))(
            self.model.gated(x, theta)
        )


def _log_probabilities(likelihood: Any) -> Tensor:
    if not isinstance(likelihood, dist.Categorical):
        raise ValueError(
            f"the likelihood is {type(likelihood).__name__}; expected Categorical, which has "
            "probabilities of classes: for other likelihoods use log_likelihood"
        )
    logits: Tensor = likelihood.logits
    return logits.log_softmax(-1)


@torch.no_grad()
def _means(guide: Any, example_input: Any) -> dict[str, Tensor]:
    """The mean of every site of a guide, or the median if its guide has no mean."""
    values: dict[str, Tensor] = {}
    parts: list[Any] = list(guide) if isinstance(guide, AutoGuideList) else [guide]
    for part in parts:
        values |= part.mean() if hasattr(part, "mean") else part.median(example_input)
    return values
