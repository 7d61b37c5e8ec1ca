"""The state that a network keeps between calls, so that every measurement starts with the same one.

Examples are the potentials of spiking neurons, the keys in a cache, the last features that a
network stores, and statistics that hooks of the user accumulate. All objects that can be reached
from a network are recorded and restored, except the
values of its parameters.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["State", "reachable", "undone"]

#: Packages whose classes and functions have no state that belongs to one network.
_LIBRARIES = frozenset({*sys.stdlib_module_names, "torch", "numpy", "pyro", "pyro_sbp"})
#: The dictionaries of a module whose contents belong to its state, or contain functions.
_OF_MODULES = (
    *("_buffers", "_parameters", "_modules", "_forward_hooks", "_forward_pre_hooks"),
    *("_forward_hooks_always_called", "_forward_hooks_with_kwargs"),
)
#: Types of objects that contain no other objects.
_ATOMS = (Tensor, str, bytes, int, float, type(None))
_WITHOUT_ATTRIBUTES = (type, FunctionType, MethodType, functools.partial, Tensor)
#: The attributes that torch sets in every module. They are no state of the network.
_NOT_OWN = frozenset(vars(nn.Module()))


class _Attributes:
    """The attributes of a module, as an object from which more objects can be reached."""

    def __init__(self, module: nn.Module) -> None:
        self.content = vars(module)


def _of_library(thing: Any) -> bool:
    return (getattr(thing, "__module__", None) or "builtins").partition(".")[0] in _LIBRARIES


@functools.cache
def _is_installed(package: str) -> bool:
    """Whether a package is installed, so that it is not code of the user.

    The variables of its modules and classes are not state of one network.
    """
    if package in _LIBRARIES:
        return True
    file = getattr(sys.modules.get(package), "__file__", None)
    return file is not None and not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)


def _of_user(thing: Any) -> bool:
    """Whether a function or a class is defined in code of the user."""
    return not _is_installed((getattr(thing, "__module__", None) or "builtins").partition(".")[0])


def _has_attributes(thing: Any) -> bool:
    """Whether the attributes of an object may be state of a network."""
    if isinstance(thing, nn.Module):
        return True
    plain = isinstance(thing, _WITHOUT_ATTRIBUTES)
    return not plain and hasattr(thing, "__dict__") and not _of_library(type(thing))


def _names(code: CodeType) -> Iterator[str]:
    """The global names that a function uses, including those of functions inside it."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


