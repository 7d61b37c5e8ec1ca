"""The result of a run: the saved network and `summary.json`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize
from torch import Tensor, nn

from pyro_sbp.architectures import find_architecture
from pyro_sbp.deployment.saving import save, unique_tensors
from pyro_sbp.pruning.macs import count_macs, count_parameters
from pyro_sbp.training.job import Job
from pyro_sbp.training.loop import Loop

__all__ = []


def write_result(job: Job, loop: Loop, target: Path) -> dict[str, Any]:
    """Save the smaller network, and say what became of the dense one."""
    method, small, example = job.method, job.method.small, job.example
    standardization = job.data.train.standardization
    units = {
        name: {"total": len(u.kept), "kept": _indices(u.kept), "zeroed": _indices(u.zeroed)}
        for name, u in method.units.items()
    }
    small = small.to(torch.float32, memory_format=torch.contiguous_format)
    told = method.summary()
    sparse = "weights" in told  # single zeros, which a file may leave out
    save(
        small,
        target,
        constructor=find_architecture(job.request.arch).constructor,
        kwargs=job.kwargs,
        units=units,
        input_shape=job.data.image_shape,
        standardization=standardization,
        sparse=sparse,
    )
    macs, parameters = count_macs(small, example[:1].float()), count_parameters(small)
    names = ("dense", "mean", "pruned", "finetuned")
    return {
        "arch": job.request.arch,
        "dataset": job.request.dataset,
        "method": job.request.method,
        "seed": job.request.seed,
        "epochs": job.request.recipe.epochs,
        "device": job.request.device,
        "train_seconds": round(loop.seconds, 1),
        "error": {name: loop.errors.get(name) for name in names},
        **(
            {"validation_error": {name: loop.validation_errors.get(name) for name in names}}
            if job.data.validation is not None
            else {}
        ),
        **(
            {"training_error": {name: loop.training_errors.get(name) for name in names}}
            if job.request.recipe.random_labels
            else {}
        ),
        "units": [
            {
                "gate": name,
                "kept": len(unit["kept"]),
                "zeroed": len(unit["zeroed"]),
                "total": unit["total"],
            }
            for name, unit in units.items()
        ],
        **told,
        "files": {
            "dense": _file_size(method.net),
            "pruned": (target / "model.safetensors").stat().st_size,
            **({"sparse": (target / "sparse.safetensors").stat().st_size} if sparse else {}),
        },
        "held": list(method.held),
        "left_alone": method.left_alone,
        "macs": {"dense": job.macs, "pruned": macs, "ratio": job.macs / macs},
        "parameters": {
            "dense": job.parameters,
            "pruned": parameters,
            "nonzero": sum(int(p.count_nonzero()) for p in small.parameters()),
            "ratio": job.parameters / parameters,
        },
        "equivalence": dataclasses.asdict(method.equivalence),
        **({} if standardization is None else {"standardize": standardization.to_dict()}),
    }


def _file_size(net: nn.Module) -> int:
    """The bytes of a network as `save` would store it."""
    return len(serialize({n: value.float() for n, value in unique_tensors(net)[0].items()}))


def _indices(mask: Tensor) -> list[int]:
    return torch.nonzero(mask).flatten().tolist()
