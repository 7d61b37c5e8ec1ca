"""Find the tensors outside of known layers that must be cut together with the units of writers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from pyro_sbp.gates.classes import bits_of, codes
from pyro_sbp.gates.loose import (
    Follower,
    Slices,
    decode,
    slices_to_try,
)
from pyro_sbp.gates.probe import Astray, Probe
from pyro_sbp.gates.reaching import Reach

__all__ = ["follow"]


def follow(probe: Probe, groups: Sequence[Sequence[Reach]]) -> list[list[Follower]]:
    """Find the tensors that belong to no known layer and have slices for the units of writers.

    Args:
        probe: the probe of the network, after its first pass.
        groups: groups of writers. Two groups reach no common column. Therefore tensors that are
            combined with the units of different groups share passes.

    Returns:
        The followers of each group.
    """
    weights = set(probe.uses.products.values())
    met = [set().union(*(reach.met for reach in group)) - weights for group in groups]
    pending = [
        (slices, [n for n, here in enumerate(met) if any(p in here for p in slices.places)])
        for slices in slices_to_try(probe.loose, set().union(*met))
    ]
    columns = [_columns_of(group) for group in groups]
    found: list[list[Follower]] = [[] for _ in groups]
    while pending:
        chosen: list[tuple[Slices, list[int]]] = []
        for item in pending:
            if not any(set(item[1]) & set(others) for _, others in chosen):
                chosen.append(item)
        pending = [item for item in pending if item not in chosen]
        passes = _passes_of(probe, [slices for slices, _ in chosen], set().union(*columns))
        for slices, numbers in chosen:
            here = [columns[number] for number in numbers]
            follower = decode(slices, passes[: 2 * bits_of(slices.size)], _merged(here))
            if follower is not None:
                for number in numbers:
                    found[number].append(follower)
            elif len(slices.tensors) > 1:
                pending += [(single, numbers) for single in slices.singly()]
            else:
                sizes = {reach.size for number in numbers for reach in groups[number]}
                pending += [(blocks, numbers) for blocks in slices.in_blocks(sorted(sizes))]
    return found


def _columns_of(group: Sequence[Reach]) -> dict[str, Tensor]:
    """The columns of layers that the units of a group reach, bool."""
    return _merged([{n: c >= 0 for n, c in reach.columns.items()} for reach in group])


def _merged(columns: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The union of sets of columns, each given by layer."""
    merged: dict[str, Tensor] = {}
    for one in columns:
        for name, here in one.items():
            merged[name] = merged[name] | here if name in merged else here
    return merged


def _passes_of(
    probe: Probe, all_slices: Sequence[Slices], until: set[str]
) -> list[dict[str, Tensor]]:
    """The columns that slices reach, by layer, in each of the passes of their `codes`.

    Args:
        probe: the probe.
        all_slices: the slices that share the passes.
        until: the layers after whose calls a pass may stop.
    """
    passes = []
    for index in range(2 * max(bits_of(slices.size) for slices in all_slices)):
        for slices in all_slices:
            if index < 2 * bits_of(slices.size):
                probe.loose.fill(slices, codes(slices.size)[index])
        try:
            probe.run({}, until)
            passes.append(probe.seen)
        except Astray:
            passes.append({})
        finally:
            probe.loose.restore()
    return passes