def _globals_of(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The global variables that a function uses and may change."""
    for name in _names(function.__code__):
        if name not in function.__globals__:
            continue
        value = function.__globals__[name]
        if isinstance(value, FunctionType):
            if _of_user(value):
                yield name, value
        elif _is_state(value):
            yield name, value


def _is_state(value: Any) -> bool:
    if isinstance(value, int | float | Tensor | list | dict | set | deque | torch.Generator):
        return True
    return value is None or (not isinstance(value, type) and _has_attributes(value))


def _of_classes(module: nn.Module) -> Iterator[Any]:
    """The methods and the containers and tensors in attributes of the class of a module, if the
    class is code of the user."""
    for cls in type(module).__mro__:
        if _of_user(cls):
            for value in vars(cls).values():
                if isinstance(value, FunctionType | Tensor | list | dict | set | deque):
                    yield value


def _inside(thing: Any, functions: bool) -> Iterator[Any]:
    """The objects that an object contains."""
    if isinstance(thing, _ATOMS):
        return
    if isinstance(thing, dict):
        yield from dict.values(thing)  # subclasses may compute something at an access
    elif isinstance(thing, (list, tuple, set, frozenset, deque)):
        yield from thing
    elif isinstance(thing, MethodType):
        yield thing.__self__
        yield thing.__func__
    elif isinstance(thing, functools.partial):
        yield from (thing.func, thing.args, thing.keywords)
    elif isinstance(thing, FunctionType):
        if functions and _of_user(thing):
            yield from (cell.cell_contents for cell in thing.__closure__ or () if _full(cell))
            yield from thing.__defaults__ or ()
            yield from (thing.__kwdefaults__ or {}).values()
            yield from (value for _, value in _globals_of(thing))
    elif isinstance(thing, nn.Module):
        kept = vars(thing)
        # Empty ones are included, because a call may add to them: some libraries add hooks.
        yield from (kept[n] for n in _OF_MODULES if n in kept)
        yield _Attributes(thing)
        if functions:
            yield from _of_classes(thing)
    elif isinstance(thing, _Attributes):
        yield from (value for name, value in thing.content.items() if name not in _NOT_OWN)
    elif _has_attributes(thing):
        yield vars(thing)


def _full(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018  (an empty cell raises)
    except ValueError:
        return False
    return True


def reachable(net: nn.Module, functions: bool = True) -> Iterator[Any]:
    """All objects that can be reached from a network, each of them once.

    Args:
        net: the network.
        functions: whether to include the variables of hooks and methods in code of the user: their
            closures, default arguments, and global variables.
    """
    waiting: list[Any] = [net]
    seen: dict[int, Any] = {}
    while waiting:
        thing = waiting.pop()
        if id(thing) not in seen:
            seen[id(thing)] = thing
            yield thing
            waiting.extend(_inside(thing, functions))


class State:
    """A record of the state of a network.

    It contains the attributes, the containers, the buffers and other tensors of the network, and
    the variables that its hooks and methods use. It does not contain the values of the parameters.

    Args:
        net: the network.
    """

    def __init__(self, net: nn.Module) -> None:
        self._containers: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._cells: list[tuple[Any, Any]] = []
        self._globals: list[tuple[dict[str, Any], str, Any]] = []
        self._generators: list[tuple[torch.Generator, Tensor]] = []
        with torch.no_grad():
            for thing in reachable(net):
                self._record(thing)

    def _record(self, thing: Any) -> None:
        if isinstance(thing, nn.Parameter):
            return
        if isinstance(thing, Tensor):
            if not thing.is_meta and type(thing) is Tensor and thing.layout is torch.strided:
                self._tensors.append((thing, thing.detach().clone()))
        elif isinstance(thing, torch.Generator):
            self._generators.append((thing, thing.get_state()))
        elif isinstance(thing, _Attributes):
            self._record(thing.content)
        elif isinstance(thing, dict):
            self._containers.append((thing, dict(dict.items(thing))))
        elif isinstance(thing, list | set | deque):
            self._containers.append((thing, list(thing)))
        elif isinstance(thing, FunctionType) and _of_user(thing):
            for cell in thing.__closure__ or ():
                if _full(cell):
                    self._cells.append((cell, cell.cell_contents))
            for name, value in _globals_of(thing):
                self._globals.append((thing.__globals__, name, value))

    def restore(self) -> None:
        """Restore the recorded state."""
        for container, content in self._containers:
            if (container or content) and not _has_content(container, content):
                container.clear()
                if isinstance(container, dict | set):
                    container.update(content)
                else:
                    container.extend(content)
        for cell, value in self._cells:
            if not _full(cell) or cell.cell_contents is not value:
                cell.cell_contents = value
        for variables, name, value in self._globals:
            if variables.get(name) is not value:
                variables[name] = value
        for generator, state in self._generators:
            generator.set_state(state)
        with torch.no_grad():
            for tensor, value in self._tensors:
                if tensor.shape != value.shape or tensor.dtype != value.dtype:
                    tensor.data = value.clone()
                elif not torch.equal(tensor, value):
                    tensor.detach().copy_(value)


def _has_content(container: Any, content: Any) -> bool:
    """Whether a dictionary, a list, a set or a queue has the same objects as a record of it."""
    if len(container) != len(content):
        return False
    if isinstance(container, dict):
        # The methods of a subclass are not used, because a lazy dictionary would load its values.
        return all(map(operator.is_, dict.values(container), content.values()))
    return all(map(operator.is_, container, content))


@contextmanager
def undone(net: nn.Module) -> Iterator[None]:
    """A context in which a network may be called. Afterwards, its state is restored."""
    state = State(net)
    try:
        yield
    finally:
        state.restore()
