"""Measure which columns are reached by at least one row of each writer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_sbp.gates.flow import OUTPUT, Flow, disjoint_groups
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
        classes: the class of each row, int64 ``[rows]``. At first, every row is a class. If several
            rows reach the same column, rows that belong together form a class.
        seen: from a layer to the columns that at least one row reaches, bool ``[columns]``.
        columns: from a layer to the class that reaches each column, or -1, int64 ``[columns]``. It
            is empty before the classes are measured.
        beside: if no layer reads the rows, the writer to whose rows they are added, or None. Both
            writers are cut together.
        met: the places of the tensors that belong to no known layer and that functions combine with
            the rows.
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
    """Measure which columns are reached by at least one row of each writer.

    Writers whose values cannot reach the same layer share a pass. If it is not certain which of
    them reaches what, each of them is measured in a separate pass. The results are recorded in the
    measurements.

    Args:
        probe: the probe of the network, after its first pass.
        reaches: from the name of a writer to its measurement.
    """
    probe.flow = probe.loose.meetings = flow = Flow()
    try:
        probe.run({})
        bounds = {writer: flow.reached_by(writer) for writer in reaches}
    except Astray:
        bounds = {}
    finally:
        probe.flow = probe.loose.meetings = None
    usual = probe.course
    groups = disjoint_groups(bounds) if bounds else [[writer] for writer in reaches]
    for writers in groups:
        members = [reaches[writer] for writer in writers]
        if len(members) == 1 or not _measure_together(probe, members, bounds, usual):
            for member in members:
                _measure_alone(probe, member)


def _measure_together(
    probe: Probe,
    reaches: Sequence[Reach],
    bounds: Mapping[str, set[str | Place]],
    usual: tuple[dict[str, int], int],
) -> bool:
    """Measure several writers in one pass.

    Args:
        probe: the probe.
        reaches: the writers.
        bounds: what each writer may reach.
        usual: the `course` of a pass without NaN. If the shared pass has another course, the NaN of
            one writer may have changed what the others reach.

    Returns:
        Whether it is certain which writer reaches what. If not, nothing is recorded.
    """
    try:
        hits = _hits(probe, reaches)
    except Astray:
        return False
    possible = set().union(*(bounds[reach.writer] for reach in reaches))
    if probe.course != usual or not hits.keys() <= possible:
        return False
    for reach in reaches:
        mine = bounds[reach.writer]
        _record(probe, reach, {key: hit for key, hit in hits.items() if key in mine})
    return True


def _measure_alone(probe: Probe, reach: Reach) -> None:
    """Measure one writer. If the network fails on NaN, this is the problem of the writer."""
    try:
        _record(probe, reach, _hits(probe, [reach]))
    except Astray as error:
        reach.problem = str(error)


def _hits(probe: Probe, reaches: Sequence[Reach]) -> dict[str | Place, Tensor | None]:
    """What the rows of some writers reach in a pass.

    Returns:
        From a layer to the columns that are reached. Further keys, with the value None, are the
        places of other tensors with which the rows are combined, and `OUTPUT` if NaN reaches an
        output of the network.

    Raises:
        Astray: the network fails on NaN.
    """
    inject = {reach.writer: torch.ones_like(reach.classes, dtype=torch.bool) for reach in reaches}
    probe.loose.meetings = met = Met()
    try:
        hits_output = probe.run(inject)
    finally:
        probe.loose.meetings = None
    hits: dict[str | Place, Tensor | None] = {
        name: hit for name, hit in probe.seen.items() if bool(hit.any())
    }
    return hits | dict.fromkeys(met.places) | ({OUTPUT: None} if hits_output else {})


def _record(probe: Probe, reach: Reach, hits: Mapping[str | Place, Tensor | None]) -> None:
    """Record what the rows of a writer reach."""
    if OUTPUT in hits:
        reach.problem = "reaches an output of the network"
        return
    reach.seen = {str(name): hit for name, hit in hits.items() if hit is not None}
    reach.met = {place for place in hits if isinstance(place, tuple)}
    own, layouts = hidden_of(reach.writer), probe.uses.layouts
    if not any(layouts[name].role == "reader" for name in reach.seen if name != own):
        reach.problem = UNREAD


def join_unread(probe: Probe, reaches: Sequence[Reach]) -> None:
    """For writers that no layer reads, find the residual stream to which they are added.

    An example is the last layer of a residual stack, if only earlier sums of the stream are used.
    The values of such a layer do not matter, but it must have as many rows as the stream, so that
    they can be added. The writer of the stream becomes its `beside`.
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
    """The numbers of the function calls whose results have NaN, if all rows of a writer are NaN."""
    probe.trace = set()
    try:
        probe.run({reach.writer: torch.ones_like(reach.classes, dtype=torch.bool)})
        return probe.trace
    finally:
        probe.trace = None
