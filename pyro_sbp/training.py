"""Training: a request in, a run directory out."""

from __future__ import annotations

import dataclasses
import os
import pkgutil
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyro
import torch
from lightning_fabric import Fabric
from safetensors.torch import save as serialize
from torch import Tensor, nn

from pyro_sbp.architectures import find_architecture
from pyro_sbp.attention import has_attention, separate_attention
from pyro_sbp.benchmarking import count_macs, count_parameters, device_name
from pyro_sbp.datasets import ImageData
from pyro_sbp.devices import dtype_of, in_step, launch, on_first
from pyro_sbp.errors import RequestError, first_line
from pyro_sbp.files import lock, write_json
from pyro_sbp.gates import call
from pyro_sbp.loop import Interrupted, Loop, Progress
from pyro_sbp.methods import Method
from pyro_sbp.pruning import NothingLeft
from pyro_sbp.recipes import METHODS, THRESHOLDS, Request
from pyro_sbp.saving import load_weights, save, unique_tensors
from pyro_sbp.streaming import workers_watched

__all__ = [
    "SWEEP_FACTORS",
    "Interrupted",
    "Progress",
    "build_network",
    "machine",
    "prepare_data",
    "prune_again",
    "sweep",
    "train",
    "versions",
]

#: Where a sweep looks, in times of what the method keeps by default, beside the recipe's own
#: threshold: the same for all runs of a method, to compare them.
SWEEP_FACTORS = (0.0, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0, 11.0, 16.0)


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    names = ("pyro-sbp", "torchvision", "pyro-ppl")
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **{name: version(name) for name in names},
    }


def machine(device: torch.device) -> str:
    """The machine that a result depends on: its processor or graphics card, cores and threads."""
    return f"{device_name(device)}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def prepare_data(request: Request, data: ImageData, device: torch.device) -> ImageData:
    """The data as the request's recipe wants it, on a device.

    Raises:
        RequestError: the recipe crops more than the images have, or holds out too many.
    """
    recipe = request.recipe
    if recipe.crop >= min(data.image_shape[1:]):
        height, width = data.image_shape[1:]
        raise RequestError(
            f"crop is {recipe.crop}; expected less than the images' {height} x {width}"
        )
    data = data.to(device)
    if recipe.random_labels:
        data = data.with_random_labels(request.seed)
    if recipe.holdout:
        data = data.held_out(recipe.holdout)
    return data.standardized() if recipe.standardize else data


def build_network(request: Request, data: ImageData) -> tuple[nn.Module, dict[str, Any]]:
    """The untrained network of a request, drawn by its seed, and its constructor's arguments.

    Raises:
        RequestError: it cannot be built, or does not take the data's images.
    """
    torch.manual_seed(request.seed)
    architecture = find_architecture(request.arch)
    kwargs = architecture.kwargs(data.image_shape[0], len(data.classes))
    example, _ = data.test.batch(slice(0, 8))
    return _build(architecture.resolve(), kwargs, example, len(data.classes)), kwargs


@workers_watched()
def train(
    request: Request,
    data: ImageData,
    directory: Path,
    watch: Callable[[Progress], None] = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
    fabric: Fabric | None = None,
) -> dict[str, Any]:
    """Train, prune and fine-tune a network as requested, and write a run directory.

    A directory that holds the checkpoint of the same request goes on from there, to the same end.

    Args:
        request: what to do.
        data: what to do it on, as `load_dataset` gives it for the architecture.
        directory: the run directory; it is made where it is missing.
        watch: told of the progress.
        stop: asked after every step whether to leave a checkpoint and stop.
        fabric: what to compute with, from `launch`; it is launched here if not given.

    Returns:
        The content of `summary.json`.

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
    job = _prepare(request, data, directory, fabric)
    with in_step(fabric), ExitStack() as stack:
        on_first(fabric, lambda: stack.enter_context(_begun(directory, request)))
        if not fabric.is_global_zero:
            # The first process goes on with the random numbers of the construction.
            torch.manual_seed(request.seed + fabric.global_rank)
        loop = Loop(request, job.method, job.data, directory, fabric, watch, stop)
        # Pyro's store of parameters, shared by the process, is left as it was. Validation would
        # refuse a loss that is not finite in its own words, and costs a sixth of a step.
        with pyro.get_param_store().scope(), pyro.validation_enabled(False):
            loop.go()
        return fabric.broadcast(on_first(fabric, lambda: _finish(job, loop, directory)))


def _finish(job: _Job, loop: Loop, directory: Path) -> dict[str, Any]:
    # Left by a run that was stopped between this and its summary.
    shutil.rmtree(directory / "pruned", ignore_errors=True)
    summary = _hand_over(job, loop, directory / "pruned")
    write_json(directory / "summary.json", summary)
    return summary


@workers_watched()
def prune_again(
    request: Request, data: ImageData, directory: Path, target: Path, **settings: Any
) -> dict[str, Any]:
    """Prune a finished run once more by other settings, without fine-tuning.

    Args:
        request, data, directory: of the run, as for `train`.
        target: where the network is saved; it must not exist.
        settings: what to keep, as for `choose_units`.

    Returns:
        What `train` would return, of this network.

    Raises:
        RequestError: the run has no whole checkpoint, or `choose_units` refuses the settings.
    """
    with _replayed(request, data, directory) as (job, loop):
        try:
            job.method.prune(**settings)
        except ValueError as error:
            raise RequestError(str(error)) from error
        loop.recalibrate()
        loop.measure("pruned", job.method.small)
        loop.errors["finetuned"] = None
        loop.validation_errors["finetuned"] = loop.training_errors["finetuned"] = None
    return _hand_over(job, loop, target)


@workers_watched()
def sweep(
    request: Request,
    data: ImageData,
    directory: Path,
    thresholds: Sequence[float] | None = None,
) -> list[dict[str, Any]]:
    """What a run's network would be at other thresholds, without fine-tuning; nothing is written.

    Errors are of the images that the recipe held out, to choose a threshold by. Without such they
    are of the test set, and show how much room there is: whoever chooses by them must measure the
    error of the choice on other images.

    Args:
        request, data, directory: of the run, as for `train`.
        thresholds: signal-to-noise ratios; those that would remove every unit of every gate are
            left out. By default `SWEEP_FACTORS` and the recipe's own.

    Returns:
        By rising threshold: {`threshold`, `error` in percent, `split` it is of, `macs`, `ratio`,
        `parameters`, `units` (kept, by gate), `held` (gates of which the best stay though under
        it), and of SparseVD `compression` (all weights over those kept)}.

    Raises:
        RequestError: the run has no whole checkpoint, or a threshold is negative.
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
            except NothingLeft:
                break
            except ValueError as error:
                raise RequestError(str(error)) from error
            loop.recalibrate()
            error = loop.error_of(method.small, job.data.validation)  # as it was trained
            small = method.small.to(torch.float32, memory_format=torch.contiguous_format)
            macs = count_macs(small, job.example[:1].float())
            rows.append(
                {
                    "threshold": threshold,
                    "error": error,
                    "split": "test" if job.data.validation is None else "validation",
                    "macs": macs,
                    "ratio": job.macs / macs,
                    "parameters": count_parameters(small),
                    "units": {name: int(unit.kept.sum()) for name, unit in method.units.items()},
                    "held": list(method.held),
                    **_compression(method),
                }
            )
    return rows


