"""A training run: from a request to a run directory."""

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
from pyro_sbp.training.loop import Interrupted, Loop, never
from pyro_sbp.training.progress import Progress, ignore
from pyro_sbp.training.result import write_result
from pyro_sbp.training.summary import Summary

__all__ = ["train"]


@workers_watched()
def train(
    request: Request,
    data: ImageData,
    directory: Path,
    watch: Callable[[Progress], None] = ignore,
    stop: Callable[[], bool] = never,
    fabric: Fabric | None = None,
    logger: Logger | Sequence[Logger] = (),
) -> Summary:
    """Train, prune and fine-tune a network as requested, and write a run directory.

    If the directory has a checkpoint of the same request, the run resumes from it, with the same
    result as without the interruption.

    Args:
        request: the network, the data set, the recipe and the settings of the machine.
        data: the data, as `load_dataset` returns it for the architecture.
        directory: the run directory; it is created if it does not exist.
        watch: called with the progress during training.
        stop: called after every step; if it returns true, a checkpoint is written and training
            stops.
        fabric: the devices and the precision, from `launch`; by default those of the request.
        logger: one or several loggers of Lightning Fabric, for the settings, the metrics of every
            epoch, and the numbers of the summary. Only the first process uses them. The step is the
            number of epochs over all phases.

    Returns:
        The summary, which is also written to `summary.json`.

    Raises:
        RequestError: the architecture cannot be built or does not accept the images of the data,
            the recipe names a gate that the network does not have, the directory cannot be written
            or is locked by another process, or its checkpoint belongs to another request.
        EquivalenceError: the outputs of the pruned and the masked network differ.
        FloatingPointError: the loss or a parameter is not finite. The last checkpoint with finite
            values is kept.
        WorkerDied: a process that reads images was killed. The last checkpoint is kept.
        OtherProcessError: another process of the run has failed.
        Interrupted: `stop` returned true.
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
            # The first process continues with the random state after building the network.
            torch.manual_seed(request.seed + fabric.global_rank)
        loop = Loop(request, job.method, job.data, directory, fabric, watch, stop, log)
        # The scope keeps Pyro's global parameter store unchanged. Pyro's validation is disabled: it
        # costs a sixth of a step, and would hide our own error for a loss that is not finite.
        with pyro.get_param_store().scope(), pyro.validation_enabled(False):
            loop.go()
        summary = fabric.broadcast(on_first(fabric, lambda: _finish(job, loop, directory)))
        assert summary is not None
        return summary


def _finish(job: Job, loop: Loop, directory: Path) -> Summary:
    # A run that was stopped before it wrote its summary may have left a partly written network. No
    # other process is writing it, because this process holds the lock of the directory.
    for left in directory.glob("pruned.*.part"):
        shutil.rmtree(left, ignore_errors=True)
    summary = write_result(job, loop, directory / "pruned", overwrite=True)
    write_json(directory / "summary.json", summary.to_dict())
    loop.log.result(summary, len(loop.lines))
    return summary


@contextmanager
def _ended(log: Log) -> Iterator[None]:
    """Close the loggers with the status of the run."""
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
    """Create the run directory if necessary, and hold its lock."""
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
        # Without a checkpoint the run starts at the beginning, with the current request.
        if not (directory / "checkpoint.pt").exists():
            write_json(directory / "recipe.json", asked)
        yield
