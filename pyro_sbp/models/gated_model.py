"""A network with gates as a Pyro model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_sbp.distributions import TruncatedLogNormal, TruncatedLogUniform
from pyro_sbp.gates.folding import Gate, GatedNetwork, tensors_of
from pyro_sbp.gates.probing import Gates
from pyro_sbp.models.sites import (
    CopiedUnderOwnName,
    categorical,
    check_num_data,
    observe,
    scales_of,
    unique_name,
    weighted,
)

__all__ = ["GatedModel", "theta_prior", "widest"]


#: The support of log theta in the paper's experiments (arXiv 1705.07283, section 5).
LOG_LOW, LOG_HIGH = -20.0, 0.0


class GatedModel(CopiedUnderOwnName, PyroModule):
    """A network with multiplicative noise on its units, as a Pyro model of labelled data.

    Every gate is a sample site of its name and shape ``[units]`` with a truncated log-uniform prior
    (arXiv 1705.07283), or one that leans to zero; the labels are the site ``obs``. Called as
    ``model(x, y)`` on a minibatch, whose log-likelihood counts for all of the data, or as
    ``model(x)`` to predict.

    Args:
        net: the network; its parameters are shared, not copied.
        gates: where noise stands, from `find_gates`.
        num_data: how many examples the whole data set has.
        noise_per: "batch" draws theta once for the minibatch, for weights or inputs of readers;
            "example" draws it for every example, which has less variance and costs more. The input
            then needs the batch in dimension 0.
        likelihood: from the network's output to the distribution of the labels, with
            ``batch_shape`` ``[batch]``.
        kl_scale: the weight of the KL of every gate, or of each by name (1 where it is not named).
            With weights other than 1 the loss is not the negative ELBO; with one under 1 it is no
            bound on the evidence either.
        prior_scale: None for the truncated log-uniform prior; a number for a truncated log-normal
            one whose mode is the lower bound, log theta = -20, and whose scale it is: the smaller,
            the nearer to a point mass there, the larger, the nearer to the log-uniform.

    Raises:
        ValueError: there are no gates, `num_data`, `noise_per`, `kl_scale` or `prior_scale` is out
            of range, `kl_scale` names no gate, or a gate has a name of the model's own: data,
            noise, obs.
    """

    def __init__(
        self,
        net: nn.Module,
        gates: Sequence[Gate],
        num_data: int,
        noise_per: Literal["batch", "example"] = "batch",
        likelihood: Callable[[Any], Any] = categorical,
        kl_scale: float | Mapping[str, float] = 1.0,
        prior_scale: float | None = None,
    ) -> None:
        super().__init__(name=unique_name("GatedModel"))
        check_num_data(num_data)
        if noise_per not in ("batch", "example"):
            raise ValueError(f'noise_per is {noise_per!r}; expected "batch" or "example"')
        if not gates:
            why = f": {gates.reasons()}" if isinstance(gates, Gates) else ""
            raise ValueError(f"there are no gates; gates.not_prunable of find_gates says why{why}")
        taken = {"data", "noise", "obs"} & {gate.name for gate in gates}
        if taken:
            raise ValueError(f"a gate is named {taken.pop()!r}, as a site of the model is: rename")
        if prior_scale is not None and not 0 < prior_scale < float("inf"):
            raise ValueError(f"prior_scale is {prior_scale}; expected a number > 0, or None")
        self.gated = GatedNetwork(net, gates)
        self.gates = self.gated.gates
        self._sizes = {gate.name: gate.size for gate in gates}
        self.num_data = num_data
        self.noise_per = noise_per
        self.likelihood = likelihood
        self.kl_scale = scales_of(list(self._sizes), kl_scale)
        self.prior_scale = prior_scale
        self._priors: dict[Any, Any] = {}

    def sample_sites(self, distribution: Callable[[str], Any], x: Any) -> dict[str, Tensor]:
        """Sample theta of every gate; model and guide share it, and with it plates and weights.

        Args:
            distribution: from the name of a gate to a distribution of batch shape ``[units]``.
            x: the network's input.

        Returns:
            From gate name to theta, ``[units]`` or ``[batch, units]``.
        """
        theta = {}
        with ExitStack() as stack:
            if self.noise_per == "example":
                size = len(next(tensors_of(x)))
                stack.enter_context(pyro.plate("noise", size, dim=-1))
                stack.enter_context(poutine.scale(scale=1 / size))
            for gate in self.gates:
                with weighted(self.kl_scale[gate.name]):
                    theta[gate.name] = pyro.sample(gate.name, distribution(gate.name).to_event(1))
        return theta

    def prior(self, name: str) -> TruncatedLogUniform | TruncatedLogNormal:
        """The prior of a gate's theta, of batch shape ``[units]``."""
        # Not `self.gated`: Pyro would record all parameters of the network at every access.
        like = next(self._modules["gated"].parameters())  # type: ignore[union-attr]
        modes = torch.get_default_dtype(), torch.is_inference_mode_enabled()
        key = name, self.prior_scale, like.device, Distribution._validate_args, *modes
        if torch.compiler.is_compiling() or key not in self._priors:
            self._priors[key] = theta_prior(self.prior_scale, self._sizes[name], like)
        return self._priors[key]

    def forward(self, x: Any, y: Any = None) -> Any:
        """Sample theta, call the network, and sample or observe the labels, which are returned.

        Several draws of theta at once, as of `Predictive(parallel=True)` or of an ELBO that
        vectorizes its particles, call the network once for each.
        """
        theta = self.sample_sites(self.prior, x)
        # In front of the units: the batch, and plates of draws outside of it. Predictive leaves the
        # batch out if it is of one row.
        outside = list(next(iter(theta.values())).shape[:-1])
        draws = outside[:-1]
        if self.noise_per == "batch" and len(outside) == 1:
            draws = outside
            theta = {name: value.unsqueeze(-2) for name, value in theta.items()}
        output = self.gated(x, theta)
        return observe(self.likelihood(output), self.num_data, x, y, draws)


def theta_prior(
    scale: float | None, size: int, like: Tensor
) -> TruncatedLogUniform | TruncatedLogNormal:
    """The prior of the theta of `size` units, on the device of `like`, by its `prior_scale`."""
    low, high = (torch.full((), bound, device=like.device) for bound in (LOG_LOW, LOG_HIGH))
    if scale is None:
        return TruncatedLogUniform(low, high).expand([size])
    width = torch.full((), scale, device=like.device)
    return TruncatedLogNormal(low, width, low, high).expand([size])


def widest(prior_scale: float | None) -> float:
    """The largest log scale that a posterior needs: it is no wider than its prior."""
    return 5.0 if prior_scale is None else min(5.0, math.log(prior_scale))
