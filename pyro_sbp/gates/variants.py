"""Variants of a measured gate, for networks that cannot be cut by the gate as measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from torch import nn

from pyro_sbp.gates.gate import Gate, Size
from pyro_sbp.gates.grouping import Candidate
from pyro_sbp.gates.sizes import combined, fitting_sizes, likely_sizes

__all__ = ["Kind", "Variant", "apply_variant", "kind_of", "variants", "with_likely_sizes"]

#: The largest number of variants of a gate that are tried, besides the last one.
_VARIANTS = 40
#: The numbers of equal parts into which code may split units.
_PARTS = (1, 2, 3, 4)
#: The largest number of attributes of modules that a variant changes.
_ATTRIBUTES = 3

#: What gates in repeated blocks have in common: the types of the two innermost modules that contain
#: the first layer of the gate, each with the name of its child on the path to this layer.
Kind = tuple[tuple[type[nn.Module], str], ...]


@dataclass(frozen=True)
class Variant:
    """The difference between a gate and the gate as measured.

    Attributes:
        parts: the number of measured units that form one unit.
        sizes: the attributes that depend on the units: the type of the module, the name of the
            attribute, and the index of the integer in it, as in `Size`.
    """

    parts: int
    sizes: frozenset[tuple[type[nn.Module], str, int | None]]

    @classmethod
    def of(cls, net: nn.Module, parts: int, sizes: tuple[Size, ...]) -> Variant:
        """Make a variant from the sizes of a gate of a network."""
        return cls(parts, frozenset(_item(net, size) for size in sizes))


def _item(net: nn.Module, size: Size) -> tuple[type[nn.Module], str, int | None]:
    return type(net.get_submodule(size.module)), size.attribute, size.place


def kind_of(net: nn.Module, gate: Gate) -> Kind:
    """The kind of a gate, which gates in repeated blocks share."""
    path = (gate.writers or gate.readers)[0].layer.split(".")
    return tuple(
        (type(net.get_submodule(".".join(path[:depth]))), path[depth])
        for depth in range(len(path))[-2:]
    )


def with_likely_sizes(net: nn.Module, gate: Gate) -> Gate:
    """A copy of a gate, to whose sizes those are added whose names suggest that they depend on its
    units."""
    chosen = {*gate.sizes, *likely_sizes(net, gate)}
    sizes = [size for found in fitting_sizes(net, gate, True) for size in found if size in chosen]
    return replace(gate, sizes=tuple(sizes))


def variants(net: nn.Module, candidate: Candidate) -> Iterator[Variant]:
    """The variants of a candidate, simple ones first. The first one is the gate as measured."""
    found = []
    for parts in _PARTS:
        coarse = candidate.coarser(parts)
        if coarse is not None:
            sizes = fitting_sizes(net, coarse.gate)
            for chosen in islice(combined(sizes, _ATTRIBUTES), _VARIANTS):
                found.append((len(chosen) + (parts > 1), Variant.of(net, parts, chosen)))
    found.sort(key=lambda item: item[0])
    yield from (variant for _, variant in found[:_VARIANTS])
    # The numbers in configurations come last, because most modules copy them into attributes when
    # they are built, and do not read them later.
    yield Variant.of(net, 1, likely_sizes(net, candidate.gate, configs=True))


def apply_variant(net: nn.Module, candidate: Candidate, variant: Variant) -> Gate | None:
    """The gate of a candidate with the changes of a variant, or None if they do not fit."""
    coarse = candidate.coarser(variant.parts)
    if coarse is None:
        return None
    sizes = tuple(
        size
        for of_attribute in fitting_sizes(net, coarse.gate, configs=True)
        for size in of_attribute
        if _item(net, size) in variant.sizes
    )
    if {_item(net, size) for size in sizes} != variant.sizes:
        return None
    return replace(coarse.gate, sizes=sizes)
