"""Tensors of a network that belong to no known layer, and the units that they are combined with.

Examples are a layer scale, a learned offset or gain, and the parameters of an unknown norm. A
tensor with one element or one slice for each unit must be cut together with the units. Which slice
belongs to which unit is measured as for layers: some slices are set to NaN, and NaN appears in the
columns that they reach. In this package, a tensor "meets" units if a function combines them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pyro_sbp.gates.classes import numbers_of
from pyro_sbp.gates.functions import changes_in_place, has_nan, is_inexact, tensors_in
from pyro_sbp.gates.layers import known_tensors
from pyro_sbp.gates.products import dimensions, multiplied

__all__ = [
    "Follower",
    "LooseTensors",
    "Meetings",
    "Met",
    "Place",
    "Slices",
    "decode",
    "slices_to_try",
]

#: The place of a tensor: the name of its module, and its name in the module.
Place = tuple[str, str]


@dataclass(frozen=True)
class Slices:
    """The slices of one or more tensors of a module, which have the same number of slices.

    Attributes:
        layer: the name of the module.
        tensors: the name of each tensor, and the dimension along which its slices lie.
        size: the number of slices.
        block: the number of consecutive indices of a slice.
    """

    layer: str
    tensors: tuple[tuple[str, int], ...]
    size: int
    block: int = 1

    @property
    def places(self) -> set[Place]:
        """The places of the tensors."""
        return {(self.layer, leaf) for leaf, _ in self.tensors}

    def singly(self) -> list[Slices]:
        """The slices of each tensor separately. A slice has one index."""
        return [Slices(self.layer, (one,), self.size) for one in self.tensors]

    def in_blocks(self, sizes: Iterable[int]) -> list[Slices]:
        """Larger slices of several consecutive indices each, such as the indices of a head.

        Args:
            sizes: the numbers of slices to divide the tensors into. Numbers that are not possible
                are skipped.
        """
        return [
            Slices(self.layer, self.tensors, size, self.size // size)
            for size in sizes
            if self.block == 1 and 1 < size < self.size and self.size % size == 0
        ]


@dataclass(frozen=True)
class Follower:
    """Slices that must be cut together with units.

    Attributes:
        slices: the slices.
        columns: from a layer to the slice that reaches each of its columns, or -1.
    """

    slices: Slices
    columns: dict[str, Tensor]


class Meetings(Protocol):
    """A record of the tensors of a network that functions combine with data."""

    def meet(self, places: Iterable[Place], data: Iterable[Tensor]) -> None:
        """Record that a function combines tensors of the network with data."""


@dataclass
class Met:
    """The places of the tensors that functions combine with data that contain NaN."""

    places: set[Place] = field(default_factory=set)

    def meet(self, places: Iterable[Place], data: Iterable[Tensor]) -> None:
        """Record that a function combines tensors of the network with data."""
        new = set(places) - self.places
        if new and any(map(has_nan, data)):
            self.places |= new


@dataclass
class LooseTensors:
    """The tensors of a network, and tensors that are computed from them without data.

    Attributes:
        net: the network.
        places: from the place of each tensor that belongs to no known layer to the tensor.
        meetings: the record of which of these tensors a function combines with data, or None.
    """

    net: nn.Module
    places: dict[Place, Tensor] = field(default_factory=dict)
    meetings: Meetings | None = None

    def __post_init__(self) -> None:
        self._own: dict[int, tuple[Tensor, frozenset[Place]]] = {}
        self._at: dict[Place, Tensor] = {}
        for name, module in self.net.named_modules():
            known = known_tensors(module)
            for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and id(tensor) not in self._own:
                    place = (name, leaf)
                    self._own[id(tensor)] = tensor, frozenset([place])
                    self._at[place] = tensor
                    if leaf not in known and _has_slices(tensor):
                        self.places[place] = tensor
        self.start()

    def start(self) -> None:
        """Forget the computed tensors. It must be called before every call of the network."""
        self._sources = dict(self._own)
        #: The tensors that are multiples of the tensor at a place, element by element, and the
        #: dimension of that tensor for each of their dimensions.
        self._multiples: dict[Place, list[tuple[Tensor, list[int]]]] = {}

    def sources(self, tensor: Tensor) -> frozenset[Place] | None:
        """The places of the tensors from which a tensor was computed, or None if it was computed
        from data."""
        found = self._sources.get(id(tensor))
        return None if found is None else found[1]

    def dimensions(self, tensor: Tensor, place: Place) -> list[int] | None:
        """The dimension of the tensor at a place for each dimension of a tensor.

        As for `products.dimensions`, but the tensor may also be a view of a multiple. A multiple is
        the tensor at the place, multiplied element by element by numbers that depend neither on the
        tensor nor on data.

        Args:
            tensor: the tensor.
            place: the place of another tensor.

        Returns:
            The dimensions, or None if the tensor is not such a view.
        """
        of = self._at[place]
        found = dimensions(tensor, of)
        if found is not None:
            return found
        for multiple, dims in self._multiples.get(place, ()):
            found = dimensions(tensor, multiple)
            if found is not None:
                return [dims[dim] if dim >= 0 else -1 for dim in found]
        return None

    def rank(self, place: Place) -> tuple[bool, Place]:
        """A key by which parameters come before buffers."""
        return not isinstance(self._at[place], nn.Parameter), place

    def _note_multiples(self, func: Any, args: Sequence[Any], out: Any) -> None:
        for tensor, factor in multiplied(func, args, out):
            others = self.sources(factor) if isinstance(factor, Tensor) else frozenset[Place]()
            for place in self.sources(tensor) or ():
                if others is not None and place not in others:
                    dims = self.dimensions(tensor, place)
                    if dims is not None:
                        self._multiples.setdefault(place, []).append((out, dims))

    def watch(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Record a call of a function."""
        inputs = list(tensors_in((*args, *kwargs.values())))
        if not any(id(tensor) in self._sources for tensor in inputs) and any(
            map(is_inexact, inputs)
        ):
            return  # the most frequent case: only data
        # Integer tensors are no data here: what an index selects comes only from the other tensor.
        found = [
            self.sources(tensor) if is_inexact(tensor) else frozenset[Place]() for tensor in inputs
        ]
        sources = frozenset[Place]().union(*(places for places in found if places is not None))
        if None not in found:
            for tensor in tensors_in([out]):
                self._sources.setdefault(id(tensor), (tensor, sources))
            self._note_multiples(func, args, out)
            return
        if inputs and found[0] is not None and changes_in_place(func):
            self._sources.pop(id(inputs[0]), None)
        data = (tensor for tensor, of in zip(inputs, found, strict=True) if of is None)
        self._meet(sources, data)

    def meet(self, tensor: Tensor, data: Iterable[Tensor]) -> None:
        """Record that a function combines a tensor with data."""
        self._meet(self.sources(tensor) or frozenset(), data)

    def _meet(self, sources: frozenset[Place], data: Iterable[Tensor]) -> None:
        if self.meetings is not None and sources:
            self.meetings.meet(sources & self.places.keys(), data)

    def fill(self, slices: Slices, chosen: Tensor) -> None:
        """Set some slices to NaN, in place, until `restore` is called.

        Args:
            slices: the slices.
            chosen: which of them are set to NaN, bool ``[size]``.
        """
        for leaf, dim in slices.tensors:
            tensor = self.places[slices.layer, leaf]
            self._saved.setdefault((slices.layer, leaf), tensor.clone())
            tensor.movedim(dim, 0)[chosen.repeat_interleave(slices.block)] = torch.nan

    @property
    def filled(self) -> list[Tensor]:
        """The tensors that `fill` has changed."""
        return [self.places[place] for place in self._saved]

    def restore(self) -> None:
        """Undo `fill`."""
        for place, tensor in self._saved.items():
            self.places[place].copy_(tensor)
        self._saved.clear()

    _saved: dict[Place, Tensor] = field(default_factory=dict)


