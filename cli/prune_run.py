"""The work of `pyro-sbp prune`."""

from __future__ import annotations

from pathlib import Path

import click
import torch

from pyro_sbp.cli.prune_request import Options
from pyro_sbp.deployment.runtimes import check_runtimes
from pyro_sbp.deployment.speedup import Speedup
from pyro_sbp.errors import RequestError
from pyro_sbp.pruning.budgets import Budget, ratio_budget
from pyro_sbp.recipes.request import Request
from pyro_sbp.training.again import prune_again
from pyro_sbp.training.job import load_data
from pyro_sbp.training.latency_file import read_unit_latency
from pyro_sbp.training.summary import Summary

__all__ = ["prune_run"]


def prune_run(request: Request, run: Path, target: Path, options: Options, threads: int) -> Summary:
    """Prune a finished run again, and write the network.

    Args:
        request: the request of the run.
        run: the run directory.
        target: the directory for the network.
        options: the options of the command.
        threads: the number of CPU threads.

    Raises:
        RequestError: a budget is out of range, or cannot be met.
    """
    torch.set_num_threads(threads)
    round_to = _multiple(options.round_to, run)
    data = load_data(request)
    try:
        budget = _budget(options, request, threads)
    except ValueError as error:
        raise RequestError(str(error)) from error
    return prune_again(
        request,
        data,
        run,
        target,
        budget=budget,
        threshold=options.threshold,
        criterion=options.criterion,
        max_error_increase=options.max_error_increase,
        round_to=round_to,
        min_units=options.min_units,
        finetune_epochs=options.finetune_epochs,
        distill=options.distill,
        tell=lambda line: click.echo(line, err=True),
    )


def _multiple(round_to: int | str, run: Path) -> int:
    """The number to whose multiples units are rounded; "auto" computes it from the latencies of the
    run."""
    if isinstance(round_to, int):
        return round_to
    multiple = read_unit_latency(run).round_to()
    click.echo(f"units are rounded to multiples of {multiple}", err=True)
    return multiple


def _budget(options: Options, request: Request, threads: int) -> Budget | None:
    """The budget of the options, except for `max_error_increase`; None if there is none.

    Raises:
        ValueError: a number is out of range, or the runtime is not available.
    """
    if options.speedup is None:
        return ratio_budget(options.macs_ratio, options.parameters_ratio)
    runtime = options.runtime or "eager"
    check_runtimes([runtime])
    return Speedup(
        options.speedup,
        batch_size=options.batch_size or 1,
        runtime=runtime,
        threads=threads,
        device=request.device,
    )