def _compression(method: Method) -> dict[str, float]:
    """All weights over those kept, of a method that keeps single ones."""
    weights = method.summary().get("weights")
    return {} if weights is None else {"compression": weights["compression"]}


@contextmanager
def _replayed(request: Request, data: ImageData, directory: Path) -> Iterator[tuple[_Job, Loop]]:
    """A run with its posterior, as the phases left it."""
    fabric = launch(request.device, precision=request.precision)
    job = _prepare(request, data, directory, fabric)
    loop = Loop(request, job.method, job.data, directory, fabric)
    with pyro.get_param_store().scope(), pyro.validation_enabled(False):
        loop.replay()
        yield job, loop


@contextmanager
def _begun(directory: Path, request: Request) -> Iterator[None]:
    """Make the run directory, or find it, and keep it for this process."""
    named = {"versions": versions(), "machine": machine(torch.device(request.device))}
    asked = {**request.to_dict(), **named}
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"cannot write {directory}: {error.strerror}") from error
    with lock(directory):
        # A run that left no checkpoint left nothing to go on with.
        if not (directory / "checkpoint.pt").exists():
            write_json(directory / "recipe.json", asked)
        yield


@dataclasses.dataclass(frozen=True)
class _Job:
    """A request with all that it needs; the sizes are those of the dense network."""

    request: Request
    data: ImageData
    example: Tensor
    kwargs: dict[str, Any]
    method: Method
    macs: int
    parameters: int


def _prepare(request: Request, data: ImageData, directory: Path, fabric: Fabric) -> _Job:
    """Build the network and the method that are asked for; nothing is written."""
    data = prepare_data(request, data, fabric.device)
    dense, kwargs = build_network(request, data)
    example, _ = data.test.batch(slice(0, 8))
    # A checkpoint has taken over what it was started from.
    if request.weights is not None and not (directory / "checkpoint.pt").exists():
        load_weights(dense, Path(request.weights))
    if has_attention(dense):
        dense = separate_attention(dense)
    dtype = dtype_of(request.precision)
    dense, example = dense.to(dtype), example.to(dtype)
    if request.channels_last:
        dense = dense.to(memory_format=torch.channels_last)
    try:
        method = pkgutil.resolve_name(METHODS[request.method])(
            dense.to(fabric.device),
            example,
            request.recipe,
            len(data.train),
            find_architecture(request.arch).input_features,
        )
    except ValueError as error:
        raise RequestError(str(error)) from error
    macs, parameters = count_macs(dense, example[:1]), count_parameters(dense)
    return _Job(request, data, example, kwargs, method, macs, parameters)


def _build(
    constructor: Callable[..., nn.Module], kwargs: Any, example: Tensor, classes: int
) -> nn.Module:
    try:
        net = constructor(**kwargs)
    except Exception as error:  # a network's own code may raise anything
        given = ", ".join(kwargs) or "no arguments"
        raise RequestError(
            f"the network cannot be built from {given}: {first_line(error)}"
        ) from error
    if not isinstance(net, nn.Module):
        raise RequestError(f"--arch builds a {type(net).__name__}; expected a torch.nn.Module")
    try:
        with torch.no_grad():
            output = call(net.eval(), example.cpu())
    except Exception as error:  # a network's own code may raise anything
        raise RequestError(
            f"the network does not take images of {list(example.shape[1:])}: {first_line(error)}"
        ) from error
    if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[1] < classes:
        found = list(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise RequestError(
            f"the network does not give logits [batch, {classes}], a column for each class: it "
            f"gives {found} for {len(example)} images; an argument num_classes of its constructor "
            "gets their number"
        )
    return net


def _hand_over(job: _Job, loop: Loop, target: Path) -> dict[str, Any]:
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
