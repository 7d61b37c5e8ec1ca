"""pyro-sbp report: a run, or several, on one page."""

from __future__ import annotations

from pathlib import Path

import click

from pyro_sbp.cli.common import find_run
from pyro_sbp.cli.threads import threads_to_use
from pyro_sbp.training.runs import Run

__all__ = ["report"]


@click.command()
@click.argument("runs", nargs=-1, metavar="[RUN ...]", type=click.Path(path_type=Path))
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="Where the data sets lie.  [default: where each run was trained from]",
)
@click.option("--no-sweep", is_flag=True, help="Leave out the errors at other thresholds.")
def report(runs: tuple[Path, ...], data_dir: Path | None, no_sweep: bool) -> None:
    """Write report.html into the directory of a run, and its pictures into report/.

    RUN is a run directory, finished or not; the newest run if it is left out. With several the page
    compares them and lies in the first. It needs no network: nothing is downloaded.
    """
    found = [Run.read(find_run(run, finished=False)) for run in runs or (None,)]

    threads = threads_to_use()

    import torch

    from pyro_sbp.reports.report import write_report

    torch.set_num_threads(threads)
    page = write_report(found, data_dir, not no_sweep, lambda words: click.echo(words, err=True))
    click.echo(f"report: {page}")
