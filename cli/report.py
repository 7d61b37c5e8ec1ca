"""pyro-sbp report: write an HTML page about one or several runs."""

from __future__ import annotations

from pathlib import Path

import click

from pyro_sbp.cli.common import criterion_option, find_run
from pyro_sbp.cli.threads import threads_to_use
from pyro_sbp.training.runs import Run

__all__ = ["report"]


@click.command()
@click.argument("runs", nargs=-1, metavar="[RUN ...]", type=click.Path(path_type=Path))
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="Directory of the data sets.  [default: that of each run]",
)
@criterion_option
@click.option("--no-sweep", is_flag=True, help="Do not measure the errors at other thresholds.")
def report(
    runs: tuple[Path, ...], data_dir: Path | None, criterion: str | None, no_sweep: bool
) -> None:
    """Write an HTML page about one or several runs.

    RUN is a run directory, finished or not; by default the newest run. The page is written to
    RUN/report.html and its pictures to RUN/report/. For several runs, the page compares them and is
    written to the directory of the first run. Nothing is downloaded.
    """
    found = [Run.read(find_run(run, finished=False)) for run in runs or (None,)]
    for run in found:
        # Raises for a wrong criterion, before anything is measured.
        run.request.recipe.rule(criterion)

    threads = threads_to_use()

    import torch

    from pyro_sbp.reports.report import write_report

    torch.set_num_threads(threads)
    page = write_report(
        found, data_dir, not no_sweep, lambda words: click.echo(words, err=True), criterion
    )
    click.echo(f"report: {page}")
