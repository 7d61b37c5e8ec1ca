"""The figure of test error against MACs: published results, our results, and baselines."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

from pyro_sbp.errors import RequestError
from pyro_sbp.experiments.rows import TITLES, Record, Row, of_network, title
from pyro_sbp.reports.plots.frontier import Point, draw_frontier, published_points
from pyro_sbp.reports.plots.style import svg
from pyro_sbp.training.files import write_whole

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
    """The description in the metadata of the files: a hash of the points, independent of the style
    and of Matplotlib."""
    points = {title: [astuple(point) for point in points] for title, points in drawn.items()}
    text = json.dumps(points, sort_keys=True)
    return f"test error against times fewer MACs; data {hashlib.sha256(text.encode()).hexdigest()}"


def out_of_date(root: Path, records: Sequence[Record]) -> list[str]:
    """The files that are missing or were drawn from other numbers."""
    description = _description(panels(records))
    paths = {name: root / name for name in FILES}
    return [
        name
        for name, path in paths.items()
        if not path.is_file() or description not in path.read_text("utf-8")
    ]


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
        try:
            write_whole(root / name, svg(figure, _description(drawn)))
        except OSError as error:
            raise RequestError(str(error)) from error
