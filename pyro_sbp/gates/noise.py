"""Networks to which a `Pruner` has attached noise, by forward pre-hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from pyro_sbp.errors import RequestError

__all__ = ["check_no_noise", "has_noise", "noise_hook"]

_Hook = TypeVar("_Hook", bound=Callable[..., Any])
_HOOKS: set[Callable[..., Any]] = set()


def noise_hook(hook: _Hook) -> _Hook:
    """Mark a function, or a method in its class, as a forward pre-hook that applies noise."""
    _HOOKS.add(hook)
    return hook


def has_noise(net: nn.Module) -> bool:
    """Whether noise is attached to a network or to a module in it.

    A deep copy of a network with noise has noise too.
    """
    return any(
        getattr(hook, "__func__", hook) in _HOOKS
        for module in net.modules()
        for hook in module._forward_pre_hooks.values()
    )


def check_no_noise(net: nn.Module, done: str) -> None:
    """Check that no noise is attached to a network.

    Args:
        net: the network.
        done: the operation that noise makes impossible, as a participle such as "saved".

    Raises:
        RequestError: noise is attached.
    """
    if has_noise(net):
        raise RequestError(
            f"the network cannot be {done} while the noise of a Pruner is attached to it: use the "
            "network that pruner.prune() returns, or remove the noise with pruner.detach()"
        )
