"""Noise on weights, drawn in the outputs of the layers (local reparameterization).

If the weights of a linear layer f have independent normal distributions, its outputs are normal
with the mean f(x, loc) and the variance f(x^2, variance). Drawing the outputs for every example
takes two calls of the layer. The gradients have far less variance than with drawn weights (arXiv
1506.02557; arXiv 1701.05369, section 4.3).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode

from pyro_sbp.gates.calling import call, evaluating
from pyro_sbp.gates.layers import is_linear_in_weight, serves
from pyro_sbp.gates.steady import repeatable
from pyro_sbp.special.derivatives import Saved

__all__ = ["LOG_ALPHA_RANGE", "NoisyWeights", "find_weights", "unflat", "within_range"]

#: The range of log alpha (arXiv 1701.05369, section 5).
LOG_ALPHA_RANGE = (-8.0, 8.0)
#: The smallest variance. Where the input of a layer is zero, the variance would be zero, and its
#: square root would have no derivative.
TINY = 1e-16


class _Noise(torch.autograd.Function):
    """A sample of normal distributions, with an analytic gradient that needs half of the memory."""

    @staticmethod
    def forward(ctx: FunctionCtx, mean: Tensor, variance: Tensor) -> Tensor:
        scale = variance.clamp_min(TINY).sqrt_()
        # Draw into contiguous memory for every layout, because torch vectorises only such draws.
        noise = torch.randn(mean.numel(), device=mean.device).to(mean.dtype)
        noise = noise.as_strided(mean.shape, mean.stride()) if _dense(mean) else noise.view_as(mean)
        drawn = torch.addcmul(mean, scale, noise)
        ctx.save_for_backward(noise.div_(scale))
        return drawn

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Saved, grad: Tensor) -> tuple[Tensor, Tensor]:
        (ratio,) = ctx.saved_tensors
        return grad, (grad * ratio).mul_(0.5)


def _dense(x: Tensor) -> bool:
    """Whether the elements of a tensor fill one block of memory without gaps, in any order."""
    stride = 1
    for step, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and step != stride:
            return False
        stride *= size
    return True


class _Substitution(TorchFunctionMode):
    """A mode that calls layers, recognised by their weights, with other weights and with noise."""

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        means: Mapping[str, Tensor],
        variances: Mapping[str, Tensor] | None,
    ) -> None:
        super().__init__()
        self.names = {id(layer.weight): name for name, layer in layers.items()}
        self.layers, self.means, self.variances = layers, means, variances
        self.served: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        weight = args[1] if len(args) > 1 else given.get("weight")
        name = self.names.get(id(weight))
        if name is None or not serves(func, self.layers[name]):
            return func(*args, **given)
        self.served[name] += 1
        x, _, bias, *rest = _positional(args, given)
        mean = func(x, self.means[name], bias, *rest, **given)
        if self.variances is None:
            return mean
        variance = func(x.square(), self.variances[name], None, *rest, **given)
        return _Noise.apply(mean, variance)


def _positional(args: Sequence[Any], given: dict[str, Any]) -> list[Any]:
    """Input, weight, bias and further positional arguments. Named ones are removed from `given`."""
    names = ("input", "weight", "bias")
    first = [*args[:3], *(given.pop(name, None) for name in names[len(args[:3]) :])]
    return [*first, *args[3:]]


def find_weights(net: nn.Module, example_input: Any) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Find the layers whose weights can have noise.

    Args:
        net: the network.
        example_input: an input of the network, on which it is called once.

    Returns:
        From name to layer: dense and convolutional layers, transposed ones included. And from the
        name of each other layer with a weight to the reason why it cannot have noise.

    Raises:
        ValueError: the network is a single layer.
    """
    layers: dict[str, nn.Module] = {}
    not_prunable = {}
    holders: dict[int, list[str]] = {}
    for name, module in net.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(name)
    for name, module in net.named_modules():
        if not is_linear_in_weight(module):
            continue
        weight = module._parameters.get("weight")
        others = [other for other in holders.get(id(weight), ()) if other != name]
        if weight is None:
            not_prunable[name] = "its weight is computed from other tensors"
        elif others:
            not_prunable[name] = f"shares its weight with {others[0]}"
        elif not name:
            raise ValueError("the network is a single layer: wrap it in torch.nn.Sequential(layer)")
        else:
            layers[name] = module
    means = {name: net.get_parameter(f"{name}.weight") for name in layers}
    mode = _Substitution(layers, means, None)
    with torch.no_grad(), evaluating(net), repeatable(torch.get_default_dtype()), mode:
        call(net, example_input)
    for name in list(layers):
        if mode.served[name] != 1:
            del layers[name]
            not_prunable[name] = (
                "it is called several times, and its noise would differ between the calls"
                if mode.served[name]
                else "its weight is used by an operation to which noise cannot be added"
            )
    return layers, not_prunable


