"""Attach closed-form derivatives to values, for autograd."""

from __future__ import annotations

import inspect
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

#: A function from the inputs to the rows of the matrix of second derivatives.
Second = Callable[..., Sequence[Sequence[Tensor]]]


class Saved(Protocol):
    """The context of a backward pass. The annotation of torch allows only one saved tensor."""

    needs_input_grad: tuple[bool, ...]
    second: Second | None
    dtype: torch.dtype

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...


class _Attach(torch.autograd.Function):
    """Return the first argument as a function of the inputs, with the given derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, second: Second | None, *inputs_and_derivatives: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(
        ctx: FunctionCtx, inputs: tuple[Tensor, Second | None, *tuple[Tensor, ...]], output: Tensor
    ) -> None:
        # Contexts accept any attribute.
        ctx.second = inputs[1]  # type: ignore[attr-defined]
        ctx.dtype = output.dtype  # type: ignore[attr-defined]
        ctx.save_for_backward(*inputs[2:])
        ctx.save_for_forward(*inputs[2:])

    @staticmethod
    def backward(ctx: Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
        derivatives = _derivatives(ctx, differentiable=torch.is_grad_enabled())
        needed = ctx.needs_input_grad[2:]
        grads = (grad * d if needs else None for d, needs in zip(derivatives, needed, strict=False))
        return None, None, *grads, *(None,) * len(derivatives)


class _AttachForward(_Attach):
    """`_Attach` with forward mode, which torch.compile does not support."""

    @staticmethod
    def jvp(ctx: Saved, *tangents: Tensor | None) -> Tensor:
        derivatives = _derivatives(ctx, differentiable=True)
        terms = [t * d for t, d in zip(tangents[2:], derivatives, strict=False) if t is not None]
        total = torch.stack(terms).sum(0) if terms else torch.zeros_like(derivatives[0])
        return total.to(ctx.dtype)


# torch inspects the signature in every call. Without this attribute, that takes as long as ten
# small operations.
_Attach.forward.__signature__ = inspect.signature(  # type: ignore[attr-defined]
    _Attach.forward
)


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
    """Return the first argument, and raise an error if it is differentiated again."""

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
    "pyro_sbp.special is once differentiable: it has no second derivatives, except for log_density"
)


def attach(value: Tensor, *pairs: tuple[Tensor, Tensor], second: Second | None = None) -> Tensor:
    """Return ``value`` as a differentiable function of inputs with known derivatives.

    Args:
        value: the value, computed without gradients.
        pairs: pairs of an input and the derivative of the value with respect to it. Inputs and
            derivatives broadcast to the shape of the value.
        second: from the inputs to the rows of the matrix of second derivatives, each of the shape
            of the value; None if there are no second derivatives.

    Raises:
        RuntimeError: a backward pass requires second derivatives, and `second` is None.
    """
    untracked = (x if is_tracked(x) else without_copies(x) for x, _ in pairs)
    # Sum the gradients of expanded inputs in float64: float32 would lose digits by cancellation.
    shape = value.shape
    inputs = [_own(x) if has_shape(x, shape) else _wide(x).expand(shape) for x in untracked]
    derivatives = [d if has_shape(d, shape) else d.expand(shape) for _, d in pairs]
    if not torch.compiler.is_compiling():
        return _AttachForward.apply(value, second, *inputs, *derivatives)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return _Attach.apply(value, None, *inputs, *derivatives)
    return value


def _is_parameter(x: Tensor) -> bool:
    """Whether ``x`` may be changed in place before the backward pass, as a parameter may be."""
    return x.requires_grad and x.is_leaf


def _own(x: Tensor) -> Tensor:
    """``x``, or a copy if it is a parameter."""
    return x.clone() if _is_parameter(x) else x


def _wide(x: Tensor) -> Tensor:
    """Convert a tensor to float64. A parameter is always copied."""
    return x.to(torch.float64, copy=_is_parameter(x))


def common_shape(*tensors: Tensor) -> torch.Size:
    """The shape that tensors broadcast to."""
    # torch.broadcast_shapes takes as long as ten small operations.
    shapes = [x.shape for x in tensors if x.ndim] or [torch.Size(())]
    if not torch.jit.is_tracing() and all(shape == shapes[0] for shape in shapes):
        return shapes[0]
    return torch.broadcast_shapes(*shapes)


def has_shape(x: Tensor, shape: torch.Size) -> bool:
    """Whether ``x`` has this shape. It is False in a trace, which would record the sizes."""
    return not torch.jit.is_tracing() and x.shape == shape


def constant(x: Tensor) -> Tensor:
    """``x`` in float64 without derivatives. no_grad() would not disable forward mode."""
    return x.detach().to(torch.float64)


def is_tracked(x: Tensor) -> bool:
    """Whether a derivative with respect to ``x`` may be required."""
    if x.requires_grad or torch.compiler.is_compiling():
        return x.requires_grad
    # Inside torch.func, requires_grad is not visible to inner transforms.
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(x)
    return wrapped or forward_ad.unpack_dual(x).tangent is not None


def may_look(x: Tensor) -> bool:
    """Whether Python code may branch on the values of ``x``.

    This requires a tensor on the CPU outside of traces, compiled graphs and vmap. A trace or a
    compiled graph would be valid only for the recorded values, and under vmap there are several.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)


def without_copies(x: Tensor) -> Tensor:
    """Reduce expanded dimensions to length 1, so that their copies are computed only once."""
    for dim in range(x.ndim):
        if x.stride(dim) == 0 and x.size(dim) > 1:
            x = x.narrow(dim, 0, 1)
    return x
