"""The figure of test error against MACs: published results, our results, and baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

from pyro_sbp.errors import RequestError
from pyro_sbp.experiments import figure_files
from pyro_sbp.experiments.figure_files import describe, write_figure
from pyro_sbp.experiments.rows import TITLES, Record, Row, of_network, title
from pyro_sbp.reports.plots.frontier import Point, draw_frontier, published_points

__all__ = ["FILES", "draw", "out_of_date", "panels"]

#: The files of the figure, and whether each is for a dark page.
FILES = {"docs/frontier.svg": False, "docs/frontier-dark.svg": True}


def panels(records: Sequence[Record]) -> dict[str, list[Point]]:
    """The points of every network and data set with records, as medians over the seeds.

    A recipe is omitted if another one has fewer MACs and less error; this omits ablations.
    """
    pairs = {(record.arch, record.dataset) for record in records if not record.random_labels}
    order = list(TITLES)
    found = {}
    for arch, dataset in sorted(
        pairs, key=lambda pair: (order.index(pair[0]) if pair[0] in order else len(order), pair)
    ):
        points = found[title(arch, dataset)] = published_points(arch, dataset)
        rows = of_network(records, arch, dataset)
        for row in rows:
            if any(_beats(other, row) for other in rows):
                continue
            name = row.first.method.removeprefix("torch-pruning ")
            kind, name = (
                ("baselines", name) if row.first.baseline else ("pyro-sbp", row.first.recipe)
            )
            spread = row.spread if len(row.records) > 1 else None
            points.append(Point(kind, name, row.macs_ratio, row.error, spread))
            if row.dense is not None:
                points.append(Point("before pruning", "", 1.0, row.dense))
    return found


def _beats(other: Row, row: Row) -> bool:
    """Whether `other` has fewer MACs and less error than `row`, where neither is a baseline."""
    ours = not (other.first.baseline or row.first.baseline)
    return ours and other.macs_ratio > row.macs_ratio and other.error < row.error


def _description(drawn: Mapping[str, Sequence[Point]]) -> str:
    points = {title: [astuple(point) for point in points] for title, points in drawn.items()}
    return describe("test error against times fewer MACs", points)


def out_of_date(root: Path, records: Sequence[Record]) -> list[str]:
    """The files that are missing or were drawn from other numbers."""
    return figure_files.out_of_date(root, FILES, _description(panels(records)))


def draw(root: Path, records: Sequence[Record], names: Sequence[str]) -> None:
    """Draw the named files.

    Raises:
        RequestError: Matplotlib is not installed, there are no records, or a file cannot be
            written.
    """
    drawn = panels(records)
    if not drawn:
        raise RequestError("experiments/results has no record to draw")
    for name in names:
        figure = draw_frontier(drawn, columns=2, dark=FILES[name])
        write_figure(root / name, figure, _description(drawn))
