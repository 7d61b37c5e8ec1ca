"""Networks whose forward hooks put the noise of a `Pruner` on their units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from pyro_sbp.errors import RequestError

__all__ = ["check_no_noise", "has_noise", "noise_hook"]

_Hook = TypeVar("_Hook", bound=Callable[..., Any])
_HOOKS: set[Callable[..., Any]] = set()


def noise_hook(hook: _Hook) -> _Hook:
    """Register a function, or a method in its class, as a forward pre-hook that adds noise."""
    _HOOKS.add(hook)
    return hook


def has_noise(net: nn.Module) -> bool:
    """Whether noise is attached to a network or to a module in it. Deep copies have it too."""
    return any(
        getattr(hook, "__func__", hook) in _HOOKS
        for module in net.modules()
        for hook in module._forward_pre_hooks.values()
    )


def check_no_noise(net: nn.Module, done: str) -> None:
    """Check that no noise is attached to a network.

    Args:
        net: the network.
        done: what is not possible with noise, such as "saved".

    Raises:
        RequestError: noise is attached.
    """
    if has_noise(net):
        raise RequestError(
            f"the network cannot be {done} while the noise of a Pruner is attached to it: use the "
            "network that pruner.prune() returns, or remove the noise with pruner.detach()"
        )
