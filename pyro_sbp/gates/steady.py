"""Call a network with random numbers and a precision that do not depend on the width of its layers.

A network that draws one random number for each unit draws other numbers after units were removed.
A network that casts to float32 rounds its values. Both would look like differences that the cut
has caused.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["eager", "repeatable"]

#: The dtypes and the methods that are replaced by float64.
_NARROW = frozenset({torch.float32, torch.float16, torch.bfloat16})
_CASTS = frozenset({Tensor.float, Tensor.half, Tensor.bfloat16})
#: The names of tensor types that `Tensor.type` accepts.
_TYPES = ("torch.FloatTensor", "torch.HalfTensor", "torch.BFloat16Tensor")
_NEW = frozenset({torch.rand, torch.randn})
_LIKE = frozenset({torch.rand_like, torch.randn_like})
_IN_PLACE = {
    getattr(Tensor, name): name
    for name in ("uniform_", "normal_", "exponential_", "cauchy_", "log_normal_", "geometric_")
}
_DROPOUTS = frozenset(
    {
        *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout),
        *(F.feature_alpha_dropout, torch.dropout, torch.dropout_, torch.alpha_dropout),
        *(torch.feature_dropout, torch.feature_alpha_dropout),
    }
)
_BERNOULLI = frozenset({torch.bernoulli, Tensor.bernoulli, Tensor.bernoulli_})
#: Other random functions. They draw from a seed, and the elements of a result differ.
_OTHERS = frozenset(
    {
        *(torch.randint, torch.randint_like, torch.randperm, torch.multinomial),
        *(Tensor.multinomial, torch.poisson, Tensor.random_),
    }
)


@contextmanager
def repeatable(dtype: torch.dtype) -> Iterator[None]:
    """A context in which the calls of a network are reproducible for any width of its layers.

    - Random numbers are the same each time. All elements of a uniform, normal or similar random
      tensor come from the same random number, so they do not depend on the width of a layer. The
      number differs between the function calls of a network. Integers, permutations, multinomial
      and Poisson samples are only drawn from a fixed seed, so they can depend on the width.
    - Active dropout has no effect.
    - New tensors have the given `dtype` by default. If it is float64, casts to a lower precision
      give float64.
    - Compiled networks run eagerly.

    Afterwards, the default dtype and the random states of torch (on the CPU), NumPy and Python are
    restored.

    Args:
        dtype: the default dtype of torch in the context.
    """
    before = torch.get_default_dtype()
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        torch.set_default_dtype(dtype)
        try:
            with eager(), _Steady(dtype):
                yield
        finally:
            torch.set_default_dtype(before)
            random.setstate(states[0])
            np.random.set_state(states[1])


def eager() -> AbstractContextManager[Any]:
    """A context in which compiled networks run eagerly, so that their functions can be observed."""
    if "torch._dynamo" not in sys.modules or torch.compiler.is_compiling():
        return nullcontext()  # nothing is compiled, and importing torch._dynamo takes seconds
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


class _Steady(TorchFunctionMode):
    """Fill random tensors from one random number, and replace casts to a lower precision.

    Args:
        dtype: the precision. Casts are replaced only if it is float64.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.draws = 0
        self.rules: dict[Any, Callable[..., Any]] = {
            **dict.fromkeys(_NEW, self._new),
            **dict.fromkeys(_LIKE, self._like),
            **dict.fromkeys(_IN_PLACE, self._in_place),
            **dict.fromkeys(_DROPOUTS, _without_dropout),
            **dict.fromkeys(_BERNOULLI, self._bernoulli),
            **dict.fromkeys(_OTHERS, self._seeded),
            torch.normal: self._normal,
            F.gumbel_softmax: _without_gumbel,
            F.rrelu: _leaky,
            F.scaled_dot_product_attention: _without_attention_dropout,
        }
        if dtype == torch.float64:
            self.rules |= dict.fromkeys(_CASTS, lambda func, x, **_: x.double())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # `Tensor.view` with a dtype reinterprets bits, and is no cast.
        if self.dtype == torch.float64 and func is not Tensor.view:
            if any(type(value) is torch.dtype or isinstance(value, str | type) for value in args):
                args = tuple(map(_widened, args))
            if "dtype" in kwargs:
                kwargs = {**kwargs, "dtype": _widened(kwargs["dtype"])}
        rule = self.rules.get(func)
        if rule is None:
            return func(*args, **kwargs)
        if not args and "input" in kwargs:
            kwargs = dict(kwargs)
            args = (kwargs.pop("input"),)
        return rule(func, *args, **kwargs)

    def _seed(self) -> None:
        self.draws += 1
        torch.random.default_generator.manual_seed(self.draws)

    def _seeded(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        self._seed()
        return func(*args, **kwargs)

    def _new(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        out: Tensor = func(*args, **kwargs)
        self._seed()
        return out.detach().copy_(func(1, dtype=out.dtype, device=out.device))

    def _like(self, func: Any, x: Any, **kwargs: Any) -> Any:
        out: Tensor = func(x, **kwargs)
        self._seed()
        return out.detach().copy_(func(out.new_empty(1)))

    def _in_place(self, func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("generator", None)
        self._seed()
        return x.copy_(func(x.new_empty(1), *args, **kwargs))

    def _uniform(self) -> float:
        self._seed()
        return float(torch.rand((), dtype=torch.float64, device="cpu"))

    def _bernoulli(self, func: Any, x: Any, p: Any = None, **kwargs: Any) -> Any:
        p = kwargs.get("p", p)
        chance = (0.5 if func is Tensor.bernoulli_ else x) if p is None else p
        chance = torch.as_tensor(chance, dtype=x.dtype, device=x.device)
        drawn = (self._uniform() < chance).to(x.dtype).where(~chance.isnan(), torch.nan)
        return x.copy_(drawn) if func is Tensor.bernoulli_ else drawn.expand(x.shape).clone()

    def _normal(self, func: Any, mean: Any, std: Any = 1.0, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(mean, Tensor) and not isinstance(std, Tensor):
            out: Tensor = func(mean, std, *args, **kwargs)
            self._seed()
            return out.copy_(func(mean, std, (1,)))
        self._seed()
        like = mean if isinstance(mean, Tensor) else std
        return mean + std * torch.randn((), dtype=like.dtype, device=like.device)


def _widened(value: Any) -> Any:
    """Replace a dtype or tensor type of a lower precision by that of float64."""
    if type(value) is torch.dtype:
        return torch.float64 if value in _NARROW else value
    if isinstance(value, type) and f"{value.__module__}.{value.__name__}" in _TYPES:
        return torch.float64
    return "torch.DoubleTensor" if isinstance(value, str) and value in _TYPES else value


def _without_dropout(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Replace dropout by its mean, which is the input."""
    return func(x, 0.0, False)


def _without_gumbel(
    func: Any, logits: Any, tau: float = 1, hard: bool = False, eps: float = 0, dim: int = -1
) -> Any:
    """Replace Gumbel softmax by softmax, because equal noise on all logits would not change it."""
    soft = (logits / tau).softmax(dim)
    if not hard:
        return soft
    return torch.zeros_like(soft).scatter_(dim, soft.argmax(dim, keepdim=True), 1.0)


def _leaky(
    func: Any,
    x: Any,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Any:
    return func(x, lower, upper, False, inplace)


def _without_attention_dropout(func: Any, *args: Any, **kwargs: Mapping[str, Any]) -> Any:
    args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
    return func(*args, **({**kwargs, "dropout_p": 0.0} if "dropout_p" in kwargs else kwargs))
