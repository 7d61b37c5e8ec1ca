"""Values whose derivatives are known in closed form, as functions for autograd."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

__all__ = ["Saved", "attach"]


class Saved(Protocol):
    """The context of a backward pass: torch's own annotation allows for one tensor only."""

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...


class _Attach(torch.autograd.Function):
    """The first argument as a function of inputs, whose derivatives follow them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, *inputs_and_derivatives: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        inputs, derivatives = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        if torch.is_grad_enabled():  # a graph of the gradient is asked for
            derivatives = tuple(_OnceDifferentiable.apply(d, *inputs) for d in derivatives)
        return (None, *(grad * d for d in derivatives), *(None,) * len(inputs))


class _OnceDifferentiable(torch.autograd.Function):
    """The first argument, which depends on the others in a way that is not known."""

    generate_vmap_rule = True

    @staticmethod
    def forward(derivative: Tensor, *inputs: Tensor) -> Tensor:
        return derivative.clone()

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError("pyro_sbp.special is once differentiable: no second derivatives")


def attach(value: Tensor, *pairs: tuple[Tensor, Tensor]) -> Tensor:
    """``value`` as a function of inputs, from pairs (input, derivative of value in it).

    Inputs expand to the shape of the value; their gradients add up over the copies.
    """
    inputs = [x.to(torch.float64).expand(value.shape) for x, _ in pairs]
    return _Attach.apply(value, *inputs, *(d.expand(value.shape) for _, d in pairs))
