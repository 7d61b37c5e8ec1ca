"""Group the writers that share units, and find which of their rows form a unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from scipy.cluster.hierarchy import DisjointSet
from torch import Tensor

from pyro_sbp.gates.gate import Gate, Span
from pyro_sbp.gates.loose import Follower
from pyro_sbp.gates.reaching import Reach
from pyro_sbp.gates.uses import Layout

__all__ = ["Candidate", "candidates", "groups_of_writers"]


@dataclass(frozen=True)
class Candidate:
    """A gate that has been measured, but not yet proven.

    Attributes:
        gate: the gate.
        layouts: from name to the layout of rows and columns.
        reaches: the measurement of each writer. A gate on input features has none.
        followers: tensors that may have slices that must be cut together with its units.
    """

    gate: Gate
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    reaches: tuple[Reach, ...] = ()
    followers: tuple[Follower, ...] = ()

    def coarser(self, parts: int) -> Candidate | None:
        """Build a candidate with larger units, each of which consists of several of these units.

        Code that splits units into parts of equal size, for example with ``chunk``, needs this. A
        larger unit has one of these units from each part.

        Args:
            parts: the number of equal parts into which the units of the largest writers are
                divided.

        Returns:
            The candidate, or None if the units cannot be divided into so many equal parts of more
            than one unit.
        """
        if parts == 1:
            return self
        most = max((reach.size for reach in self.reaches), default=0)
        if most % parts or most == parts:
            return None
        reaches = tuple(
            _coarser(reach, most // parts) if reach.size == most else reach
            for reach in self.reaches
        )
        gate = _gate(self.layouts, reaches, self.followers)
        return Candidate(gate, self.layouts, reaches, self.followers)


def _coarser(reach: Reach, size: int) -> Reach:
    """The measurement in which classes with the same number modulo `size` are one class."""
    columns = {
        name: torch.where(classes >= 0, classes % size, -1)
        for name, classes in reach.columns.items()
    }
    return replace(reach, classes=reach.classes % size, columns=columns)


def candidates(
    layouts: Mapping[str, Layout],
    groups: Sequence[Sequence[Reach]],
    followers: Sequence[Sequence[Follower]],
) -> list[Candidate]:
    """Build candidates from groups of writers, in the order of their first writers.

    For a writer without a candidate, the attribute `problem` of its measurement is set.

    Args:
        layouts: from name to the layout of rows and columns.
        groups: from `groups_of_writers`.
        followers: for each group, the tensors that may have slices for its units.
    """
    return [
        found
        for group, of_group in zip(groups, followers, strict=True)
        for found in _split_at_single_units(layouts, group, tuple(of_group))
    ]


def groups_of_writers(reaches: Sequence[Reach]) -> list[list[Reach]]:
    """Group the writers that reach a common column, in the order of their first writers.

    A writer that no layer reads is in the group of the writer to whose rows its rows are added.
    """
    together = DisjointSet(reach.writer for reach in reaches)
    owner: dict[tuple[str, int], str] = {}
    for reach in reaches:
        if reach.beside in together:
            together.merge(reach.beside, reach.writer)
        for name, classes in reach.columns.items():
            for column in torch.nonzero(classes >= 0).flatten().tolist():
                together.merge(owner.setdefault((name, column), reach.writer), reach.writer)
    groups: dict[str, list[Reach]] = {}
    for reach in reaches:
        groups.setdefault(together[reach.writer], []).append(reach)
    return list(groups.values())


def _split_at_single_units(
    layouts: Mapping[str, Layout], group: Sequence[Reach], followers: tuple[Follower, ...]
) -> list[Candidate]:
    """One gate for a group of writers, or several gates if a single gate would have one unit.

    In this case, the writer with the fewest classes is taken out of the group.
    """
    gate = _gate(layouts, group, followers)
    if gate.size > 1 or len(group) == 1:
        return [Candidate(gate, layouts, tuple(group), followers)]
    # Such a writer is, for example, an attention map that multiplies all channels, or the layer of
    # keys that all heads share.
    least = min(group, key=lambda reach: reach.size)
    rest = [reach for reach in group if least.writer not in (reach.writer, reach.beside)]
    found = [
        one
        for others in groups_of_writers(rest)
        for one in _split_at_single_units(layouts, others, followers)
    ]
    if least.size > 1:
        return [*_split_at_single_units(layouts, [least], followers), *found]
    if found:
        least.problem = "has one unit, which reaches all units of another layer"
        return found
    return [Candidate(gate, layouts, tuple(group), followers)]


def _gate(
    layouts: Mapping[str, Layout], group: Sequence[Reach], followers: Sequence[Follower]
) -> Gate:
    """The gate of a group of writers. Classes that reach a common column form one unit."""
    same = DisjointSet((reach.writer, own) for reach in group for own in range(reach.size))
    rows = {reach.writer: reach.classes.tolist() for reach in group}
    owner: dict[tuple[str, int], tuple[str, int]] = {}
    for reach in group:
        for own, other in zip(rows[reach.writer], rows.get(reach.beside or "", ()), strict=False):
            same.merge((reach.writer, own), (reach.beside or "", other))
        for name, classes in reach.columns.items():
            for column, own in enumerate(classes.tolist()):
                if own >= 0:
                    unit = (reach.writer, own)
                    same.merge(owner.setdefault((name, column), unit), unit)
    # From a slice of a follower to one of the units that it reaches.
    slices: dict[tuple[int, int], Any] = {}
    for index, follower in enumerate(followers):
        for name, numbers in follower.columns.items():
            for column, own in enumerate(numbers.tolist()):
                if own >= 0 and (name, column) in owner:
                    unit = owner[name, column]
                    same.merge(slices.setdefault((index, own), unit), unit)
    number: dict[Any, int] = {}
    units = {
        reach.writer: torch.tensor(
            [number.setdefault(same[reach.writer, own], len(number)) for own in range(reach.size)],
            device="cpu",
        )
        for reach in group
    }
    spans: dict[str, Tensor] = {}
    for reach in group:
        for name, classes in reach.columns.items():
            mapped = torch.where(classes >= 0, units[reach.writer][classes.clamp(min=0)], -1)
            spans[name] = torch.maximum(spans[name], mapped) if name in spans else mapped

    following = []
    for index, follower in enumerate(followers):
        carried = [slices.get((index, own)) for own in range(follower.slices.size)]
        if any(unit is not None for unit in carried):
            of_slices = [-1 if unit is None else number[same[unit]] for unit in carried]
            its = torch.tensor(of_slices, device="cpu").repeat_interleave(follower.slices.block)
            following += [
                Span(follower.slices.layer, its, tensor=leaf, dim=dim)
                for leaf, dim in follower.slices.tensors
            ]
    columns = {
        role: [layouts[n].columns(units) for n, units in spans.items() if layouts[n].role == role]
        for role in ("reader", "channelwise", "select")
    }
    return Gate(
        name=_namesake(group, len(number)),
        size=len(number),
        writers=tuple(
            layouts[reach.writer].rows(units[reach.writer][reach.classes]) for reach in group
        ),
        readers=tuple(columns["reader"]),
        channelwise=(*columns["channelwise"], *following),
        selects=tuple(columns["select"]),
    )


def _namesake(group: Sequence[Reach], size: int) -> str:
    """The writer that gives a gate its name.

    It is the first writer that has one row for each unit and reaches at least the columns of the
    first writer of the group. If there is none, it is the first writer of the group. In a recurrent
    cell, this is the layer of the candidate state, and not the layer of the gates of the cell.

    Args:
        group: the writers.
        size: the number of units.
    """
    first = group[0]
    for reach in group:
        alike = reach.seen.keys() >= first.seen.keys() and all(
            bool((reach.seen[name] | ~hit).all()) for name, hit in first.seen.items()
        )
        if alike and len(reach.classes) == size:
            return reach.writer
    return first.writer
