"""Plots of test error against the MACs ratio, for runs and published results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_sbp.errors import RequestError
from pyro_sbp.reports.plots.style import (
    WIDTH,
    color_cycle,
    drawing,
    minor_ticks,
    new_figure,
    plain_ticks,
    run_of,
)
from pyro_sbp.reports.published import published
from pyro_sbp.training.runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


__all__ = ["Point", "draw_frontier", "frontier", "published_points"]


#: The points of a frontier: marker, index of the colour, fill style and size.
KINDS = {
    "published": ("s", 1, "full", 6),
    "pyro-sbp": ("o", 0, "full", 8),
    "before pruning": ("o", 0, "none", 6),
    "baselines": ("^", 2, "full", 7),
}


@dataclass(frozen=True)
class Point:
    """A network in a plot of the frontier.

    Attributes:
        kind: a key of `KINDS`.
        name: the label of the point; may be empty.
        macs_ratio: MACs of the dense network divided by those of this network.
        error: the test error in percent.
        spread: the smallest and the largest error, if `error` is the median of several seeds.
    """

    kind: str
    name: str
    macs_ratio: float
    error: float
    spread: tuple[float, float] | None = None


def frontier(sources: Sequence[Run | str | Path], dark: bool = False) -> Figure:
    """Plot the test error against the MACs ratio, for finished runs and published results.

    There is one panel for each pair of network and data set.

    Raises:
        RequestError: no run has finished.
    """
    panels: dict[tuple[str, str], list[Point]] = {}
    for run in map(run_of, sources):
        ratio, error = run.macs_ratio, run.error
        if run.summary is None or ratio is None or error is None:
            continue
        pair = (run.request.arch, run.request.dataset)
        points = panels.setdefault(pair, published_points(*pair))
        points.append(Point("pyro-sbp", run.name, ratio, error))
        dense = run.summary.error.dense
        if dense is not None:
            points.append(Point("before pruning", "", 1, dense))
    if not panels:
        raise RequestError("no run has finished")
    titled = {f"{arch} on {dataset}": points for (arch, dataset), points in panels.items()}
    return draw_frontier(titled, dark=dark)


def published_points(arch: str, dataset: str) -> list[Point]:
    """The published results for a network, as points of its frontier."""
    return [
        Point("published", paper.method, paper.macs_ratio, paper.error)
        for paper in published(arch, dataset)
    ]


@drawing
def draw_frontier(panels: Mapping[str, Sequence[Point]], columns: int = 1) -> Figure:
    """Plot the test error against the MACs ratio, with a logarithmic axis for the ratio.

    Points that these axes cannot show are omitted.

    Args:
        panels: the points of every panel, by its title.
        columns: the number of panels side by side.

    Raises:
        RequestError: a panel has no point that can be drawn.
    """
    panels = {title: _placed(title, points) for title, points in panels.items()}
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = new_figure(3.9 * rows, rows, columns, width=WIDTH * columns)
    for ax, (title, points) in zip(axes.flat, panels.items(), strict=False):
        labels = dict.fromkeys(point.kind for point in points)
        for point in points:
            marker, index, fill, size = KINDS[point.kind]
            style = {
                "color": color_cycle()[index],
                "label": point.kind if point.kind in labels else None,
            }
            labels.pop(point.kind, None)
            ax.plot(point.macs_ratio, point.error, marker, fillstyle=fill, markersize=size, **style)
            if point.spread:
                ends = [[abs(end - point.error)] for end in point.spread]
                ax.errorbar(point.macs_ratio, point.error, ends, fmt="none", ecolor=style["color"])
        ax.set(xscale="log", xlabel="times fewer MACs", ylabel="test error, %", title=title)
        ratios = [point.macs_ratio for point in points]
        ax.set_xlim(min(0.9, 0.9 * min(ratios)), 1.9 * max(ratios))
        ax.margins(y=0.12)
        _name_points(ax, points)
        plain_ticks(ax.xaxis)
        minor_ticks(ax.xaxis)
        ax.legend(fontsize=9, loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2)
    for ax in list(axes.flat)[len(panels) :]:
        ax.set_visible(False)
    return figure


def _placed(title: str, points: Sequence[Point]) -> list[Point]:
    """The points that a logarithmic and a linear axis can show."""
    placed = [p for p in points if 0 < p.macs_ratio < math.inf and math.isfinite(p.error)]
    if not placed:
        raise RequestError(f"{title} has no result that can be drawn")
    return placed


def _name_points(ax: Any, points: Sequence[Point]) -> None:
    """Add labels next to points, moved up or down so that they do not overlap."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    letter, line, marker = 0.0145, 0.045, 0.014  # approximate shares of the axes
    places = [
        (
            math.log(point.macs_ratio / left) / math.log(right / left),
            (point.error - bottom) / (top - bottom),
        )
        for point in points
    ]
    taken = [(place - marker, place + marker, height) for place, height in places]
    named = ((at, point.name) for at, point in zip(places, points, strict=True) if point.name)
    for (place, height), name in sorted(named):
        place += 0.02
        for step in (0, 1, -1, 2, -2, 3, -3, 4, -4):
            at = height + step * line
            free = all(
                abs(at - other) >= line or place > end or place + letter * len(name) < begin
                for begin, end, other in taken
            )
            if free:
                break
        taken.append((place, place + letter * len(name), at))
        ax.text(place, at, name, transform=ax.transAxes, fontsize=7.5, va="center")