def _has_slices(tensor: Tensor) -> bool:
    """Whether slices of a tensor can be set to NaN in place."""
    # An expanded tensor cannot be changed in place.
    return is_inexact(tensor) and tensor.numel() > 1 and 0 not in tensor.stride()


def slices_to_try(loose: LooseTensors, places: Iterable[Place]) -> list[Slices]:
    """The slices of tensors that may belong to units.

    Vectors of the same module with the same length are tried together.

    Args:
        loose: the tensors of the network.
        places: the places of the tensors to try.
    """
    vectors: dict[tuple[str, int], list[tuple[str, int]]] = {}
    others = []
    for layer, leaf in sorted(places):
        shape = loose.places[layer, leaf].shape
        dims = [dim for dim, size in enumerate(shape) if size > 1]
        if len(dims) == 1:
            vectors.setdefault((layer, shape[dims[0]]), []).append((leaf, dims[0]))
        else:
            others += [Slices(layer, ((leaf, dim),), shape[dim]) for dim in dims]
    together = [Slices(layer, tuple(found), size) for (layer, size), found in vectors.items()]
    return [*together, *others]


def decode(
    slices: Slices, passes: Sequence[Mapping[str, Tensor]], columns: Mapping[str, Tensor]
) -> Follower | None:
    """Find the slice that reaches each column.

    Args:
        slices: the slices, which were set to NaN by the `codes` of their numbers.
        passes: for each code, from a layer to the columns that were reached.
        columns: from a layer to the columns of interest, bool.

    Returns:
        The follower, or None if several slices reach one column, or if no slice reaches a column.
    """
    found: dict[str, Tensor] = {}
    for name, interesting in columns.items():
        hits = [one.get(name, torch.zeros_like(interesting)) & interesting for one in passes]
        seen = hits[0] | hits[1]
        for one, zero in zip(hits[0::2], hits[1::2], strict=True):
            if bool((one & zero).any()) or not torch.equal(one | zero, seen):
                return None
        found[name] = torch.where(seen, numbers_of(hits[0::2]), -1)
    reached = any(bool((number >= 0).any()) for number in found.values())
    return Follower(slices, found) if reached else None