class _AtMost(torch.autograd.Function):
    """The elementwise minimum of two tensors, with a gradient only for the first one.

    `torch.minimum` would save the first tensor for the backward pass, but it is changed in place.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, most: Tensor) -> Tensor:
        ctx.save_for_backward(x <= most)
        return torch.minimum(x, most)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Saved, grad: Tensor) -> tuple[Tensor, None]:
        (less,) = ctx.saved_tensors
        return grad * less, None


def within_range(log_variance: Tensor, mean: Tensor) -> Tensor:
    """Clamp log variances of weights so that log alpha is in `LOG_ALPHA_RANGE`.

    Values below the range are raised in place. Values above the range are replaced by the upper
    bound in the result, without a gradient, and are not changed in place: while the mean of a
    weight passes through zero, its log variance must not be lowered permanently.

    Args:
        log_variance: the log variances.
        mean: the means of the weights, of the same shape.
    """
    low, high = LOG_ALPHA_RANGE
    with torch.no_grad():
        bound = mean.square().clamp_min_(TINY).log_().add_(low)
        torch.maximum(log_variance, bound, out=log_variance)
        bound.add_(high - low)
    return _AtMost.apply(log_variance, bound)


def _flat(layer: str) -> str:
    """The name of a layer as a name of a parameter, which must not contain dots."""
    return layer.replace(".", "/")


def unflat(name: str) -> str:
    """The name of the layer for the name of a parameter, see `_flat`."""
    return name.replace("/", ".")


class NoisyWeights(nn.Module):
    """A network with normally distributed weights, as a function of the input and their means.

    Args:
        net: the network. Its parameters are shared, and its weights are the means.
        layers: the names of the layers with noise, from `find_weights`.
        init_log_scale: the initial log standard deviation of every weight.

    Attributes:
        log_variances: a parameter for each layer, of the shape of its weight. Its name is the name
            of the layer with slashes instead of dots.
    """

    def __init__(self, net: nn.Module, layers: Sequence[str], init_log_scale: float = -5.0) -> None:
        super().__init__()
        self.net = net
        self.layers = tuple(layers)
        self.log_variances = nn.ParameterDict()
        for name in layers:
            weight = net.get_parameter(f"{name}.weight").detach()
            value = torch.full_like(weight, 2 * init_log_scale)
            self.log_variances[_flat(name)] = nn.Parameter(value)

    def means(self) -> dict[str, Tensor]:
        """From the name of a layer to the mean of its weight."""
        return {name: self.net.get_parameter(f"{name}.weight") for name in self.layers}

    def in_range(self) -> dict[str, Tensor]:
        """From the name of a layer to its log variances, clamped by `within_range`."""
        return {
            name: within_range(self.log_variances[_flat(name)], weight)
            for name, weight in self.means().items()
        }

    def forward(
        self, x: Any, means: Mapping[str, Tensor], log_variances: Mapping[str, Tensor] | None
    ) -> Any:
        """Call the network with the given weights.

        Args:
            x: the input of the network: a tensor, a tuple of positional arguments, or a mapping of
                named arguments.
            means: from the name of a layer to the mean of its weight.
            log_variances: from the name of a layer to the log variances of its weight, with which
                the outputs are drawn. None means no noise.
        """
        layers = {name: self.net.get_submodule(name) for name in self.layers}
        variances = None
        if log_variances is not None:
            variances = {name: value.exp() for name, value in log_variances.items()}
        with _Substitution(layers, means, variances):
            return call(self.net, x)
