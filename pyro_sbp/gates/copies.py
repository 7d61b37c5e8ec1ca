"""Copy networks, including networks for which `copy.deepcopy` fails."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from pyro_sbp.errors import first_line
from pyro_sbp.gates.calling import call, evaluating
from pyro_sbp.gates.nested import map_tensors
from pyro_sbp.gates.state import reachable
from pyro_sbp.gates.steady import repeatable

__all__ = [
    "copy_network",
    "fresh",
    "materialize",
    "to_precision",
]

#: From the dtype of a network to that of its complex tensors.
_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}


def copy_network(net: nn.Module) -> nn.Module:
    """A deep copy of a network.

    Tensors that are results of operations with a gradient are detached, because torch does not copy
    them. Examples are features that the network stores in a call, and weights that a hook computes
    (`torch.nn.utils.weight_norm`). Objects that cannot be copied, such as locks, files and Python
    generators, are shared with the copy.

    Raises:
        ValueError: the network cannot be copied, even if such objects are shared. An example is a
            module whose `__deepcopy__` fails.
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
    """The objects in a network that may not be copyable, each with the name of its type.

    These are all except tensors, modules, containers, strings, numbers and types.
    """
    found = []
    for thing in reachable(net, functions=False):
        plain = isinstance(thing, Tensor | nn.Module | dict | list | tuple | set | frozenset)
        if not plain and not isinstance(thing, str | bytes | int | float | type | type(None)):
            found.append((type(thing).__name__, thing))
    return found


def _culprit(net: nn.Module) -> str:
    """The name of the innermost module that cannot be copied, as the start of a message.

    It is empty if there is no such module inside the network.
    """
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

    Args:
        net: the network.
        dtype: the dtype. If there are complex tensors, it must be float32 or float64, and they are
            converted to the complex dtype of the same precision.

    Returns:
        The same network.
    """

    def converted(tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.to(_COMPLEX[dtype])
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return net._apply(converted)


def fresh(x: Any) -> Any:
    """Copy an input, so that the network cannot change the original in place.

    Raises:
        TypeError: as for `map_tensors`.
    """
    return map_tensors(lambda tensor: tensor.detach().clone(), x)


def materialize(net: nn.Module, x: Any) -> None:
    """Create the parameters of lazy layers in place, by calling the network once on an input.

    A network without lazy layers is not called. Errors of the network are raised.
    """
    if any(isinstance(module, LazyModuleMixin) for module in net.modules()):
        with torch.no_grad(), evaluating(net), repeatable(torch.get_default_dtype()):
            call(net, fresh(x))
