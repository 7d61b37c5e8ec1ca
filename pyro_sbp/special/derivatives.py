"""Values whose derivatives are known in closed form, as functions for autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx

__all__ = [
    "Saved",
    "Second",
    "attach",
    "common_shape",
    "constant",
    "has_shape",
    "is_tracked",
    "may_look",
    "without_copies",
]

#: From the inputs to the rows of the matrix of second derivatives.
Second = Callable[..., Sequence[Sequence[Tensor]]]


class Saved(Protocol):
    """The context of a backward pass: torch's own annotation allows for one tensor only."""

    needs_input_grad: tuple[bool, ...]
    second: Second | None

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...


class _Attach(torch.autograd.Function):
    """The first argument as a function of inputs, whose derivatives follow them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, second: Second | None, *inputs_and_derivatives: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(
        ctx: FunctionCtx, inputs: tuple[Tensor, Second | None, *tuple[Tensor, ...]], output: Tensor
    ) -> None:
        ctx.second = inputs[1]  # type: ignore[attr-defined]  # contexts take any attribute
        ctx.save_for_backward(*inputs[2:])
        ctx.save_for_forward(*inputs[2:])

    @staticmethod
    def backward(ctx: Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
        derivatives = _derivatives(ctx, differentiable=torch.is_grad_enabled())
        needed = ctx.needs_input_grad[2:]
        grads = (grad * d if needs else None for d, needs in zip(derivatives, needed, strict=False))
        return None, None, *grads, *(None,) * len(derivatives)


class _AttachForward(_Attach):
    """The same with forward mode, which torch.compile does not take."""

    @staticmethod
    def jvp(ctx: Saved, *tangents: Tensor | None) -> Tensor:
        derivatives = _derivatives(ctx, differentiable=True)
        terms = [t * d for t, d in zip(tangents[2:], derivatives, strict=False) if t is not None]
        return torch.stack(terms).sum(0) if terms else torch.zeros_like(derivatives[0])


def _derivatives(ctx: Saved, differentiable: bool) -> Sequence[Tensor]:
    saved = ctx.saved_tensors
    inputs, derivatives = saved[: len(saved) // 2], saved[len(saved) // 2 :]
    if not differentiable:
        return derivatives
    if ctx.second is None:
        return [_OnceDifferentiable.apply(d, *inputs) for d in derivatives]
    inputs = tuple(x.to(torch.float64) for x in inputs)
    rows = ctx.second(*inputs)
    return [
        attach(d, *zip(inputs, row, strict=True)) for d, row in zip(derivatives, rows, strict=True)
    ]


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
        raise RuntimeError(_NO_SECOND)

    @staticmethod
    def jvp(ctx: Saved, *tangents: Tensor | None) -> Tensor:
        raise RuntimeError(_NO_SECOND)


_NO_SECOND = (
    "pyro_sbp.special is once differentiable: no second derivatives but those of the log density"
)


def attach(value: Tensor, *pairs: tuple[Tensor, Tensor], second: Second | None = None) -> Tensor:
    """``value`` as a function of inputs, from pairs (input, derivative of value in it).

    Inputs expand to the shape of the value; their gradients add up over the copies. ``second``
    takes the inputs and returns the rows of second derivatives, of the shape of the value.

    Raises:
        RuntimeError: in a backward pass that asks for derivatives that are not given.
    """
    untracked = (x if is_tracked(x) else without_copies(x) for x, _ in pairs)
    # Gradients of copies add up in float64: in float32 those of opposite signs would lose digits.
    shape = value.shape
    inputs = [
        x if has_shape(x, shape) and not _is_parameter(x) else _wide(x).expand(shape)
        for x in untracked
    ]
    derivatives = [d if has_shape(d, shape) else d.expand(shape) for _, d in pairs]
    if not torch.compiler.is_compiling():
        return _AttachForward.apply(value, second, *inputs, *derivatives)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return _Attach.apply(value, None, *inputs, *derivatives)
    return value


def _is_parameter(x: Tensor) -> bool:
    """Whether ``x`` may be changed in place before the backward pass, as parameters are."""
    return x.requires_grad and x.is_leaf


def _wide(x: Tensor) -> Tensor:
    """A copy of a parameter in float64, or another tensor in float64."""
    return x.to(torch.float64, copy=_is_parameter(x))


def common_shape(*tensors: Tensor) -> torch.Size:
    """The shape that tensors broadcast to."""
    # torch's own function takes as long as ten small operations.
    shapes = [x.shape for x in tensors if x.ndim] or [torch.Size(())]
    if not torch.jit.is_tracing() and all(shape == shapes[0] for shape in shapes):
        return shapes[0]
    return torch.broadcast_shapes(*shapes)


def has_shape(x: Tensor, shape: torch.Size) -> bool:
    """Whether ``x`` needs no expanding; never in a trace, which records sizes."""
    return not torch.jit.is_tracing() and x.shape == shape


def constant(x: Tensor) -> Tensor:
    """``x`` in float64 without its derivatives: no_grad() leaves forward mode on."""
    return x.detach().to(torch.float64)


def is_tracked(x: Tensor) -> bool:
    """Whether a derivative in ``x`` may be asked for."""
    if x.requires_grad or torch.compiler.is_compiling():
        return x.requires_grad
    # torch.func hides from the inner transforms what the outer ones ask for.
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(x)
    return wrapped or forward_ad.unpack_dual(x).tangent is not None


def may_look(x: Tensor) -> bool:
    """Whether Python may choose by the values of ``x``: on a CPU, with nothing that records them.

    A trace or a compiled graph would hold for the values of one call only, and vmap has several.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)


def without_copies(x: Tensor) -> Tensor:
    """One of every dimension that `expand` made: the copies need no computing of their own."""
    for dim in range(x.ndim):
        if x.stride(dim) == 0 and x.size(dim) > 1:
            x = x.narrow(dim, 0, 1)
    return x
