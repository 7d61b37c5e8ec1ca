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
from pyro_sbp.gates.gate import Gate
from pyro_sbp.gates.gated_network import GatedNetwork
from pyro_sbp.gates.probing import Gates
from pyro_sbp.models.sites import (
    CopiedUnderOwnName,
    batch_size,
    categorical,
    check_num_data,
    observe,
    scales_of,
    unique_name,
    weighted,
)

__all__ = ["GatedModel", "theta_prior", "widest"]


#: The support of log theta in the experiments of the paper (arXiv 1705.07283, section 5).
LOG_LOW, LOG_HIGH = -20.0, 0.0


class GatedModel(CopiedUnderOwnName, PyroModule):
    """A network with multiplicative noise on its units, as a Pyro model of labelled data.

    Every gate is a sample site with the name of the gate and the shape ``[units]``. Its prior is
    truncated log-uniform (arXiv 1705.07283), or truncated log-normal if `prior_scale` is given. The
    labels are the site ``obs``. Call ``model(x, y)`` on a minibatch to observe the labels, whose
    log-likelihood is scaled to the whole data set. Call ``model(x)`` to sample labels.

    Args:
        net: the network. Its parameters are shared, not copied.
        gates: its gates, from `find_gates`.
        num_data: the number of examples in the whole training set.
        noise_per: "batch" draws theta once for a minibatch. "example" draws theta for every
            example, which reduces the variance of the gradient but takes longer. The input must
            then have the batch in dimension 0.
        likelihood: from the output of the network to the distribution of the labels, with the
            ``batch_shape`` ``[batch]``. With several draws of theta at once, the output has the
            draws as its first dimensions, and the ``batch_shape`` is ``[draws, batch]``.
        kl_scale: the weight of the KL divergence: a number for all gates, or a mapping from gate
            name to the weight (1 for gates that are not named). If a weight differs from 1, the
            loss is not the negative ELBO. If a weight is less than 1, the loss is not an upper
            bound on the negative log evidence.
        prior_scale: None for the truncated log-uniform prior. A number gives a truncated log-normal
            prior of this scale, whose mode is the lower bound, log theta = -20. A small scale is
            close to a point mass at the lower bound, a large one to the log-uniform prior.

    Raises:
        ValueError: there are no gates; `num_data`, `noise_per`, `kl_scale` or `prior_scale` is out
            of range; `kl_scale` names an unknown gate; or a gate has the name of another site or
            plate of the model: data, noise, obs.
    """

    #: Whether the network or the likelihood is known to contain sample sites.
    has_sites_inside = False

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
            raise ValueError(
                f"there are no gates; find_gates(...).not_prunable has the reasons{why}"
            )
        taken = {"data", "noise", "obs"} & {gate.name for gate in gates}
        if taken:
            raise ValueError(
                f"a gate is named {taken.pop()!r}, which the model uses: rename its layer"
            )
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
        """Sample theta of every gate, within the plates and with the weights of the model.

        The model and the guide both call it.

        Args:
            distribution: from the name of a gate to a distribution of batch shape ``[units]``.
            x: the input of the network.

        Returns:
            From gate name to theta, ``[units]`` or ``[batch, units]``.
        """
        theta = {}
        with ExitStack() as stack:
            if self.noise_per == "example":
                size = batch_size(x)
                stack.enter_context(pyro.plate("noise", size, dim=-1))
                stack.enter_context(poutine.scale(scale=1 / size))
            for gate in self.gates:
                with weighted(self.kl_scale[gate.name]):
                    theta[gate.name] = pyro.sample(gate.name, distribution(gate.name).to_event(1))
        return theta

    def prior(self, name: str) -> TruncatedLogUniform | TruncatedLogNormal:
        """The prior of theta of one gate, of batch shape ``[units]``."""
        return self._prior_of(self._sizes[name])

    def joint_prior(self) -> TruncatedLogUniform | TruncatedLogNormal:
        """The prior of theta of all gates in order, of batch shape ``[units]``."""
        return self._prior_of(sum(self._sizes.values()))

    def _prior_of(self, size: int) -> TruncatedLogUniform | TruncatedLogNormal:
        # Not `self.gated`, because Pyro would record all parameters of the network at every access.
        like = next(self._modules["gated"].parameters())  # type: ignore[union-attr]
        modes = torch.get_default_dtype(), torch.is_inference_mode_enabled()
        key = size, self.prior_scale, like.device, Distribution._validate_args, *modes
        if torch.compiler.is_compiling() or key not in self._priors:
            self._priors[key] = theta_prior(self.prior_scale, size, like)
        return self._priors[key]

    def forward(self, x: Any, y: Any = None) -> Any:
        """Sample theta, call the network, and sample or observe the labels.

        If there are several draws of theta at once (`Predictive(parallel=True)`, or an ELBO with
        vectorized particles), the network is called once for each draw.

        Args:
            x: the input of the network: a tensor, a tuple of positional arguments, or a mapping of
                named arguments.
            y: the labels, or None to sample them.

        Returns:
            The labels, of batch shape ``[batch]``.
        """
        batch_size(x)  # refuses an empty minibatch, before the network or the likelihood fails
        theta = self.sample_sites(self.prior, x)
        # The dimensions before the units are the plates of draws, and then the batch. Predictive
        # omits a batch of one row.
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
    """The prior of theta of `size` units for a `prior_scale`, on the device of `like`."""
    low, high = (torch.full((), bound, device=like.device) for bound in (LOG_LOW, LOG_HIGH))
    if scale is None:
        return TruncatedLogUniform(low, high).expand([size])
    width = torch.full((), scale, device=like.device)
    return TruncatedLogNormal(low, width, low, high).expand([size])


def widest(prior_scale: float | None) -> float:
    """The largest log scale of a posterior, which is not wider than its prior."""
    return 5.0 if prior_scale is None else min(5.0, math.log(prior_scale))
