"""Values whose derivatives are known in closed form, as functions for autograd."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = []


class _Attach(torch.autograd.Function):
    """The first argument, with the gradients of the others given instead of traced."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, *inputs_and_derivatives: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.num_inputs = (len(inputs) - 1) // 2
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad):
        inputs = ctx.saved_tensors[: ctx.num_inputs]
        derivatives = ctx.saved_tensors[ctx.num_inputs :]
        if torch.is_grad_enabled():  # a graph of the gradient is asked for
            derivatives = [_OnceDifferentiable.apply(d, *inputs) for d in derivatives]
        return (None, *(grad * d for d in derivatives), *(None,) * ctx.num_inputs)


class _OnceDifferentiable(torch.autograd.Function):
    """The first argument, that depends on the others in a way that is not known."""

    generate_vmap_rule = True

    @staticmethod
    def forward(derivative: Tensor, *inputs: Tensor) -> Tensor:
        return derivative.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("pyro_sbp.special is once differentiable: no second derivatives")


def attach(value: Tensor, *pairs: tuple[Tensor, Tensor]) -> Tensor:
    """``value`` as a function of inputs, from pairs (input, derivative of value in it).

    Inputs expand to the shape of the value; their gradients add up over the copies.
    """
    inputs = [x.to(torch.float64).expand(value.shape) for x, _ in pairs]
    return _Attach.apply(value, *inputs, *(d.expand(value.shape) for _, d in pairs))
