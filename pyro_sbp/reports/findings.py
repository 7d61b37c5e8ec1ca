"""The contents of a report as values, with the reason for each value that is missing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pyro_sbp.architectures import find_architecture
from pyro_sbp.datasets.sources import check_dataset
from pyro_sbp.deployment.loading import load
from pyro_sbp.errors import RequestError
from pyro_sbp.gates.attention import has_attention, separate_attention
from pyro_sbp.pruning.macs import costs_by_layer
from pyro_sbp.recipes.criteria import Rule
from pyro_sbp.reports.posterior import Posterior, describe, read_posterior
from pyro_sbp.training.again import sweep
from pyro_sbp.training.job import load_data
from pyro_sbp.training.runs import Run

__all__ = ["Findings", "costs_of", "find"]


@dataclass
class Findings:
    """The results of a run for its report.

    Attributes:
        run: the run.
        rule: the criterion and the threshold that decide which units are kept.
        posterior: the posterior of the last checkpoint of the run.
        description: the description of the posterior, from `describe`.
        sweep: the results at other thresholds, from `sweep`.
        costs: the MACs and parameters of the layers, from `costs_of`.
        missing: from the name of an attribute that is None to the reason.
    """

    run: Run
    rule: Rule
    posterior: Posterior | None = None
    description: dict[str, Any] | None = None
    sweep: list[dict[str, Any]] | None = None
    costs: dict[str, dict[str, tuple[int, int]]] | None = None
    missing: dict[str, str] = field(default_factory=dict)


def find(
    run: Run,
    data_dir: Path | None = None,
    thresholds: bool = True,
    criterion: str | None = None,
) -> Findings:
    """Collect the results of a run for its report; nothing is downloaded.

    Args:
        run: the run, finished or not.
        data_dir: the directory of its data set; by default that of the request.
        thresholds: whether to measure other thresholds.
        criterion: the criterion that decides which units are kept; by default that of the run's
            recipe.

    Raises:
        RequestError: there is no such criterion, or it is not for the run's method.
    """
    found = Findings(run, run.request.recipe.rule(criterion))
    try:
        found.posterior = read_posterior(run.directory)
        found.description = describe(run, found.posterior, criterion)
    except RequestError as error:
        found.missing["posterior"] = str(error)
    if run.summary is None:
        return found
    try:
        found.costs = costs_of(run)
    except RequestError as error:
        found.missing["costs"] = str(error)
    if not thresholds:
        found.missing["sweep"] = "it was disabled by --no-sweep"
        return found
    try:
        found.sweep = _sweep(run, data_dir, criterion)
    except RequestError as error:
        found.missing["sweep"] = str(error)
    return found


def _sweep(run: Run, data_dir: Path | None, criterion: str | None) -> list[dict[str, Any]]:
    request = run.request
    if request.device == "cuda" and not torch.cuda.is_available():
        raise RequestError("the run was made on a CUDA device, and there is none on this machine")
    data_dir = Path(request.data_dir) if data_dir is None else data_dir
    check_dataset(request.dataset, data_dir, download=False)
    data = load_data(request, data_dir)
    return sweep(request, data, run.directory, criterion=criterion)


def costs_of(run: Run) -> dict[str, dict[str, tuple[int, int]]]:
    """MACs and parameters of every layer, from its name to {`dense`, `pruned`}: (MACs, parameters).

    Raises:
        RequestError: the run has not finished, or its network is damaged or cannot be built on this
            machine.
    """
    if run.network is None:
        raise RequestError(f"{run.directory} has no pruned network")
    constructor = find_architecture(run.request.arch).resolve()
    try:
        pruned = load(run.directory / "pruned", constructor)
        dense = constructor(**run.network["kwargs"]).eval()
        example = torch.rand(1, *(run.network["input_shape"] or ()), device="cpu")
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(f"{run.directory} has no complete pruned network: {error}") from error
    if has_attention(dense):
        dense = separate_attention(dense)
    before, after = costs_by_layer(dense, example), costs_by_layer(pruned, example)
    names = [*before, *(name for name in after if name not in before)]
    none = (0, 0)
    return {n: {"dense": before.get(n, none), "pruned": after.get(n, none)} for n in names}
