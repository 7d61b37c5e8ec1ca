"""Make the same discrete choices in the masked and in the cut network.

The two networks compute the same function up to rounding errors. Rounding can decide which of two
equal scores is among the top k, or which of two boxes suppresses the other. The outputs would then
differ, although the cut is right.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_sbp.gates.functions import operation_name, tensors_in
from pyro_sbp.gates.nested import map_tensors
from pyro_sbp.gates.surgery import EXACT, relative_difference

__all__ = ["Decisions"]

_NAMES = (
    *("topk", "sort", "argsort", "msort", "max", "min", "argmax", "argmin", "kthvalue", "median"),
    *("nanmedian", "mode", "round", "floor", "ceil", "trunc"),
)
_CHOOSING = frozenset(
    {
        *(getattr(torch, name) for name in _NAMES),
        *(getattr(Tensor, name) for name in _NAMES),
        *(F.max_pool1d_with_indices, F.max_pool2d_with_indices, F.max_pool3d_with_indices),
        *(F.adaptive_max_pool1d_with_indices, F.adaptive_max_pool2d_with_indices),
        F.adaptive_max_pool3d_with_indices,
    }
)
_NMS = "torchvision::nms"


class Decisions:
    """Record the choices of one network, and repeat them in another one for equal arguments.

    The choices are repeated in the order in which they were recorded. Arguments count as equal if
    their `relative_difference` is at most `EXACT`. Results are copied when they are recorded and
    when they are repeated, because a network may change them in place.

    Attributes:
        taken: for each choice, the function, the tensors in its arguments, and its result.
    """

    def __init__(self) -> None:
        self.taken: list[tuple[Any, list[Tensor], Any]] = []

    def recorded(self) -> TorchFunctionMode:
        """The context for the call of the first network, whose choices are recorded."""
        return _Recording(self.taken)

    def repeated(self) -> TorchFunctionMode:
        """The context for the call of the second network, which repeats the choices."""
        return _Repeating(self.taken)


def _chooses(func: Any) -> bool:
    """Whether the result of a function depends on a discrete choice."""
    if func in _CHOOSING:
        return True
    return operation_name(func) == _NMS


class _Recording(TorchFunctionMode):
    def __init__(self, taken: list[tuple[Any, list[Tensor], Any]]) -> None:
        super().__init__()
        self.taken = taken

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x.clone() for x in tensors_in((args, kwargs))] if _chooses(func) else []
        out = func(*args, **kwargs)
        if given:
            self.taken.append((func, given, map_tensors(Tensor.clone, out)))
        return out


class _Repeating(TorchFunctionMode):
    def __init__(self, taken: list[tuple[Any, list[Tensor], Any]]) -> None:
        super().__init__()
        self.waiting = list(taken)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _chooses(func) or not self.waiting:
            return func(*args, **kwargs)
        known, given, out = self.waiting.pop(0)
        now = list(tensors_in((args, kwargs)))
        if known is not func or [x.shape for x in given] != [x.shape for x in now]:
            return func(*args, **kwargs)
        if not relative_difference(given, now) <= EXACT:
            return func(*args, **kwargs)
        return map_tensors(Tensor.clone, out)
