"""A network with noise on its weights as a Pyro model: sparse variational dropout."""

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
    """A value that copies and files of its owner do not have."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def __reduce__(self) -> tuple[Any, ...]:
        return _Once, ()


class SparseModel(CopiedUnderOwnName, PyroModule):
    """A network with normal posteriors on its weights, as a Pyro model of labelled data.

    The weight of every dense and convolutional layer is a sample site of the layer's name with an
    improper log-uniform prior (arXiv 1701.05369); the labels are the site ``obs``. Called as
    ``model(x, y)`` on a minibatch, whose log-likelihood counts for all of the data, or as
    ``model(x)`` to predict. The network is not changed: noise enters where it calls its layers.

    Args:
        net: the network; its parameters are shared, and its weights are the posterior's means.
        example_input: a batch of its inputs, on which it is called once.
        num_data: how many examples the whole data set has.
        noise: "local" draws the layers' outputs, for every example, from what the weights'
            posterior makes of them (local reparameterization); the sites then hold the means.
            "weight" draws every weight once for the minibatch; gradients have more variance.
        likelihood: from the network's output to the distribution of the labels, with
            ``batch_shape`` ``[batch]``.
        kl_scale: the weight of the KL of every layer, or of each by name (1 where not named).
        exact_kl: take the exact divergence, else the paper's approximation.
        init_log_scale: the initial log standard deviation of every weight.

    Attributes:
        not_prunable: the layers whose weights have no noise, and why.

    Raises:
        ValueError: no layer can have noise, `num_data`, `noise` or `kl_scale` is out of range,
            `kl_scale` names no layer, or a layer has a name of the model's own: data, obs.
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
            raise ValueError(f"no layer of {type(net).__name__} can be sparse: {self.not_prunable}")
        taken = {"data", "obs"} & set(layers)
        if taken:
            raise ValueError(f"a layer is named {taken.pop()!r}, as a site of the model is: rename")
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
        """The layers whose weights are sample sites, by name."""
        return self.noisy.layers

    def sample_sites(self, distribution: Callable[[str], Any]) -> dict[str, Tensor]:
        """Sample the weights of every layer; model and guide share it, and with it KL weights.

        Args:
            distribution: from the name of a layer to a distribution of its weight's shape.
        """
        weights = {}
        for name in self.layers:
            q = distribution(name)
            with weighted(self.kl_scale[name]):
                weights[name] = pyro.sample(name, q.to_event(len(q.batch_shape)))
        return weights

    def prior(self, name: str) -> ImproperLogUniform:
        """The prior of a layer's weights, of batch shape that of its weight."""
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
        """What changes with the parameters, and with whether there are gradients."""
        versions = (parameter._version for parameter in self.noisy.parameters())
        return (torch.is_grad_enabled(), *versions)

    def forward(self, x: Any, y: Any = None) -> Any:
        """Sample the weights, call the network, and sample or observe the labels, which are
        returned."""
        weights = self.sample_sites(self.prior)
        for name, mean in self.noisy.means().items():
            if weights[name].shape != mean.shape:
                raise ValueError(
                    f"the weight of {name!r} has shape {list(weights[name].shape)}; expected "
                    f"{list(mean.shape)}: SparseModel takes one draw at a time, so use "
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
