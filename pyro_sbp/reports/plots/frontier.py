"""Plots of test error against the MACs ratio, for runs and published results."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
        ax.set_xlim(min(0.9, 0.9 * min(ratios)), 3.2 * max(ratios))
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


#: Approximate sizes in labels and markers, as shares of the axes.
LETTER, LINE, MARKER = 0.0145, 0.045, 0.016
#: The steps of one line, up or down, that a label may be moved, nearest first.
STEPS = (0, 1, -1, 2, -2, 3, -3, 4, -4)


class _Box(NamedTuple):
    """A rectangle in the coordinates of the axes, from 0 to 1."""

    left: float
    right: float
    bottom: float
    top: float

    def overlap(self, other: _Box) -> float:
        """The area that two rectangles share."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(0.0, width) * max(0.0, height)


def _name_points(ax: Any, points: Sequence[Point]) -> None:
    """Add labels in the colours of their points, where they overlap least."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()

    def height_of(error: float) -> float:
        return (error - bottom) / (top - bottom)

    places = [
        (math.log(point.macs_ratio / left) / math.log(right / left), height_of(point.error))
        for point in points
    ]
    taken = []
    for point, (x, y) in zip(points, places, strict=True):
        taken.append(_Box(x - MARKER, x + MARKER, y - MARKER, y + MARKER))
        if point.spread:
            low, high = map(height_of, point.spread)
            taken.append(_Box(x - MARKER / 2, x + MARKER / 2, low, high))
    named = [(place, point) for place, point in zip(places, points, strict=True) if point.name]
    for (x, y), point in sorted(named, key=lambda pair: pair[0]):
        box = min(_boxes(x, y, point.name), key=lambda box: _cost(box, taken))
        taken.append(box)
        colour = color_cycle()[KINDS[point.kind][1]]
        to_right, middle = box.left > x, (box.bottom + box.top) / 2
        ax.annotate(
            point.name,
            xy=(x, y),
            xytext=(box.left if to_right else box.right, middle),
            xycoords="axes fraction",
            textcoords="axes fraction",
            fontsize=7.5,
            color=colour,
            va="center",
            ha="left" if to_right else "right",
            # A line to the point of a label that was moved.
            arrowprops=(
                {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
                if abs(middle - y) > LINE / 2
                else None
            ),
        )


def _boxes(x: float, y: float, name: str) -> Iterator[_Box]:
    """The boxes that a label may have, best first."""
    width = LETTER * len(name)
    for step in STEPS:
        middle = y + step * LINE
        for start in (x + 0.02, x - 0.02 - width):
            yield _Box(start, start + width, middle - LINE / 2, middle + LINE / 2)


def _cost(box: _Box, taken: Sequence[_Box]) -> float:
    """The area of a label that is over others or outside the axes."""
    area = (box.right - box.left) * (box.top - box.bottom)
    outside = area - box.overlap(_Box(0, 1, 0, 1))
    return round(outside + sum(map(box.overlap, taken)), 6)
