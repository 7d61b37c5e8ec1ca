"""Other forms of a gate that was measured, for networks that cannot be cut by the first one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from torch import nn

from pyro_sbp.gates.folding import Gate, Size
from pyro_sbp.gates.grouping import Candidate
from pyro_sbp.gates.sizes import combined, fitting_sizes, likely_sizes

__all__ = ["Kind", "Variant", "apply_variant", "kind_of", "variants", "with_likely_sizes"]

#: How many variants of a gate are tried at most.
_VARIANTS = 40
#: Into how many parts of equal size code may split units.
_PARTS = (1, 2, 3, 4)
#: How many attributes of modules may have to follow.
_ATTRIBUTES = 3

#: What gates of repeated blocks have in common: the name of a writer in the two modules around it.
Kind = tuple[tuple[type[nn.Module], str], ...]


@dataclass(frozen=True)
class Variant:
    """How a gate to try differs from the gate that was measured.

    Attributes:
        parts: how many of the measured units make up one.
        sizes: the attributes that follow, and which integers of each.
    """

    parts: int
    sizes: frozenset[tuple[type[nn.Module], str, int | None]]

    @classmethod
    def of(cls, net: nn.Module, parts: int, sizes: tuple[Size, ...]) -> Variant:
        """From sizes of modules of a network."""
        return cls(parts, frozenset(_item(net, size) for size in sizes))


def _item(net: nn.Module, size: Size) -> tuple[type[nn.Module], str, int | None]:
    return type(net.get_submodule(size.module)), size.attribute, size.place


def kind_of(net: nn.Module, gate: Gate) -> Kind:
    """The kind of a gate."""
    path = (gate.writers or gate.readers)[0].layer.split(".")
    return tuple(
        (type(net.get_submodule(".".join(path[:depth]))), path[depth])
        for depth in range(len(path))[-2:]
    )


def with_likely_sizes(net: nn.Module, gate: Gate) -> Gate:
    """A gate, and the attributes that follow by their names."""
    chosen = {*gate.sizes, *likely_sizes(net, gate)}
    sizes = [size for found in fitting_sizes(net, gate) for size in found if size in chosen]
    return replace(gate, sizes=tuple(sizes))


def variants(net: nn.Module, candidate: Candidate) -> Iterator[Variant]:
    """Variants, simple ones first."""
    found = []
    for parts in _PARTS:
        coarse = candidate.coarser(parts)
        if coarse is not None:
            sizes = fitting_sizes(net, coarse.gate)
            for chosen in islice(combined(sizes, _ATTRIBUTES), _VARIANTS):
                found.append((len(chosen) + (parts > 1), Variant.of(net, parts, chosen)))
    found.sort(key=lambda item: item[0])
    yield from (variant for _, variant in found[:_VARIANTS])


def apply_variant(net: nn.Module, candidate: Candidate, variant: Variant) -> Gate | None:
    """The gate that a variant makes of a candidate; None if it does not apply."""
    coarse = candidate.coarser(variant.parts)
    if coarse is None:
        return None
    sizes = tuple(
        size
        for of_attribute in fitting_sizes(net, coarse.gate)
        for size in of_attribute
        if _item(net, size) in variant.sizes
    )
    if {_item(net, size) for size in sizes} != variant.sizes:
        return None
    return replace(coarse.gate, sizes=sizes)
