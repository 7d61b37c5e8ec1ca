"""Copies of networks, also of those that `copy.deepcopy` refuses."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from pyro_sbp.errors import first_line
from pyro_sbp.gates.folding import call, evaluating, repeatable
from pyro_sbp.gates.nested import map_tensors, tensors_of
from pyro_sbp.gates.state import reachable, undone

__all__ = [
    "copy_network",
    "drop_broken_hooks",
    "fresh",
    "materialize",
    "to_precision",
    "without_idle_hooks",
]

_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}
#: The dictionaries of a module that hold its hooks around `forward`.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
#: With more hooks than this, it is not tried which of them matter.
_MOST_HOOKS = 64


def copy_network(net: nn.Module) -> nn.Module:
    """A deep copy of a network.

    Tensors that torch does not copy are detached: features that the network has kept from its last
    call, or a weight that a hook computes from others (`torch.nn.utils.weight_norm`). Objects that
    cannot be copied, such as locks, files and generators, are shared with the copy.

    Raises:
        ValueError: a module or another object in the network refuses to be copied.
    """
    memo: dict[int, Any] = {}
    originals: list[Any] = []  # alive, so that their ids stay their own
    for thing in reachable(net, functions=False):
        if isinstance(thing, Tensor) and thing.requires_grad and not thing.is_leaf:
            memo[id(thing)] = thing.detach().clone()
            originals.append(thing)
    try:
        return copy.deepcopy(net, dict(memo))
    except Exception:  # the code of an object may raise anything
        pass
    for name, value in _attributes(net):
        try:
            copy.deepcopy(value, dict(memo))
        except Exception:  # as above
            memo[id(value)] = value
            originals.append((name, value))
    try:
        return copy.deepcopy(net, memo)
    except Exception as error:  # as above
        raise ValueError(
            f"{type(net).__name__} cannot be copied, which finding gates and pruning need: "
            f"{_culprit(net)}{first_line(error)}"
        ) from error


def _attributes(net: nn.Module) -> list[tuple[str, Any]]:
    """What modules hold besides tensors, modules and containers, and what these hold."""
    found = []
    for thing in reachable(net, functions=False):
        plain = isinstance(thing, Tensor | nn.Module | dict | list | tuple | set | frozenset)
        if not plain and not isinstance(thing, str | bytes | int | float | type | type(None)):
            found.append((type(thing).__name__, thing))
    return found


def _culprit(net: nn.Module) -> str:
    """The innermost module that cannot be copied."""
    culprit = ""
    for name, module in net.named_modules():
        if name.startswith(culprit) and name:
            try:
                copy.deepcopy(module)
            except Exception:  # the code of an object may raise anything
                culprit = name
    return f"{culprit!r}: " if culprit else ""


def to_precision(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert floating-point parameters and buffers to `dtype` in place, and complex numbers to
    those of the same precision."""

    def converted(tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.to(_COMPLEX[dtype])
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return net._apply(converted)


def fresh(x: Any) -> Any:
    """A copy of an input, for a network that may change it in place."""
    return map_tensors(lambda tensor: tensor.detach().clone(), x)


def materialize(net: nn.Module, x: Any) -> None:
    """Create the parameters of lazy layers in place, by one call on an input."""
    if any(isinstance(module, LazyModuleMixin) for module in net.modules()):
        with torch.no_grad(), evaluating(net), repeatable(torch.get_default_dtype()):
            call(net, fresh(x))


def _hooks(net: nn.Module) -> list[tuple[dict[int, Any], int]]:
    """The hooks of users in a network: those of torch's modules compute weights."""
    return [
        (getattr(module, kind), key)
        for module in net.modules()
        for kind in _HOOKS
        for key, hook in getattr(module, kind).items()
        if not (getattr(hook, "__module__", None) or "").startswith("torch.")
    ]


def without_idle_hooks(net: nn.Module, x: Any) -> nn.Module:
    """The network without forward hooks that do not change what it computes on an input.

    Such hooks record activations. Measurements should not reach what they record, and they cannot
    be called on layers of another width.

    Args:
        net: the network; it is not changed.
        x: its input.

    Returns:
        A copy, or the network itself if it has no hooks.
    """
    if not _hooks(net):
        return net
    net = copy_network(net)
    before, hooks = _output(net, x), _hooks(net)
    if before is None:
        return net
    removed = [(place, key, place.pop(key)) for place, key in hooks]
    if _same(before, _output(net, x)):
        return net
    for place, key, hook in removed:
        place[key] = hook
    if len(hooks) <= _MOST_HOOKS:
        for place, key, _ in removed:
            order = dict(place)
            del place[key]
            if not _same(before, _output(net, x)):
                place.clear()
                place.update(order)
    return net


def drop_broken_hooks(net: nn.Module, x: Any) -> None:
    """Remove the forward hooks of a smaller network in place if it cannot be called with them.

    A `UserWarning` says so.
    """
    hooks = _hooks(net)
    if not hooks or _output(net, x) is not None:
        return
    removed = [(place, key, place.pop(key)) for place, key in hooks]
    if _output(net, x) is None:  # they are not the cause
        for place, key, hook in removed:
            place[key] = hook
        return
    warnings.warn(
        f"the forward hooks of {type(net).__name__} cannot be called on the smaller layers; the "
        "smaller network has none",
        stacklevel=4,
    )


def _output(net: nn.Module, x: Any) -> list[Tensor] | None:
    """The tensors of the output on an input; None if the network cannot be called."""
    try:
        with torch.no_grad(), undone(net), evaluating(net), repeatable(torch.get_default_dtype()):
            return [tensor.clone() for tensor in tensors_of(call(net, fresh(x)))]
    except Exception:  # a network's own code may raise anything
        return None


def _same(a: list[Tensor], b: list[Tensor] | None) -> bool:
    return (
        b is not None
        and len(a) == len(b)
        and all(
            s.shape == t.shape and torch.allclose(s, t, equal_nan=True)
            for s, t in zip(a, b, strict=True)
        )
    )
