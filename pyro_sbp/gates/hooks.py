"""Forward hooks of the user in a network: remove those that would disturb a measurement or fail."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sbp.gates.calling import call, evaluating
from pyro_sbp.gates.copies import copy_network, fresh
from pyro_sbp.gates.nested import tensors_of
from pyro_sbp.gates.state import undone
from pyro_sbp.gates.steady import repeatable

__all__ = ["drop_broken_hooks", "without_idle_hooks"]

#: The attributes of a module with the hooks that run around `forward`.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
#: The largest number of hooks that are tested one by one.
_MOST_HOOKS = 64


def _hooks(net: nn.Module) -> list[tuple[dict[int, Any], int]]:
    """The hooks of the user in a network: for each, the dictionary that contains it, and its key.

    The hooks of torch, which compute weights, are not included.
    """
    return [
        (getattr(module, kind), key)
        for module in net.modules()
        for kind in _HOOKS
        for key, hook in getattr(module, kind).items()
        if not (getattr(hook, "__module__", None) or "").startswith("torch.")
    ]


def without_idle_hooks(net: nn.Module, x: Any) -> nn.Module:
    """Remove forward hooks that do not change the output of a network on an input.

    Such hooks record activations, for example. Measurements must not add to their records, and the
    hooks may fail on layers of another width.

    Args:
        net: the network, which is not changed.
        x: its input.

    Returns:
        A copy without these hooks, or the network itself if it has no hooks. All hooks remain if
        the network cannot be called on `x`, or if there are many and some of them are needed.

    Raises:
        ValueError: the network cannot be copied.
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
    """Remove the forward hooks of a smaller network, in place, if only they make its call fail.

    If they are removed, a `UserWarning` is given.

    Args:
        net: the smaller network.
        x: its input.
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
    """Whether two outputs are equal up to rounding."""
    return (
        b is not None
        and len(a) == len(b)
        and all(
            s.shape == t.shape and torch.allclose(s, t, equal_nan=True)
            for s, t in zip(a, b, strict=True)
        )
    )
