"""The comparison of runs with each other and with published results."""

from __future__ import annotations

from collections.abc import Sequence

from pyro_sbp.reports import pages, plots
from pyro_sbp.reports.pictures import Pictures
from pyro_sbp.reports.published import PUBLISHED
from pyro_sbp.training.runs import Run

__all__ = ["frontier", "overview"]


def overview(runs: Sequence[Run]) -> str:
    """A table of the runs and their results."""
    rows = []
    for run in runs:
        done = run.summary
        rows.append(
            (
                run.name,
                run.request.arch,
                run.request.dataset,
                run.request.recipe.name,
                run.request.seed,
                "not finished" if done is None else pages.percent(run.error),
                "-" if done is None else f"{done.macs.ratio:.2f}x",
                "-" if done is None else f"{done.parameters.ratio:.2f}x",
            )
        )
    head = ("run", "arch", "data set", "recipe", "seed", "test error", "MACs", "parameters")
    return pages.table(head, rows, "The runs, and the ratios of their MACs and parameters")


def frontier(runs: Sequence[Run], pictures: Pictures) -> list[str]:
    """The errors and MACs of the finished runs and of published results; empty if there is nothing
    to compare."""
    finished = [run for run in runs if run.summary is not None]
    if not finished:
        return []
    pairs = {(run.request.arch, run.request.dataset) for run in finished}
    papers = [paper for paper in PUBLISHED if (paper.arch, paper.dataset) in pairs]
    if not papers and len(finished) == 1:
        return []
    mine = "; ".join(
        f"{run.name}: {pages.percent(run.error)} at {run.macs_ratio:.1f} times" for run in finished
    )
    theirs = "; ".join(f"{p.method}: {p.error} % at {p.macs_ratio:.1f} times" for p in papers)
    parts = [
        pages.heading(2, "Error against MACs"),
        pages.paragraph(
            "The runs after their last epoch, and published results. Most papers report the best "
            "test error of all epochs, so small differences mean little. MACs are counted from the "
            "published units."
        ),
        pictures(
            "frontier",
            plots.frontier,
            f"Test error against the MACs ratio. Runs: {mine}. Published: {theirs or 'none'}.",
            runs,
        ),
    ]
    if papers:
        rows = [
            (p.method, p.arch, f"{p.error:.2f} %", f"{p.macs_ratio:.2f}x", p.units or "-", p.source)
            for p in papers
        ]
        head = ("method", "arch", "test error", "MACs", "units left", "source")
        parts.append(pages.details("Published results", [pages.table(head, rows, "Published")]))
    return parts
