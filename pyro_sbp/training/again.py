"""Prune finished runs again, with other settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyro
import torch
from torch import nn

from pyro_sbp.datasets.loading import ImageData
from pyro_sbp.datasets.streaming import workers_watched
from pyro_sbp.errors import RequestError
from pyro_sbp.pruning.budgets import Budget, MaxErrorIncrease
from pyro_sbp.pruning.macs import count_parameters
from pyro_sbp.recipes.request import Request
from pyro_sbp.training.devices import launch
from pyro_sbp.training.job import Job, prepare_job
from pyro_sbp.training.loop import Loop
from pyro_sbp.training.result import write_result
from pyro_sbp.training.summary import Summary

__all__ = ["prune_again", "replayed", "sweep", "tune_again"]


@workers_watched()
def prune_again(
    request: Request,
    data: ImageData,
    directory: Path,
    target: Path,
    *,
    max_error_increase: float | None = None,
    finetune_epochs: int = 0,
    distill: float | None = None,
    budget: Budget | None = None,
    tell: Callable[[str], object] = print,
    **settings: Any,
) -> Summary:
    """Prune a finished run again with other settings.

    Args:
        request, data, directory: of the run, as for `train`.
        target: where the network is saved; it must not exist.
        max_error_increase: a budget that selects the smallest network whose error on the images
            reserved for validation is at most this many percentage points over that of the dense
            network, before fine-tuning.
        finetune_epochs: epochs of fine-tuning of the result, with the run's other settings.
        distill: the temperature of soft labels for these epochs; by default the recipe's.
        budget: another budget; not together with `max_error_increase`.
        tell: called with one line of text about the measurements for a budget.
        settings: further arguments of `Method.prune`, such as `threshold`.

    Returns:
        The summary that `train` would return for this network.

    Raises:
        RequestError: `target` exists; two budgets are given, or `distill` without
            `finetune_epochs`; the run has no complete checkpoint; `max_error_increase` is given,
            and the run has no images for validation or no dense network; or `choose_units` does not
            accept the settings.
        EquivalenceError: the smaller network differs from the masked one.
        OSError: the network cannot be written.
    """
    if target.exists():
        raise RequestError(f"{target} already exists")
    if budget is not None and max_error_increase is not None:
        raise RequestError(f"give a {budget.name} or max_error_increase, not both")
    if distill is not None and not finetune_epochs:
        raise RequestError("distill sets the labels of fine-tuning; set finetune_epochs")
    taught = finetune_epochs > 0
    with replayed(request, data, directory, taught) as (job, loop), TemporaryDirectory() as other:
        if max_error_increase is not None:
            budget = _error_budget(max_error_increase, job, loop)
        try:
            job.method.prune(budget=budget, **settings)
        except ValueError as error:
            raise RequestError(str(error)) from error
        if budget is not None:
            tell(_measured(budget))
        loop.recalibrate()
        loop.evaluation.measure("pruned", job.method.small)
        for split in loop.evaluation.errors:
            loop.evaluation.errors[split].pop("finetuned", None)
            loop.evaluation.calibration[split].pop("finetuned", None)
        if finetune_epochs:
            loop.directory = Path(other)  # no run resumes from these checkpoints
            tune_again(job, loop, finetune_epochs, distill)
        return write_result(job, loop, target)


def tune_again(job: Job, loop: Loop, epochs: int, distill: float | None = None) -> None:
    """Fine-tune the pruned network of a replayed run, and measure it.

    The order of the data is the same for every network of the run.

    Args:
        job, loop: of `replayed`, with `taught`. Checkpoints are written to `loop.directory`.
        epochs: the number of epochs.
        distill: the temperature of soft labels; by default that of the recipe.
    """
    recipe = job.method.recipe
    recipe = recipe.replace(
        finetune_epochs=epochs, distill=recipe.distill if distill is None else distill
    )
    job.method.recipe = loop.recipe = recipe
    torch.manual_seed(loop.request.seed)
    loop.order.manual_seed(loop.request.seed)
    loop.train(job.method.finetuning())


def _error_budget(target: float, job: Job, loop: Loop) -> MaxErrorIncrease:
    """The budget of an error on the images reserved for validation."""
    if job.data.validation is None:
        holdout = max(1, len(job.data.train) // 10)
        raise RequestError(
            "max_error_increase is measured on images that are reserved for validation, and this "
            f"run has none; train with --set holdout={holdout}, or give another budget"
        )
    dense = loop.evaluation.errors["validation"].get("dense")
    if dense is None:
        raise RequestError(
            "max_error_increase is relative to the error of the dense network, and this run "
            "trained none; give another budget"
        )

    def error(net: nn.Module) -> float:
        loop.recalibrate(net)
        return loop.evaluation.evaluate(net, job.data.validation).error

    try:
        return MaxErrorIncrease(target, error, dense)
    except ValueError as wrong:
        raise RequestError(str(wrong)) from wrong


def _measured(budget: Budget) -> str:
    """One line that says what was measured to meet a budget."""
    return f"{len(budget.measured)} networks compared: {budget.report(budget.level)}"


@workers_watched()
def sweep(
    request: Request,
    data: ImageData,
    directory: Path,
    thresholds: Sequence[float] | None = None,
    criterion: str | None = None,
) -> list[dict[str, Any]]:
    """Measure the pruned network of a run at other thresholds, without fine-tuning.

    Nothing is written. Errors are measured on the images that the recipe reserves for validation,
    so that a threshold can be chosen by these errors. Without such images, errors are measured on
    the test set. If you choose a threshold by errors on the test set, measure the error of the
    chosen network on other images.

    Args:
        request, data, directory: of the run, as for `train`.
        thresholds: thresholds for the scores of the criterion. By default, they are the multiples
            `Criterion.sweep` of the method's default threshold, so that all runs of the method can
            be compared, and the threshold of `Recipe.rule`. If no unit of a gate reaches a
            threshold, the gate keeps its best unit, as in `train`.
        criterion: the criterion; by default that of the recipe.

    Returns:
        A list of dicts in ascending order of the threshold: {`criterion`, `threshold`, `error`,
        `nll` and `ece` (as in `Measured`), `split` (the images on which they were measured),
        `macs`, `ratio`, `parameters`, `units` (the number of kept units, by gate), `held` (the
        gates in which no unit reaches the threshold), and for SparseVD `compression` (the number of
        all weights divided by that of kept weights)}.

    Raises:
        RequestError: the run has no complete checkpoint, the criterion is not for the method, or a
            threshold is not valid for the criterion.
    """
    rule = request.recipe.rule(criterion)
    name = rule.criterion.name
    if thresholds is None:
        unit = type(request.recipe)().rule(name).threshold
        thresholds = (*(unit * times for times in rule.criterion.sweep), rule.threshold)
    rows = []
    with replayed(request, data, directory) as (job, loop):
        method = job.method
        for threshold in sorted(set(thresholds)):
            try:
                method.prune(criterion=name, threshold=threshold)
            except ValueError as error:
                raise RequestError(str(error)) from error
            loop.recalibrate()
            # in the precision of training
            found = loop.evaluation.evaluate(method.small, job.data.validation)
            (small, macs), weights = job.pruned(), method.kept_weights()
            rows.append(
                {
                    "criterion": name,
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
def replayed(
    request: Request, data: ImageData, directory: Path, taught: bool = False
) -> Iterator[tuple[Job, Loop]]:
    """Within the context, a run with its posterior, in the state after its phases.

    Args:
        request, data, directory: of the run, as for `train`.
        taught: whether to read the teachers of the run, which only fine-tuning needs.

    Raises:
        RequestError: the run has no complete checkpoint.
    """
    fabric = launch(request.device, precision=request.precision)
    job = prepare_job(request, data, directory, fabric, taught)
    loop = Loop(request, job.method, job.data, directory, fabric)
    with pyro.get_param_store().scope(), pyro.validation_enabled(False):
        loop.replay()
        yield job, loop
