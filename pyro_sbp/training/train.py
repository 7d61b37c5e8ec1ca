"""A training run: a request in, a run directory out."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pyro
import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers import Logger

from pyro_sbp.datasets.loading import ImageData
from pyro_sbp.datasets.streaming import workers_watched
from pyro_sbp.errors import RequestError
from pyro_sbp.recipes.request import Request
from pyro_sbp.training.devices import in_step, launch, on_first
from pyro_sbp.training.files import lock, write_json
from pyro_sbp.training.job import Job, machine, prepare_job, versions
from pyro_sbp.training.loggers import Log
from pyro_sbp.training.loop import Interrupted, Loop, Progress
from pyro_sbp.training.result import write_result
from pyro_sbp.training.summary import Summary

__all__ = ["train"]


@workers_watched()
def train(
    request: Request,
    data: ImageData,
    directory: Path,
    watch: Callable[[Progress], None] = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
    fabric: Fabric | None = None,
    logger: Logger | Sequence[Logger] = (),
) -> Summary:
    """Train, prune and fine-tune a network as requested, and write a run directory.

    A directory that holds the checkpoint of the same request goes on from there, to the same end.

    Args:
        request: what to do.
        data: what to do it on, as `load_dataset` gives it for the architecture.
        directory: the run directory; it is created if it does not exist.
        watch: called with the progress during training.
        stop: asked after every step whether to leave a checkpoint and stop.
        fabric: what to compute with, from `launch`; it is launched here if not given.
        logger: one or several loggers of Lightning Fabric, which the first process uses: for the
            settings, the metrics of every epoch, and the numbers of the summary. The step is the
            number of epochs over all phases.

    Returns:
        The summary, which is also written to `summary.json`.

    Raises:
        RequestError: the architecture cannot be built or does not take the data's images, the
            recipe names a gate that the network does not have, or the directory cannot be written.
        EquivalenceError: the pruned network does not compute what the masked one computes.
        FloatingPointError: the loss or a parameter is not finite any more; the checkpoint is the
            last one that was good.
        WorkerDied: a process that reads images was killed; the checkpoint is the last one.
        Interrupted: it was asked to stop.
    """
    fabric = fabric or launch(request.device, request.devices, request.precision)
    job = prepare_job(request, data, directory, fabric)
    with in_step(fabric), ExitStack() as stack:
        log = Log(logger)

        def begin() -> None:
            stack.enter_context(_begun(directory, request))
            stack.enter_context(_ended(log))
            if not (directory / "checkpoint.pt").exists():
                log.settings(request)

        on_first(fabric, begin)
        if not fabric.is_global_zero:
            # The first process goes on with the random numbers of the construction.
            torch.manual_seed(request.seed + fabric.global_rank)
        loop = Loop(request, job.method, job.data, directory, fabric, watch, stop, log)
        # Pyro's store of parameters, shared by the process, is left as it was. Validation would
        # refuse a loss that is not finite in its own words, and costs a sixth of a step.
        with pyro.get_param_store().scope(), pyro.validation_enabled(False):
            loop.go()
        summary = fabric.broadcast(on_first(fabric, lambda: _finish(job, loop, directory)))
        assert summary is not None
        return summary


def _finish(job: Job, loop: Loop, directory: Path) -> Summary:
    # A run that was stopped before it wrote its summary may have left a network, or a part of one
    # that no other process is writing, as this one holds the directory's lock.
    for left in directory.glob("pruned.*.part"):
        shutil.rmtree(left, ignore_errors=True)
    summary = write_result(job, loop, directory / "pruned", overwrite=True)
    write_json(directory / "summary.json", summary.to_dict())
    loop.log.result(summary, len(loop.lines))
    return summary


@contextmanager
def _ended(log: Log) -> Iterator[None]:
    """Tell the loggers how the run ends."""
    status = "failed"
    try:
        yield
        status = "success"
    except Interrupted:
        status = "interrupted"
        raise
    finally:
        log.end(status)


@contextmanager
def _begun(directory: Path, request: Request) -> Iterator[None]:
    """Make the run directory, or find it, and keep it for this process."""
    asked = {
        **request.to_dict(),
        "versions": versions(),
        "machine": machine(torch.device(request.device)),
        "threads": torch.get_num_threads(),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"cannot write {directory}: {error.strerror}") from error
    with lock(directory):
        # Without a checkpoint the run starts at the beginning, with what is asked for now.
        if not (directory / "checkpoint.pt").exists():
            write_json(directory / "recipe.json", asked)
        yield
