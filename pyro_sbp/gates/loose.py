"""Tensors of a network that no known layer holds: which of them meet which units, and how.

A layer scale, a learned offset or gain, the numbers of an unfamiliar norm: what has one element, or
one slice, for each unit of a gate has to be cut with it. Which slices are those of which unit is
measured as it is for layers: NaN in some slices shows up in the columns that they reach.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sbp.gates.functions import changes_in_place, has_nan, tensors_in
from pyro_sbp.gates.layers import known_tensors

__all__ = ["Follower", "LooseTensors", "Place", "Slices", "decode", "slices_to_try"]

#: A tensor of a network: the name of its module, and its own in there.
Place = tuple[str, str]


@dataclass(frozen=True)
class Slices:
    """The slices along a dimension of one or more tensors of a module, of equal number.

    Attributes:
        layer: the name of the module.
        tensors: the name of each tensor, and the dimension.
        size: how many slices there are.
    """

    layer: str
    tensors: tuple[tuple[str, int], ...]
    size: int

    @property
    def places(self) -> set[Place]:
        """Where the tensors are."""
        return {(self.layer, leaf) for leaf, _ in self.tensors}

    def singly(self) -> list[Slices]:
        """Those of each tensor alone."""
        return [Slices(self.layer, (one,), self.size) for one in self.tensors]


@dataclass(frozen=True)
class Follower:
    """Slices that have to be cut with units.

    Attributes:
        slices: of which tensors.
        columns: from a layer to the slice that each of its columns is reached by, or -1.
    """

    slices: Slices
    columns: dict[str, Tensor]


@dataclass
class LooseTensors:
    """The tensors of a network, known while it is called, and what is computed from them alone.

    Attributes:
        net: the network.
        places: where the tensors are that no known layer holds.
        met: the places of those that meet NaN of the data in a function. Filled while `watching`.
    """

    net: nn.Module
    watching: bool = False
    places: dict[Place, Tensor] = field(default_factory=dict)
    met: set[Place] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._own: dict[int, tuple[Tensor, frozenset[Place]]] = {}
        for name, module in self.net.named_modules():
            known = known_tensors(module)
            for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and id(tensor) not in self._own:
                    place = (name, leaf)
                    self._own[id(tensor)] = tensor, frozenset([place])
                    if leaf not in known and _has_slices(tensor):
                        self.places[place] = tensor
        self.start()

    def start(self) -> None:
        """Begin a call of the network."""
        self._sources = dict(self._own)

    def sources(self, tensor: Tensor) -> frozenset[Place] | None:
        """The tensors that one was computed from; None if data of the input enter."""
        found = self._sources.get(id(tensor))
        return None if found is None else found[1]

    def watch(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Note what a function has done."""
        inputs = list(tensors_in((*args, *kwargs.values())))
        # What an integer selects from a tensor is computed from that tensor alone.
        found = [
            self.sources(tensor) if _is_inexact(tensor) else frozenset[Place]() for tensor in inputs
        ]
        sources = frozenset[Place]().union(*(places for places in found if places is not None))
        if None not in found:
            for tensor in tensors_in([out]):
                self._sources.setdefault(id(tensor), (tensor, sources))
            return
        if inputs and found[0] is not None and changes_in_place(func):
            self._sources.pop(id(inputs[0]), None)
        if self.watching and sources & self.places.keys() - self.met:
            data = (tensor for tensor, of in zip(inputs, found, strict=True) if of is None)
            if any(has_nan(tensor) for tensor in data):
                self.met |= sources & self.places.keys()

    def meet(self, tensor: Tensor) -> None:
        """Note that a tensor is added to NaN of the data."""
        if self.watching:
            self.met |= (self.sources(tensor) or frozenset()) & self.places.keys()

    def fill(self, slices: Slices, chosen: Tensor) -> None:
        """Put NaN into some slices, in place, until `restore` is called."""
        for leaf, dim in slices.tensors:
            tensor = self.places[slices.layer, leaf]
            self._saved.setdefault((slices.layer, leaf), tensor.clone())
            tensor.movedim(dim, 0)[chosen] = torch.nan

    @property
    def filled(self) -> list[Tensor]:
        """The tensors that `fill` has put NaN into."""
        return [self.places[place] for place in self._saved]

    def restore(self) -> None:
        """Undo `fill`."""
        for place, tensor in self._saved.items():
            self.places[place].copy_(tensor)
        self._saved.clear()

    _saved: dict[Place, Tensor] = field(default_factory=dict)


def _is_inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _has_slices(tensor: Tensor) -> bool:
    # A tensor that was expanded cannot be written to.
    return _is_inexact(tensor) and tensor.numel() > 1 and 0 not in tensor.stride()


def slices_to_try(loose: LooseTensors, places: Iterable[Place]) -> list[Slices]:
    """Slices of tensors that may follow units, those of vectors of equal length in a module
    together."""
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
    """Which slice reaches each of some columns; None if several reach one, or none reaches any.

    Args:
        slices: that NaN was put into by the `codes` of their numbers.
        passes: for each code, from a layer to the columns that were reached.
        columns: from a layer to those of interest, bool.
    """
    found: dict[str, Tensor] = {}
    for name, interesting in columns.items():
        hits = [one.get(name, torch.zeros_like(interesting)) & interesting for one in passes]
        seen = hits[0] | hits[1]
        number = torch.zeros(len(interesting), dtype=torch.long, device="cpu")
        for bit, (one, zero) in enumerate(zip(hits[0::2], hits[1::2], strict=True)):
            if bool((one & zero).any()) or not torch.equal(one | zero, seen):
                return None
            number += one.long() << bit
        found[name] = torch.where(seen, number, -1)
    reached = any(bool((number >= 0).any()) for number in found.values())
    return Follower(slices, found) if reached else None
