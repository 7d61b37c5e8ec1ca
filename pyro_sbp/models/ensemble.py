"""The posterior predictive of a gated network, an ensemble over draws of theta."""

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

from pyro_sbp.gates.folding import call, evaluating
from pyro_sbp.models.calibration import BINS, Measured, measured, sums
from pyro_sbp.models.draws import draw_sites
from pyro_sbp.models.gated_model import GatedModel

__all__ = ["Ensemble"]


class Ensemble:
    """The networks that draws of theta make of a gated network.

    Called on an input it gives the logarithms of the predictive probabilities ``[batch, classes]``,
    which are the mean over the draws; they can take the place of logits. The draws are made once,
    so that every example is seen by the same networks. The network is called in evaluation mode.

    Args:
        model: the gated network.
        guide: its posterior, also an `AutoGuideList` that has a guide for further sites of the
            likelihood.
        example_input: an input of the network.
        num_samples: the number of draws.

    Attributes:
        draws: from site name to a tensor ``[num_samples, *site shape]``; of a gate
            ``[num_samples, units]``.
        mean: from site name to its value in the deterministic network, E[theta] of a gate; of a
            site whose guide gives no mean, the median.

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
        """The logarithms of the predictive probabilities of an input, ``[batch, classes]``.

        Raises:
            ValueError: the likelihood of the model is not categorical.
        """
        members = torch.stack([_log_probabilities(fn) for fn in self._likelihoods(x)])
        return members.logsumexp(0) - math.log(len(members))

    def deterministic(self, x: Any) -> Tensor:
        """The logarithms of the probabilities ``[batch, classes]`` of the network with the noise at
        its mean.

        Raises:
            ValueError: the likelihood of the model is not categorical.
        """
        with torch.no_grad(), evaluating(self.model):
            return _log_probabilities(self._likelihood(x, self.mean))

    def log_likelihood(self, x: Any, y: Tensor) -> Tensor:
        """The log density of every label under every draw, ``[num_samples, batch]``, in nats.

        The negative log-likelihood of an example under the posterior predictive is the logarithm of
        the number of draws less the `logsumexp` over them. ArviZ takes it as
        ``log_likelihood={"obs": value[None].numpy()}``.
        """
        return torch.stack([fn.log_prob(y) for fn in self._likelihoods(x)])

    def compare(
        self, batches: Iterable[tuple[Any, Tensor]], **networks: Callable[..., Tensor]
    ) -> dict[str, Measured]:
        """Error, negative log-likelihood and calibration of the ensemble, of the deterministic
        network, and of others, on the same data.

        Args:
            batches: pairs of an input and labels ``[batch]``, such as a `DataLoader` of test data.
            networks: further networks or functions from inputs to logits, by name, such as
                ``pruned=small``. Modules are called in evaluation mode.

        Returns:
            The values by name, ``ensemble``, ``deterministic``, and the names of `networks`.

        Raises:
            ValueError: the likelihood of the model is not categorical, there is no batch, or a
                network has a name of the two.
        """
        taken = {"ensemble", "deterministic"} & set(networks)
        if taken:
            raise ValueError(f"a network is named {taken.pop()!r}, as one of this method: rename")
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
                    # Not `call` for our own, which hand the input on as it is.
                    logits = call(net, x) if name in networks else net(x)
                    totals[name] += sums(logits, y).cpu()
        if not count:
            raise ValueError("there is no batch to measure networks on")
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
        # A likelihood may have sites of its own, such as a scale.
        return poutine.condition(self.model.likelihood, data=dict(sites))(
            self.model.gated(x, theta)
        )


def _log_probabilities(likelihood: Any) -> Tensor:
    if not isinstance(likelihood, dist.Categorical):
        raise ValueError(
            f"the likelihood is {type(likelihood).__name__}; probabilities of classes are those of "
            "a Categorical: for another likelihood use log_likelihood"
        )
    logits: Tensor = likelihood.logits
    return logits.log_softmax(-1)


@torch.no_grad()
def _means(guide: Any, example_input: Any) -> dict[str, Tensor]:
    """The mean of every site of a guide; the median where it gives no mean."""
    values: dict[str, Tensor] = {}
    parts: list[Any] = list(guide) if isinstance(guide, AutoGuideList) else [guide]
    for part in parts:
        values |= part.mean() if hasattr(part, "mean") else part.median(example_input)
    return values
