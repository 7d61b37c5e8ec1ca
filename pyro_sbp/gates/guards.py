"""Calls of functions that do not propagate NaN, while a network is probed.

Functions that test for NaN return their results of the first pass. Functions that ignore NaN are
replaced by functions that propagate it. Functions that use their input as positions in memory, or
that raise an error on NaN, are called on finite numbers instead. Then their results are set to NaN:
all of them, or those of the examples that have a NaN position.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_sbp.gates.functions import has_nan, is_inexact, operation_name, tensors_in

__all__ = ["Endless", "Guards"]

#: Functions that test whether numbers are NaN.
_TESTS = frozenset(
    {
        *(torch.isnan, Tensor.isnan, torch.isfinite, Tensor.isfinite),
        *(torch.isinf, Tensor.isinf, torch.isreal, Tensor.isreal),
    }
)
_COMPARISONS = frozenset({torch.ne, Tensor.ne, Tensor.__ne__, torch.eq, Tensor.eq, Tensor.__eq__})
#: Functions that replace NaN by numbers.
_REPLACING = frozenset({torch.nan_to_num, torch.nan_to_num_, Tensor.nan_to_num, Tensor.nan_to_num_})
#: From functions that ignore NaN to functions that compute the same and propagate NaN.
_SKIPPING: dict[Any, Any] = {
    torch.nansum: torch.sum,
    Tensor.nansum: torch.sum,
    torch.nanmean: torch.mean,
    Tensor.nanmean: torch.mean,
}
#: From functions to the position and the name of the argument with the positions to read.
_PLACES: dict[Any, tuple[int, str]] = {
    F.grid_sample: (1, "grid"),
    torch.grid_sampler: (1, "grid"),
    torch.grid_sampler_2d: (1, "grid"),
    torch.grid_sampler_3d: (1, "grid"),
}
#: The same for operations of other packages, by name.
_PLACES_OF_OPERATIONS = {
    "torchvision::deform_conv2d": (2, "offset"),
    "torchvision::roi_align": (1, "rois"),
    "torchvision::roi_pool": (1, "rois"),
    "torchvision::ps_roi_align": (1, "rois"),
    "torchvision::ps_roi_pool": (1, "rois"),
}
#: The namespaces of the operators of torch, which are called as its other functions are.
_OF_TORCH = ("aten::", "prim::", "prims::", "profiler::")
#: A pass may call this many times as many functions as the first pass, and 10,000 more.
_LONGER = 50


class Endless(RuntimeError):
    """A pass calls far more functions than the first pass: a loop does not converge on NaN."""

    def __init__(self) -> None:
        super().__init__("a loop of the network does not end on NaN")


class Guards:
    """Call the functions of a network in the passes of a probe.

    In the first pass, the probe puts no NaN into the network. The results of functions that test
    for NaN are recorded. In later passes, these functions return the recorded results, so that they
    react only to NaN that the network itself has computed.

    Args:
        run: calls a function, given its positional and its named arguments.
    """

    def __init__(self, run: Callable[[Any, Any, Mapping[str, Any]], Any]) -> None:
        self.run = run
        self.found: dict[tuple[Any, int], Tensor] = {}
        self.usual = 0
        self.start(True)

    def start(self, first: bool) -> None:
        """Start a pass.

        Args:
            first: whether it is the first pass.
        """
        self.first = first
        self.calls: Counter[Any] = Counter()
        self.count = 0

    def __call__(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Call a function that is not a layer.

        Raises:
            Endless: the pass has called far more functions than the first pass.
        """
        self.count += 1
        if self.first:
            self.usual = self.count
        elif self.count > _LONGER * self.usual + 10_000:
            raise Endless
        if not _is_special(func):
            return self._ordinary(func, args, kwargs)
        if func in _TESTS:
            return self._test(func, self.run(func, args, kwargs))
        if func in _COMPARISONS and len(args) == 2 and args[0] is args[1]:
            return self._test(func, self.run(func, args, kwargs))
        if func in _REPLACING:
            return self._replace(func, args, kwargs)
        if func in _SKIPPING:
            own = self._test(func, args[0].isnan())
            instead = func if bool(own.any()) else _SKIPPING[func]
            return self.run(instead, args, kwargs)
        if self.first:
            return self.run(func, args, kwargs)
        place = _PLACES.get(func)
        operation = operation_name(func)
        if operation:
            place = _PLACES_OF_OPERATIONS.get(operation)
        if place is not None:
            return self._with_clean_places(func, args, kwargs, place)
        if operation and not operation.startswith(_OF_TORCH):
            return self._on_clean(func, args, kwargs)
        return self._ordinary(func, args, kwargs)

    def _ordinary(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Call a function that either propagates NaN or raises an error on NaN."""
        if self.first:
            return self.run(func, args, kwargs)
        try:
            return self.run(func, args, kwargs)
        except Exception:  # functions of linear algebra, for example, raise an error on NaN
            if not _any_nan(args, kwargs):
                raise
            out = self._on_clean(func, args, kwargs)
            if not _any_nan(out):  # integers, which cannot be NaN
                raise
            return out

    def _test(self, func: Any, answer: Tensor) -> Tensor:
        """The result that the same call of a test for NaN had in the first pass.

        Args:
            func: the function.
            answer: its result in this pass, which is recorded in the first pass.
        """
        key = (func, self.calls[func])
        self.calls[func] += 1
        if self.first:
            self.found[key] = answer.clone()
            return answer
        found = self.found.get(key)
        return answer if found is None or found.shape != answer.shape else found.clone()

    def _replace(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Tensor:
        """Call a function that replaces NaN, and keep the NaN of the probe."""
        nan = args[0].isnan()
        own = self._test(func, nan)
        out: Tensor = self.run(func, args, kwargs)
        foreign = nan & ~own
        return out.masked_fill_(foreign, torch.nan) if bool(foreign.any()) else out

    def _on_clean(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Call a function on finite numbers. If an argument had NaN, all results are NaN."""
        if not _any_nan(args, kwargs):
            return self.run(func, args, kwargs)
        out = self.run(func, _map(_cleaned, args), _map(_cleaned, kwargs))

        def nan(x: Tensor) -> Tensor:
            return torch.full_like(x, torch.nan) if is_inexact(x) else x

        if isinstance(out, tuple) and type(out) is not tuple:  # such as torch.return_types
            return type(out)([_map(nan, part) for part in out])
        return _map(nan, out)

    def _with_clean_places(
        self, func: Any, args: Any, kwargs: Mapping[str, Any], place: tuple[int, str]
    ) -> Any:
        """Call a function on finite positions.

        The result is NaN for those examples or boxes (dimension 0) that have a NaN position.

        Args:
            func, args, kwargs: the call.
            place: the position and the name of the argument with the positions to read.
        """
        position, name = place
        args, kwargs = list(args), dict(kwargs)
        places: Tensor = args[position] if position < len(args) else kwargs[name]
        wrong = places.isnan().flatten(1).any(1)
        if not bool(wrong.any()):
            return self.run(func, args, kwargs)
        if position < len(args):
            args[position] = _cleaned(places)
        else:
            kwargs[name] = _cleaned(places)
        out: Tensor = self.run(func, args, kwargs)
        out[wrong] = torch.nan
        return out


@functools.cache
def _is_special(func: Any) -> bool:
    """Whether a function may need another treatment than `Guards._ordinary`."""
    known = (*_TESTS, *_COMPARISONS, *_REPLACING, *_SKIPPING, *_PLACES)
    return func in known or operation_name(func) != ""


def _any_nan(*values: Any) -> bool:
    return any(map(has_nan, tensors_in(values)))


def _map(function: Callable[[Tensor], Tensor], x: Any) -> Any:
    """Replace the tensors in the arguments or results of a function."""
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, Mapping):
        return {key: _map(function, value) for key, value in x.items()}
    if isinstance(x, list):
        return [_map(function, part) for part in x]
    if isinstance(x, tuple) and not hasattr(x, "_fields") and type(x) is tuple:
        return tuple(_map(function, part) for part in x)
    return x


def _cleaned(x: Tensor) -> Tensor:
    """Replace NaN by random numbers between 0 and 1."""
    return torch.where(x.isnan(), torch.rand_like(x.real), x) if has_nan(x) else x
