"""Which layers the values of a writer may reach, according to the arguments of all functions.

This is an upper bound for what is measured with NaN. It is used to find writers whose measurements
can share a pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_sbp.gates.functions import address_of, may_change_arguments, tensors_in
from pyro_sbp.gates.loose import Place

__all__ = ["OUTPUT", "Flow", "disjoint_groups"]

#: The key for the output of the network.
OUTPUT = "output of the network"
#: A layer, the place of another tensor, or `OUTPUT`.
Key = str | Place


class Flow:
    """Follow the values of writers through the functions of one call of a network.

    The storage of every tensor has marks: an integer with one bit for each writer on whose values
    the tensor may depend. The result of a function has the marks of all arguments. The output of a
    writer has only the mark of this writer.
    """

    def __init__(self) -> None:
        self._bits: dict[str, int] = {}
        self._marks: dict[int, int] = {}
        self._reached: dict[Key, int] = {}
        #: The marks of tensors whose values were read outside of torch, for example as floats
        #: or NumPy arrays. Any later tensor may depend on them.
        self._left_torch = 0

    def of(self, tensors: Iterable[Tensor]) -> int:
        """All marks of some tensors."""
        marks = 0
        for tensor in tensors:
            marks |= self._marks.get(_identity(tensor), 0)
        return marks

    def meet(self, places: Iterable[Place], data: Iterable[Tensor]) -> None:
        """Record that a function combines other tensors of the network with data."""
        tensors = list(data)
        for place in places:
            self.reach(place, tensors)

    def reach(self, key: Key, tensors: Iterable[Tensor]) -> None:
        """Record that a layer or another tensor of the network is combined with tensors."""
        self._reached[key] = self._reached.get(key, 0) | self.of(tensors) | self._left_torch

    def write(self, writer: str, out: Any) -> None:
        """Record the output of a writer."""
        bit = self._bits.setdefault(writer, 1 << len(self._bits))
        for tensor in tensors_in([out]):
            self._marks[_identity(tensor)] = bit

    def follow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Record a call of a function that is not a writer."""
        inputs = list(tensors_in((*args, *kwargs.values())))
        marks = self.of(inputs)
        results = list(tensors_in([out]))
        if not results and not isinstance(out, bool | int | type(None)):  # these cannot be NaN
            self._left_torch |= marks
        marks |= self._left_torch
        shared = set(map(_identity, inputs))
        if may_change_arguments(func, args, kwargs):
            results += inputs
        for identity in map(_identity, results):
            # Only the storage of an argument keeps its marks, because a new tensor can have the
            # address of one that has been freed.
            earlier = self._marks.get(identity, 0) if identity in shared else 0
            self._marks[identity] = earlier | marks

    def reached_by(self, writer: str) -> set[Key]:
        """The keys that the values of a writer may reach."""
        bit = self._bits.get(writer, 0)
        return {key for key, marks in self._reached.items() if marks & bit}


def _identity(tensor: Tensor) -> int:
    """The address of the storage, or the id of a tensor without one, such as a sparse tensor."""
    return address_of(tensor) if tensor.layout is torch.strided else id(tensor)


def disjoint_groups(keys: Mapping[str, set[Key]]) -> list[list[str]]:
    """Divide writers into groups in which no two writers reach the same layer or tensor.

    Args:
        keys: from a writer to the keys that it may reach.
    """
    groups: list[tuple[list[str], set[Key]]] = []
    for writer, reached in keys.items():
        group = next((group for group in groups if group[1].isdisjoint(reached)), None)
        if group is None:
            group = ([], set())
            groups.append(group)
        group[0].append(writer)
        group[1].update(reached)
    return [members for members, _ in groups]
