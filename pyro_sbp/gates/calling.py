"""Call a network on an input of any kind, in evaluation mode where this is required."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["call", "evaluating"]


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """A context in which a network is in evaluation mode.

    Afterwards, the mode of every module is restored.
    """
    before = {module: module.training for module in net.modules()}
    net.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def call(net: Callable[..., Any], x: Any) -> Any:
    """Call a network on an input.

    Args:
        net: the network, or a function.
        x: the input. A tuple (also a named tuple) is passed as positional arguments. A mapping (a
            dict, or the ``BatchEncoding`` of a tokenizer) is passed as named arguments. Any other
            object, such as a tensor, a list or a dataclass, is passed as one argument. To pass a
            tuple or a mapping as one argument, wrap it in a tuple of length 1.

    Returns:
        The output of the network.
    """
    if isinstance(x, Mapping):
        return net(**x)
    return net(*x) if isinstance(x, tuple) else net(x)
