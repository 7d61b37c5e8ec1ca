"""Prune finished runs again, with other settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import torch

from pyro_sbp.datasets.loading import ImageData
from pyro_sbp.datasets.streaming import workers_watched
from pyro_sbp.errors import RequestError
from pyro_sbp.pruning.macs import count_macs, count_parameters
from pyro_sbp.recipes.request import Request
from pyro_sbp.recipes.settings import THRESHOLDS
from pyro_sbp.training.devices import launch
from pyro_sbp.training.job import Job, prepare_job
from pyro_sbp.training.loop import Loop
from pyro_sbp.training.result import write_result
from pyro_sbp.training.summary import Summary

__all__ = ["SWEEP_FACTORS", "prune_again", "sweep"]


#: The thresholds of a sweep, as multiples of the default of the method. They are the same for all
#: runs of a method, so that runs can be compared. The threshold of the recipe is added to them.
SWEEP_FACTORS = (0.0, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0, 11.0, 16.0)


@workers_watched()
def prune_again(
    request: Request, data: ImageData, directory: Path, target: Path, **settings: Any
) -> Summary:
    """Prune a finished run again with other settings, without fine-tuning.

    Args:
        request, data, directory: those of the run, as for `train`.
        target: the directory in which the network is saved; it must not exist.
        settings: what to keep, as for `choose_units`.

    Returns:
        The summary that `train` would return for this network.

    Raises:
        RequestError: the run has no complete checkpoint, or `choose_units` does not accept the
            settings.
    """
    with _replayed(request, data, directory) as (job, loop):
        try:
            job.method.prune(**settings)
        except ValueError as error:
            raise RequestError(str(error)) from error
        loop.recalibrate()
        loop.measure("pruned", job.method.small)
        for split in loop.errors:
            loop.errors[split].pop("finetuned", None)
            loop.calibration[split].pop("finetuned", None)
    return write_result(job, loop, target)


@workers_watched()
def sweep(
    request: Request,
    data: ImageData,
    directory: Path,
    thresholds: Sequence[float] | None = None,
) -> list[dict[str, Any]]:
    """Measure the pruned network of a run at other thresholds, without fine-tuning.

    Nothing is written. Errors are measured on the images that the recipe reserves for validation,
    so a threshold can be chosen with them. Without such images, errors are measured on the test
    set: a threshold that is chosen with them needs other images to measure its error.

    Args:
        request, data, directory: those of the run, as for `train`.
        thresholds: signal-to-noise ratios; by default those of `SWEEP_FACTORS` and that of the
            recipe. If no unit of a gate reaches a threshold, the best unit is kept, as in `train`.

    Returns:
        One row for each threshold, in rising order: {`threshold`, `error`, `nll` and `ece` as in
        `Measured`, `split` on which they were measured, `macs`, `ratio`, `parameters`, `units`
        (kept, by gate), `held` (gates whose best unit is kept although it is under the threshold),
        and for SparseVD `compression` (all weights divided by those kept)}.

    Raises:
        RequestError: the run has no complete checkpoint, or a threshold is negative.
    """
    if thresholds is None:
        unit = THRESHOLDS[request.method]
        thresholds = (*(unit * times for times in SWEEP_FACTORS), request.recipe.threshold)
    rows = []
    with _replayed(request, data, directory) as (job, loop):
        method = job.method
        for threshold in sorted(set(thresholds)):
            try:
                method.prune(threshold=threshold)
            except ValueError as error:
                raise RequestError(str(error)) from error
            loop.recalibrate()
            found = loop.evaluate(method.small, job.data.validation)  # as it was trained
            small = method.small.to(torch.float32).to(memory_format=torch.contiguous_format)
            macs, weights = count_macs(small, job.example[:1].float()), method.kept_weights()
            rows.append(
                {
                    "threshold": threshold,
                    "error": found.error,
                    "nll": found.nll,
                    "ece": found.ece,
                    "split": "test" if job.data.validation is None else "validation",
                    "macs": macs,
                    "ratio": job.macs / macs,
                    "parameters": count_parameters(small),
                    "units": {name: int(unit.kept.sum()) for name, unit in method.units.items()},
                    "held": list(method.held),
                    **({} if weights is None else {"compression": weights.compression}),
                }
            )
    return rows


@contextmanager
def _replayed(request: Request, data: ImageData, directory: Path) -> Iterator[tuple[Job, Loop]]:
    """A run with its posterior, as it was after its phases with noise."""
    fabric = launch(request.device, precision=request.precision)
    job = prepare_job(request, data, directory, fabric)
    loop = Loop(request, job.method, job.data, directory, fabric)
    with pyro.get_param_store().scope(), pyro.validation_enabled(False):
        loop.replay()
        yield job, loop
