"""A network with noise on its weights, as a Pyro model (sparse variational dropout)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_sbp.deprecation import renamed_attribute, warn_renamed, with_new_names
from pyro_sbp.distributions import ImproperLogUniform
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
from pyro_sbp.models.weight_noise import NoisyWeights, find_weights

__all__ = ["SparseModel"]


class _Once:
    """A value that is dropped when its owner is copied or saved."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def __reduce__(self) -> tuple[Any, ...]:
        return _Once, ()


class SparseModel(CopiedUnderOwnName, PyroModule):
    """A network with noise on its weights, as a Pyro model of labelled data.

    The weight of every dense and convolutional layer is a sample site with the name of the layer
    and an improper log-uniform prior (arXiv 1701.05369). The labels are the site ``obs``. Call
    ``model(x, y)`` on a minibatch to observe the labels, whose log-likelihood is scaled to the
    whole data set. Call ``model(x)`` to sample labels. The network itself is not changed: calls of
    its layers are intercepted.

    Args:
        net: the network. Its parameters are shared, and its weights are the posterior means.
        example_input: an input of the network, on which it is called once.
        num_data: the number of examples in the whole training set.
        noise: "local" draws the outputs of the layers for every example, from the distribution that
            the posterior of the weights implies (local reparameterization). The sites are then the
            means of the weights. "weight" draws every weight once for a minibatch, which gives
            gradients of higher variance.
        likelihood: from the output of the network to the distribution of the labels, with the
            ``batch_shape`` ``[batch]``.
        kl_scale: the weight of the KL divergence: a number for all layers, or a mapping from layer
            name to the weight (1 for layers that are not named).
        exact_kl: whether to compute the exact KL divergence instead of the approximation of the
            paper.
        init_log_scale: the initial log standard deviation of every weight.

    Attributes:
        not_prunable: from the name of each layer whose weight has no noise to the reason.

    Raises:
        ValueError: no layer can have noise; `num_data`, `noise` or `kl_scale` is out of range;
            `kl_scale` names an unknown layer; or a layer has the name of another site or plate of
            the model: data, obs.
    """

    def __init__(
        self,
        net: nn.Module,
        example_input: Any,
        num_data: int,
        noise: Literal["local", "weight"] = "local",
        likelihood: Callable[[Any], Any] = categorical,
        kl_scale: float | Mapping[str, float] = 1.0,
        exact_kl: bool = False,
        init_log_scale: float = -5.0,
    ) -> None:
        super().__init__(name=unique_name("SparseModel"))
        check_num_data(num_data)
        if noise not in ("local", "weight"):
            raise ValueError(f'noise is {noise!r}; expected "local" or "weight"')
        layers, self.not_prunable = find_weights(net, example_input)
        if not layers:
            raise ValueError(
                f"no layer of {type(net).__name__} can have noise: {self.not_prunable}"
            )
        taken = {"data", "obs"} & set(layers)
        if taken:
            raise ValueError(f"a layer is named {taken.pop()!r}, which the model uses: rename it")
        self.noisy = NoisyWeights(net, list(layers), init_log_scale)
        self.num_data = num_data
        self.noise = noise
        self.likelihood = likelihood
        self.exact_kl = exact_kl
        self._handed_on = _Once()
        self.kl_scale = scales_of(list(layers), kl_scale, "layer")

    left_alone = renamed_attribute("SparseModel", "left_alone", "not_prunable")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(with_new_names(state, {"left_alone": "not_prunable"}))

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers whose weights are sample sites."""
        return self.noisy.layers

    def sample_sites(self, distribution: Callable[[str], Any]) -> dict[str, Tensor]:
        """Sample the weight of every layer, with the weights of the KL divergences.

        The model and the guide both call it.

        Args:
            distribution: from the name of a layer to a distribution of the shape of its weight.

        Returns:
            From the name of a layer to its weight.
        """
        weights = {}
        for name in self.layers:
            q = distribution(name)
            with weighted(self.kl_scale[name]):
                weights[name] = pyro.sample(name, q.to_event(len(q.batch_shape)))
        return weights

    def prior(self, name: str) -> ImproperLogUniform:
        """The prior of the weight of a layer, with the shape of the weight as batch shape."""
        weight = self.noisy.net.get_parameter(f"{name}.weight")
        return ImproperLogUniform(weight.shape, self.exact_kl, start=weight)

    def set_log_variances(self, log_variances: dict[str, Tensor]) -> None:
        """Reuse the log variances that the guide has computed, in the next call only.

        Args:
            log_variances: from the name of a layer to a tensor of the shape of its weight, from
                `NoisyWeights.in_range`.
        """
        self._handed_on = _Once((self._state(), log_variances))

    def hand_on(self, log_variances: dict[str, Tensor]) -> None:
        """Deprecated name of `set_log_variances`."""
        warn_renamed("SparseModel.hand_on", "set_log_variances")
        self.set_log_variances(log_variances)

    def _state(self) -> tuple[Any, ...]:
        """A key that changes with the parameters, and with whether gradients are enabled."""
        versions = (parameter._version for parameter in self.noisy.parameters())
        return (torch.is_grad_enabled(), *versions)

    def forward(self, x: Any, y: Any = None) -> Any:
        """Sample the weights, call the network, and sample or observe the labels.

        Args:
            x: the input of the network: a tensor, a tuple of positional arguments, or a mapping of
                named arguments.
            y: the labels, or None to sample them.

        Returns:
            The labels, of batch shape ``[batch]``.
        """
        batch_size(x)  # refuses an empty minibatch, before the network or the likelihood fails
        weights = self.sample_sites(self.prior)
        for name, mean in self.noisy.means().items():
            if weights[name].shape != mean.shape:
                raise ValueError(
                    f"the weight of {name!r} has shape {list(weights[name].shape)}; expected "
                    f"{list(mean.shape)}: SparseModel supports one draw at a time, so use "
                    "Predictive(parallel=False) and vectorize_particles=False"
                )
        state, log_variances = self._handed_on.value or (None, None)
        self._handed_on = _Once()
        if self.noise == "weight":
            log_variances = None
        elif state != self._state():
            log_variances = self.noisy.in_range()
        output = self.noisy(x, weights, log_variances)
        return observe(self.likelihood(output), self.num_data, x, y)
