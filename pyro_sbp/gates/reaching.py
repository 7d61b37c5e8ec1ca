"""Measure which columns any row of each writer reaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_sbp.gates.flow import OUTPUT, Flow, apart
from pyro_sbp.gates.loose import Met, Place
from pyro_sbp.gates.probe import Astray, Probe
from pyro_sbp.gates.uses import hidden_of

__all__ = ["UNREAD", "Reach", "join_unread", "measure_reach"]

#: The reason why units that nothing uses are not prunable.
UNREAD = "no layer reads it"


@dataclass
class Reach:
    """The measurement of one writer: which columns its rows reach.

    Attributes:
        writer: the name of the layer.
        classes: the class of each row, ``[rows]``. At first every row is a class. If several rows
            reach the same column, rows that belong together form a class.
        seen: from a layer to the columns that any row reaches.
        columns: from a layer to the class that reaches each column, or -1.
        beside: if no layer reads the rows, the writer to whose rows they are added. Both writers
            are cut together.
        met: the places of the tensors that belong to no known layer and that the rows meet.
        problem: the reason why the rows are not units, or None.
    """

    writer: str
    classes: Tensor
    seen: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    beside: str | None = None
    met: set[tuple[str, str]] = field(default_factory=set)
    problem: str | None = None

    @property
    def size(self) -> int:
        """The number of classes."""
        return int(self.classes.max()) + 1


def measure_reach(probe: Probe, reaches: Mapping[str, Reach]) -> None:
    """Measure which columns any row of each writer reaches.

    Writers whose values cannot reach the same layer share a pass.
    """
    probe.flow = probe.loose.meetings = flow = Flow()
    try:
        probe.run({})
        bounds = {writer: flow.reached_by(writer) for writer in reaches}
    except Astray:
        bounds = {}
    finally:
        probe.flow = probe.loose.meetings = None
    for writers in apart(bounds) if bounds else [[writer] for writer in reaches]:
        members = [reaches[writer] for writer in writers]
        together = len(members) > 1
        if not together or not _reach_of(probe, members, bounds):
            for member in members:
                _reach_of(probe, [member], {})


def _reach_of(
    probe: Probe, reaches: Sequence[Reach], bounds: Mapping[str, set[str | Place]]
) -> bool:
    """Measure which columns any row of some writers reaches, in one pass.

    Args:
        probe: the probe.
        reaches: the writers.
        bounds: what each of several writers may reach.

    Returns:
        False if it cannot be decided which of several writers reaches a column.
    """
    inject = {
        reach.writer: torch.ones(len(reach.classes), dtype=torch.bool, device="cpu")
        for reach in reaches
    }
    probe.loose.meetings = met = Met()
    try:
        hits_output = probe.run(inject)
    except Astray as error:
        if len(reaches) > 1:
            return False
        reaches[0].problem = str(error)
        return True
    finally:
        probe.loose.meetings = None
    hits = {name: hit for name, hit in probe.seen.items() if bool(hit.any())}
    found: set[str | Place] = {*hits, *met.places, *([OUTPUT] if hits_output else [])}
    if len(reaches) > 1 and not found <= set().union(*(bounds[r.writer] for r in reaches)):
        return False
    for reach in reaches:
        mine = bounds.get(reach.writer, found)
        if OUTPUT in found & mine:
            reach.problem = "reaches an output of the network"
            continue
        reach.seen = {name: hit for name, hit in hits.items() if name in mine}
        reach.met = met.places & mine
        own, layouts = hidden_of(reach.writer), probe.uses.layouts
        if not any(layouts[name].role == "reader" for name in reach.seen if name != own):
            reach.problem = UNREAD
    return True


def join_unread(probe: Probe, reaches: Sequence[Reach]) -> None:
    """For writers that no layer reads, find the residual stream to which they are added.

    An example is the last layer of a residual stack of which only earlier sums are used. The values
    of such a layer do not matter, but it must have as many rows as the stream, in any order.
    """
    unread = [reach for reach in reaches if reach.problem == UNREAD]
    others = [reach for reach in reaches if reach.problem is None]
    for reach in unread:
        reached = _trace(probe, reach)
        meeting = [
            (min(common), other.writer)
            for other in others
            if len(other.classes) == len(reach.classes)
            and (common := reached & _trace(probe, other))
        ]
        if meeting:
            reach.problem, reach.beside = None, min(meeting)[1]


def _trace(probe: Probe, reach: Reach) -> set[int]:
    """The numbers of the function calls, in order, whose results have NaN from a writer."""
    probe.trace = set()
    try:
        probe.run({reach.writer: torch.ones_like(reach.classes, dtype=torch.bool)})
        return probe.trace
    finally:
        probe.trace = None
