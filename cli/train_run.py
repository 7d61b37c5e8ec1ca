"""The work of `pyro-sbp train`, with messages that say how to resume it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click
from lightning_fabric import Fabric

from pyro_sbp.cli.progress_bar import ProgressBar
from pyro_sbp.cli.stopping import Stopped, StopWhenDone
from pyro_sbp.cli.train_directory import hint_after_failure, hint_at_once
from pyro_sbp.datasets.loading import ImageData
from pyro_sbp.datasets.streaming import StreamedSplit, WorkerDied
from pyro_sbp.errors import OtherProcessError, first_line
from pyro_sbp.recipes.request import Request
from pyro_sbp.training import train as training
from pyro_sbp.training.devices import launch, leave, on_first
from pyro_sbp.training.job import load_data
from pyro_sbp.training.loggers import check_logger, make_logger
from pyro_sbp.training.loop import Interrupted
from pyro_sbp.training.processes import is_first
from pyro_sbp.training.summary import Summary

__all__ = ["run"]


def run(
    request: Request,
    directory: Path,
    *,
    title: str,
    threads: int,
    workers: int | None,
    loggers: Sequence[str],
    quiet: bool,
) -> tuple[Summary, int]:
    """Train and prune a network, or resume a run.

    Args:
        request: the request of the run.
        directory: the run directory.
        title: the line that is printed when the training begins.
        threads: the number of CPU threads of each process.
        workers: as for `load_dataset`.
        loggers: the names of the loggers.
        quiet: whether to print no progress.

    Returns:
        The summary, and the number of training images.

    Raises:
        RequestError: a logger cannot be used.
        Stopped: a signal has stopped the run.
        OSError, WorkerDied, OtherProcessError: training failed; the message says how to resume.
    """
    for name in loggers:
        check_logger(name)
    fabric = launch(request.device, request.devices, request.precision, threads)
    # From here on, a signal stops the run only after a checkpoint, because all processes must stop
    # together.
    with StopWhenDone() as stop:
        data = _load(request, workers, fabric)
        if isinstance(data.train, StreamedSplit) and not quiet:
            readers = f"{data.train.workers} worker{'s' * (data.train.workers > 1)}"
            click.echo(f"images stay on disk, read by {readers}", err=True)
        with ProgressBar(quiet, title) as bar, _saying_how_to_resume(directory, stop):
            logger = [make_logger(name, directory) for name in loggers] if is_first() else []
            summary = training.train(request, data, directory, bar.update, stop, fabric, logger)
    leave()
    return summary, len(data.train)


def _load(request: Request, workers: int | None, fabric: Fabric) -> ImageData:
    def load() -> ImageData:
        return load_data(request, workers=workers, device=fabric.device)

    return on_first(fabric, load) or load()  # the first process may download the data


@contextmanager
def _saying_how_to_resume(directory: Path, stop: StopWhenDone) -> Iterator[None]:
    """Within the context, the messages of failures say how to resume the run."""
    try:
        yield
    except Stopped as error:
        raise Stopped(error.number, hint_at_once(directory)) from error
    except Interrupted as error:
        hint = f"stopped; resume with `pyro-sbp train --resume {directory}`"
        raise Stopped(stop.number or 0, hint) from error
    except (OSError, WorkerDied, OtherProcessError) as error:
        kind = OSError if isinstance(error, OSError) else type(error)
        raise kind(first_line(error) + hint_after_failure(directory)) from error
