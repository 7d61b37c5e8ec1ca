"""Copy networks, including networks for which `copy.deepcopy` fails."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from pyro_sbp.errors import first_line
from pyro_sbp.gates.folding import call, evaluating
from pyro_sbp.gates.nested import map_tensors, tensors_of
from pyro_sbp.gates.state import reachable, undone
from pyro_sbp.gates.steady import repeatable

__all__ = [
    "copy_network",
    "drop_broken_hooks",
    "fresh",
    "materialize",
    "to_precision",
    "without_idle_hooks",
]

_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}
#: The attributes of a module with the hooks that run around `forward`.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
#: If there are more hooks, they are not tested one by one.
_MOST_HOOKS = 64


def copy_network(net: nn.Module) -> nn.Module:
    """A deep copy of a network.

    Tensors with a graph, which torch does not copy, are detached. Examples are features that the
    network stores in a call, and weights that a hook computes (`torch.nn.utils.weight_norm`).
    Objects that cannot be copied, such as locks, files and generators, are shared with the copy.

    Raises:
        ValueError: a module or another object in the network cannot be copied.
    """
    memo: dict[int, Any] = {}
    originals: list[Any] = []  # keep them alive, so that their ids are not reused
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
            f"{type(net).__name__} cannot be copied, which is required to find gates and to prune: "
            f"{_culprit(net)}{first_line(error)}"
        ) from error


def _attributes(net: nn.Module) -> list[tuple[str, Any]]:
    """The objects in a network besides tensors, modules and containers, and their attributes."""
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
    """Convert floating-point parameters and buffers to `dtype`, in place.

    Complex tensors are converted to the complex dtype of the same precision.
    """

    def converted(tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.to(_COMPLEX[dtype])
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return net._apply(converted)


def fresh(x: Any) -> Any:
    """Copy an input, because the network may change it in place."""
    return map_tensors(lambda tensor: tensor.detach().clone(), x)


def materialize(net: nn.Module, x: Any) -> None:
    """Create the parameters of lazy layers, by calling the network once on an input."""
    if any(isinstance(module, LazyModuleMixin) for module in net.modules()):
        with torch.no_grad(), evaluating(net), repeatable(torch.get_default_dtype()):
            call(net, fresh(x))


def _hooks(net: nn.Module) -> list[tuple[dict[int, Any], int]]:
    """The hooks of the user in a network, without those of torch, which compute weights."""
    return [
        (getattr(module, kind), key)
        for module in net.modules()
        for kind in _HOOKS
        for key, hook in getattr(module, kind).items()
        if not (getattr(hook, "__module__", None) or "").startswith("torch.")
    ]


def without_idle_hooks(net: nn.Module, x: Any) -> nn.Module:
    """Remove forward hooks that do not change the output of a network on an input.

    Such hooks record activations. Measurements must not affect their records, and the hooks may
    fail on layers of another width.

    Args:
        net: the network, which is not changed.
        x: its input.

    Returns:
        A copy without these hooks, or the network itself if it has no hooks.
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
    """Remove the forward hooks of a smaller network, in place, if it cannot be called with them.

    If they are removed, a `UserWarning` is given.
    """
    hooks = _hooks(net)
    if not hooks or _output(net, x) is not None:
        return
    removed = [(place, key, place.pop(key)) for place, key in hooks]
    if _output(net, x) is None:  # the hooks are not the cause
        for place, key, hook in removed:
            place[key] = hook
        return
    warnings.warn(
        f"the forward hooks of {type(net).__name__} cannot be called on the smaller layers; "
        "the smaller network has no forward hooks",
        stacklevel=4,
    )


def _output(net: nn.Module, x: Any) -> list[Tensor] | None:
    """The tensors of the output on an input, or None if the call fails."""
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
