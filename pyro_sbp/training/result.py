"""The result of a run: the saved network, and the summary of the run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from pyro_sbp.architectures import find_architecture
from pyro_sbp.deployment.memory import file_size
from pyro_sbp.deployment.saving import save
from pyro_sbp.methods import Method
from pyro_sbp.pruning.macs import count_parameters
from pyro_sbp.training.job import Job
from pyro_sbp.training.loop import Loop
from pyro_sbp.training.summary import (
    Calibration,
    Differences,
    Errors,
    FileSizes,
    GateUnits,
    LayerWeights,
    Size,
    Summary,
    Target,
    WeightsLeft,
)
from pyro_sbp.training.teachers import Teachers

__all__ = ["write_result"]


def write_result(job: Job, loop: Loop, target: Path, overwrite: bool = False) -> Summary:
    """Save the smaller network of a run, and make the summary of the run.

    Args:
        job: the network, the data and the method of the run.
        loop: the loop of the run, after its end.
        target: the directory for the network.
        overwrite: whether to replace an existing network; otherwise `target` must not exist.
    """
    method, request = job.method, job.request
    small, macs = job.pruned()
    standardization, weights = job.data.train.standardization, _weights(method)
    units = {name: unit.to_dict() for name, unit in method.units.items()}
    save(
        small,
        target,
        constructor=find_architecture(request.arch).name_to_save(),
        kwargs=job.kwargs,
        units=units,
        input_shape=job.data.image_shape,
        overwrite=overwrite,
        standardization=standardization,
        sparse=weights is not None,
    )
    parameters = count_parameters(small)
    errors = {split: Errors(**found) for split, found in loop.evaluation.errors.items() if found}
    calibration = {
        split: {name: Calibration(**values) for name, values in found.items()}
        for split, found in loop.evaluation.calibration.items()
        if found
    }
    sparse = target / "sparse.safetensors"
    return Summary(
        arch=request.arch,
        dataset=request.dataset,
        method=request.method,
        seed=request.seed,
        epochs=request.recipe.epochs,
        device=request.device,
        threads=torch.get_num_threads(),
        train_seconds=round(loop.seconds, 1),
        error=errors.get("test", Errors()),
        validation_error=errors.get("validation"),
        training_error=errors.get("training"),
        calibration=calibration or None,
        units=tuple(
            GateUnits(name, len(unit["kept"]), unit["total"], len(unit["zeroed"]))
            for name, unit in units.items()
        ),
        weights=weights,
        files=FileSizes(
            file_size(method.net),
            (target / "model.safetensors").stat().st_size,
            sparse.stat().st_size if sparse.exists() else None,
        ),
        held=method.held,
        left_alone=method.not_prunable,
        shares=method.shares,
        macs=Size(job.macs, macs, job.macs / macs),
        parameters=Size(
            job.parameters,
            parameters,
            job.parameters / parameters,
            nonzero=sum(int(p.count_nonzero()) for p in small.parameters()),
        ),
        equivalence=Differences(
            method.equivalence.max_rel_diff_float64, method.equivalence.max_abs_diff
        ),
        standardize=None if standardization is None else standardization.to_dict(),
        teachers=_teachers(loop, method),
        target=None if method.target is None else Target(**dataclasses.asdict(method.target)),
    )


def _teachers(loop: Loop, method: Method) -> tuple[str, ...]:
    """The architectures of the dense networks that taught the returned network."""
    teacher = method.teacher
    if isinstance(teacher, Teachers) and "finetuned" in loop.evaluation.errors["test"]:
        return teacher.names
    return ()


def _weights(method: Method) -> WeightsLeft | None:
    kept = method.kept_weights()
    if kept is None:
        return None
    layers = tuple(LayerWeights(name, *counts) for name, counts in kept.layers.items())
    return WeightsLeft(layers, kept.kept, kept.total, kept.compression)
