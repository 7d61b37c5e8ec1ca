"""A self-contained HTML page about one or several runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from pyro_sbp.errors import RequestError
from pyro_sbp.reports import pages, plots
from pyro_sbp.reports.findings import Findings, find
from pyro_sbp.reports.pictures import Pictures, empty_folder
from pyro_sbp.reports.sections.comparison import frontier, overview
from pyro_sbp.reports.sections.costs import latency, layers
from pyro_sbp.reports.sections.result import result
from pyro_sbp.reports.sections.settings import settings
from pyro_sbp.reports.sections.thresholds import thresholds
from pyro_sbp.reports.sections.training import training
from pyro_sbp.reports.sections.units import units
from pyro_sbp.training.files import write_text
from pyro_sbp.training.progress import ignore
from pyro_sbp.training.runs import Run

__all__ = ["write_report"]

#: The sections of a run after its result, by their titles. A section without parts is omitted.
SECTIONS: dict[str, Callable[[Findings, Pictures], list[str]]] = {
    "Units": units,
    "Training": training,
    "Other thresholds": thresholds,
    "Layers": layers,
    "Latency": latency,
    "Settings and machine": settings,
}


def write_report(
    runs: Sequence[Run],
    data_dir: Path | None = None,
    sweep: bool = True,
    watch: Callable[[str], None] = ignore,
    criterion: str | None = None,
) -> Path:
    """Write `report.html` into the directory of the first run, and its figures into `report/`.

    Nothing is downloaded.

    Args:
        runs: one or several runs, finished or not.
        data_dir: the directory of the data sets; by default the one with which each run was
            trained.
        sweep: whether to measure finished runs at other thresholds, which takes most of the time.
        watch: called with a line about the current step.
        criterion: the criterion that decides which units are kept; by default that of the recipe of
            each run.

    Returns:
        The path of the page.

    Raises:
        RequestError: Matplotlib is missing, or the directory cannot be written.
    """
    plots.check_matplotlib()
    target, folder = runs[0].directory / "report.html", runs[0].directory / "report"
    empty_folder(folder)
    several = len(runs) > 1
    body = []
    for run, prefix in zip(runs, _prefixes(runs), strict=True):
        watch(f"{run.directory}: reading it")
        found = find(run, data_dir, sweep, criterion)
        watch(f"{run.directory}: drawing")
        body += _of_run(found, Pictures(folder, prefix), 2 if several else 1)
    compared = frontier(runs, Pictures(folder))
    if several:
        title = f"{len(runs)} runs"
        body = [pages.heading(1, f"{title} of pyro-sbp"), overview(runs), *compared, *body]
    else:
        title = runs[0].name
        body += compared
    try:
        write_text(target, pages.page(f"pyro-sbp: {title}", body))
    except OSError as error:
        raise RequestError(str(error)) from error
    return target


def _prefixes(runs: Sequence[Run]) -> list[str]:
    """The start of the names of the figures of every run; empty if there is only one run."""
    if len(runs) == 1:
        return [""]
    count = Counter(run.name for run in runs)
    # The directories of two runs may have the same name.
    return [
        f"{index}-{run.name}-" if count[run.name] > 1 else f"{run.name}-"
        for index, run in enumerate(runs)
    ]


def _of_run(found: Findings, pictures: Pictures, level: int) -> list[str]:
    """The parts about a run, with its heading at a level."""
    run, request = found.run, found.run.request
    words = f"{request.arch} on {request.dataset} by {request.method}, seed {request.seed}"
    parts = [pages.heading(level, f"{run.name}: {words}"), *result(found)]
    for title, section in SECTIONS.items():
        content = section(found, pictures)
        if content:
            parts += [pages.heading(level + 1, title), *content]
    return parts
