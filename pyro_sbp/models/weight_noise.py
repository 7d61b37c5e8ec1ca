"""Noise on single weights, drawn in the activations: local reparameterization.

The output of a layer that is linear in normal weights is normal: of mean f(x, loc) and variance
f(x^2, variance). To draw it for every example and output costs two calls of the layer and has far
less variance than to draw the weights (arXiv 1506.02557; arXiv 1701.05369, section 4.3).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode

from pyro_sbp.gates.folding import call, evaluating, repeatable
from pyro_sbp.gates.layers import is_linear_in_weight, serves
from pyro_sbp.special.derivatives import Saved

__all__ = ["LOG_ALPHA_RANGE", "NoisyWeights", "find_weights", "unflat", "within_range"]

#: The range of log alpha (arXiv 1701.05369, section 5).
LOG_ALPHA_RANGE = (-8.0, 8.0)
#: Where the input of a layer is zero it has no noise, and the root no slope.
TINY = 1e-16


class _Noise(torch.autograd.Function):
    """A draw of normals by mean and variance, with its gradient by hand: half of the memory."""

    @staticmethod
    def forward(ctx: FunctionCtx, mean: Tensor, variance: Tensor) -> Tensor:
        scale = variance.clamp_min(TINY).sqrt_()
        # In one stretch, whatever the layout: only so are normals drawn several at a time.
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
    """Whether a tensor has its elements in one stretch, in some order."""
    stride = 1
    for step, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and step != stride:
            return False
        stride *= size
    return True


class _Substitution(TorchFunctionMode):
    """Calls of layers, each known by its weight, with another weight, and with noise of it."""

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
    """Input, weight, bias and what else is given by place; those given by name are taken out."""
    names = ("input", "weight", "bias")
    first = [*args[:3], *(given.pop(name, None) for name in names[len(args[:3]) :])]
    return [*first, *args[3:]]


def find_weights(net: nn.Module, example_input: Any) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers whose weights can be noisy, by name, and why others cannot.

    Args:
        net: the network.
        example_input: a batch of its inputs, on which it is called once.

    Returns:
        Dense and convolutional layers, transposed ones too, and why the
        other layers cannot have noise.
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
            raise ValueError("the network is a single layer: give torch.nn.Sequential(layer)")
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
                "it is called several times, for each of which its noise would be another"
                if mode.served[name]
                else "its weight is used in a way that noise does not follow"
            )
    return layers, not_prunable


class _AtMost(torch.autograd.Function):
    """The lesser of two tensors, with a gradient for the first where it is that.

    `torch.minimum` would keep the first for its gradient, which is to be raised in place.
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
    """Log variances of weights with log alpha in `LOG_ALPHA_RANGE`.

    Those under it are raised in place. Those over it count as the upper end and get no gradient,
    but stay as they are: a mean that passes through zero must not leave a weight without noise
    behind.
    """
    low, high = LOG_ALPHA_RANGE
    with torch.no_grad():
        bound = mean.square().clamp_min_(TINY).log_().add_(low)
        torch.maximum(log_variance, bound, out=log_variance)
        bound.add_(high - low)
    return _AtMost.apply(log_variance, bound)


def _flat(layer: str) -> str:
    """The name of a layer as that of a parameter, which has no dots."""
    return layer.replace(".", "/")


def unflat(name: str) -> str:
    """The layer of a parameter's name."""
    return name.replace("/", ".")


class NoisyWeights(nn.Module):
    """A network whose weights are normal: a function of the input and of their means.

    Args:
        net: the network; its parameters are shared, its weights the means.
        layers: the names of its layers with noise, from `find_weights`.
        init_log_scale: the initial log standard deviation of every weight.

    Attributes:
        log_variances: a parameter for every weight, under the name of its layer with / for dots.
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
        """The weights, by layer."""
        return {name: self.net.get_parameter(f"{name}.weight") for name in self.layers}

    def in_range(self) -> dict[str, Tensor]:
        """The log variances by layer, see `within_range`."""
        return {
            name: within_range(self.log_variances[_flat(name)], weight)
            for name, weight in self.means().items()
        }

    def forward(
        self, x: Any, means: Mapping[str, Tensor], log_variances: Mapping[str, Tensor] | None
    ) -> Any:
        """Call the network on `x` with weights of these means.

        Args:
            x: the network's input: a tensor, a tuple of positional arguments, or a mapping of named
                arguments.
            means: from layer to its weight.
            log_variances: by layer, to draw the layers' outputs; None leaves these at the means'.
        """
        layers = {name: self.net.get_submodule(name) for name in self.layers}
        variances = None
        if log_variances is not None:
            variances = {name: value.exp() for name, value in log_variances.items()}
        with _Substitution(layers, means, variances):
            return call(self.net, x)
