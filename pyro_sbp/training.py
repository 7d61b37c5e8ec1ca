"""Training: runs the phases of a method; a request in, a run directory out."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import pkgutil
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_sbp.architectures import find_architecture
from pyro_sbp.attention import has_attention, separate_attention
from pyro_sbp.benchmarking import count_macs, count_parameters, device_name
from pyro_sbp.datasets import ImageData, Split
from pyro_sbp.errors import RequestError, first_line
from pyro_sbp.files import write_json, write_text, write_whole
from pyro_sbp.gates import call
from pyro_sbp.methods import Method, Phase
from pyro_sbp.methods.phase import Predict
from pyro_sbp.recalibration import recalibrate_batch_norm
from pyro_sbp.recipes import METHODS, Request
from pyro_sbp.saving import load_weights, save

__all__ = ["Interrupted", "Progress", "prune_again", "train", "versions"]

#: How many test examples are predicted at a time.
TEST_BATCH = 500
#: How many training examples the batch norm statistics of a pruned network are measured on.
RECALIBRATE_ON = 10_000
#: Seconds after which a checkpoint is written within an epoch.
SAVE_EVERY = 120.0


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands; given to the caller of `train` after every epoch and now and then."""

    phase: str
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    nll: float
    kl: float
    error: float | None = None
    units: dict[str, int] | None = None


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    names = ("pyro-sbp", "torchvision", "pyro-ppl")
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **{name: version(name) for name in names},
    }


def train(
    request: Request,
    data: ImageData,
    directory: Path,
    watch: Callable[[Progress], None] = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train, prune and fine-tune a network as requested, and write a run directory.

    A directory that holds the checkpoint of the same request goes on from there, to the same end.

    Args:
        request: what to do.
        data: what to do it on, as `load_dataset` gives it for the architecture.
        directory: the run directory; it is made where it is missing.
        watch: told of the progress.
        stop: asked after every step whether to leave a checkpoint and stop.

    Returns:
        The content of `summary.json`.

    Raises:
        RequestError: the architecture cannot be built or does not take the data's images, the
            recipe names a gate that the network does not have, or the directory cannot be written.
        EquivalenceError: the pruned network does not compute what the masked one computes.
        FloatingPointError: the loss or a parameter is not finite any more; the checkpoint is the
            last one that was good.
        Interrupted: it was asked to stop.
    """
    run = _Run.prepare(request, data, directory, watch, stop)
    _begin(directory, request)
    # Pyro's store of parameters, shared by the process, is left as it was. Validation would refuse
    # a loss that is not finite in its own words, and costs a sixth of a step.
    with pyro.get_param_store().scope(), pyro.validation_enabled(False):
        run.go()
    # Left by a run that was stopped between this and its summary.
    shutil.rmtree(directory / "pruned", ignore_errors=True)
    summary = run.hand_over(directory / "pruned")
    write_json(directory / "summary.json", summary)
    return summary


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
    run = _Run.prepare(request, data, directory)
    with pyro.get_param_store().scope(), pyro.validation_enabled(False):
        run.replay()
        try:
            run.method.prune(**settings)
        except ValueError as error:
            raise RequestError(str(error)) from error
        run.recalibrate()
        run.errors["pruned"] = run.error_of(run.method.small)
        run.errors["finetuned"] = None
    return run.hand_over(target)


def _begin(directory: Path, request: Request) -> None:
    """Make the run directory, or find it."""
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    machine = f"{device_name(torch.device(request.device))}, {cores}"
    asked = {**request.to_dict(), "versions": versions(), "machine": machine}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / "recipe.json").exists():
            write_json(directory / "recipe.json", asked)
    except OSError as error:
        raise RequestError(f"cannot write {directory}: {error.strerror}") from error


def _build(
    constructor: Callable[..., nn.Module], kwargs: Any, example: Tensor, classes: int
) -> nn.Module:
    try:
        net = constructor(**kwargs)
        with torch.no_grad():
            output = call(net.eval(), example.cpu())
    except Exception as error:  # a network's own code may raise anything
        raise RequestError(
            f"the network does not take images of {list(example.shape[1:])}: {first_line(error)}"
        ) from error
    if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[1] < classes:
        raise RequestError(f"the network does not give logits [batch, {classes}] for images")
    return net


class Interrupted(Exception):
    """Training was asked to stop, and has left a checkpoint."""


@dataclasses.dataclass
class _Place:
    """Where a phase stands.

    Attributes:
        order: state of the generator of the order of the data, at the start of the epoch.
        total: sums of NLL and KL over the examples of the epoch.
        epoch: whole epochs.
        step: steps of the epoch that are done.
        seen: examples of the epoch that are done.
        seconds: time spent on the epoch.
    """

    order: Tensor
    total: Tensor
    epoch: int = 0
    step: int = 0
    seen: int = 0
    seconds: float = 0.0

    def next_epoch(self, order: Tensor) -> None:
        """Begin the next epoch."""
        self.order, self.total = order, torch.zeros(2)
        self.epoch, self.step, self.seen, self.seconds = self.epoch + 1, 0, 0, 0.0


def _check_finite(phase: Phase, loss: float, epoch: int) -> None:
    where = f"in epoch {epoch + 1} of phase {phase.name!r}"
    for name, parameter in phase.module.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise FloatingPointError(
                f"the parameter {name!r} is not finite {where}: a lower learning rate may help"
            )
    if not loss < float("inf"):
        raise FloatingPointError(f"the loss is {loss} {where}: a lower learning rate may help")


class _Run:
    """The loop over the phases of a method."""

    def __init__(
        self,
        request: Request,
        method: Method,
        data: ImageData,
        directory: Path,
        watch: Callable[[Progress], None],
        stop: Callable[[], bool],
        kwargs: dict[str, Any],
    ) -> None:
        self.stop = stop
        self.request, self.recipe = request, request.recipe
        self.method, self.data, self.watch = method, data, watch
        self.kwargs = kwargs
        self.device = torch.device(request.device)
        self.directory = directory
        self.example, _ = data.test.batch(slice(0, 8))
        self.dense_macs = count_macs(method.net, self.example[:1])
        self.dense_parameters = count_parameters(method.net)
        self.errors: dict[str, float | None] = {}
        self.seconds = 0.0
        self.order = torch.Generator().manual_seed(request.seed)
        self.finished: list[dict[str, Tensor]] = []
        self.lines: list[dict[str, Any]] = []

    @classmethod
    def prepare(
        cls,
        request: Request,
        data: ImageData,
        directory: Path,
        watch: Callable[[Progress], None] = lambda progress: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> _Run:
        """Build the network and the method that are asked for; nothing is written."""
        torch.manual_seed(request.seed)
        device = torch.device(request.device)
        data = data.to(device)
        architecture = find_architecture(request.arch)
        kwargs = architecture.kwargs(data.image_shape[0], len(data.classes))
        example, _ = data.test.batch(slice(0, 8))
        dense = _build(architecture.resolve(), kwargs, example, len(data.classes))
        if request.weights is not None:
            load_weights(dense, Path(request.weights))
        if has_attention(dense):
            dense = separate_attention(dense)
        try:
            method = pkgutil.resolve_name(METHODS[request.method])(
                dense.to(device),
                example,
                request.recipe,
                len(data.train),
                architecture.input_features,
            )
        except ValueError as error:
            raise RequestError(str(error)) from error
        return cls(request, method, data, directory, watch, stop, kwargs)

    def hand_over(self, target: Path) -> dict[str, Any]:
        """Save the smaller network, and say what became of the dense one."""
        small, example = self.method.small, self.example
        units = {
            name: {"total": len(u.kept), "kept": _indices(u.kept), "zeroed": _indices(u.zeroed)}
            for name, u in self.method.units.items()
        }
        save(
            small,
            target,
            constructor=find_architecture(self.request.arch).constructor,
            kwargs=self.kwargs,
            units=units,
            input_shape=self.data.image_shape,
        )
        macs, parameters = count_macs(small, example[:1]), count_parameters(small)
        names = ("dense", "mean", "pruned", "finetuned")
        return {
            "arch": self.request.arch,
            "dataset": self.request.dataset,
            "method": self.request.method,
            "seed": self.request.seed,
            "epochs": self.recipe.epochs,
            "device": self.request.device,
            "train_seconds": round(self.seconds, 1),
            "error": {name: self.errors.get(name) for name in names},
            "units": [
                {
                    "gate": name,
                    "kept": len(unit["kept"]),
                    "zeroed": len(unit["zeroed"]),
                    "total": unit["total"],
                }
                for name, unit in units.items()
            ],
            "left_alone": self.method.left_alone,
            "macs": {"dense": self.dense_macs, "pruned": macs, "ratio": self.dense_macs / macs},
            "parameters": {
                "dense": self.dense_parameters,
                "pruned": parameters,
                "nonzero": sum(int(p.count_nonzero()) for p in small.parameters()),
                "ratio": self.dense_parameters / parameters,
            },
            "equivalence": dataclasses.asdict(self.method.equivalence),
        }

    def replay(self) -> None:
        """Load what the phases left, up to the one that leaves the posterior."""
        saved = self._load()
        if saved is None:
            raise RequestError(f"{self.directory} has no checkpoint.pt to prune from")
        states = [*self.finished, saved["module"]]
        for phase, state in zip(self.method.phases(), states, strict=False):
            phase.module.load_state_dict(state)
            phase.module.eval()
            if phase.prunes:
                return
            phase.finish()
        raise RequestError(f"{self.directory} was stopped before it had a posterior")

    def recalibrate(self) -> None:
        """Measure the batch norm statistics of the smaller network anew, if that is asked for."""
        if not self.recipe.recalibrate:
            return
        size, data = self.recipe.batch_size, self.data.train
        starts = range(0, min(len(data), RECALIBRATE_ON), size)
        batches = (data.batch(slice(start, start + size))[0] for start in starts)
        recalibrate_batch_norm(self.method.small, batches)

    def go(self) -> None:
        """Run all phases, from the checkpoint on where there is one."""
        saved = self._load()
        for index, phase in enumerate(self.method.phases()):
            if index < len(self.finished):
                phase.module.load_state_dict(self.finished[index])
                phase.finish()
                if phase.prunes:
                    self.recalibrate()
                continue
            optimizer = torch.optim.Adam(phase.groups)
            steps = -(-len(self.data.train) // self.recipe.batch_size)
            schedule = _linear_decay(optimizer, phase.epochs * steps, self.recipe.decay)
            place = _Place(self.order.get_state(), torch.zeros(2))
            if saved is not None:
                phase.module.load_state_dict(saved["module"])
                optimizer.load_state_dict(saved["optimizer"])
                schedule.load_state_dict(saved["schedule"])
                place, saved = _Place(**saved["place"]), None
            while place.epoch < phase.epochs:
                self._epoch(phase, place, optimizer, schedule)
            self.finished.append(_copy(phase.module.state_dict()))
            phase.module.eval()
            predictors = phase.finish()
            if phase.prunes:
                self.recalibrate()
            for name, predict in predictors.items():
                self.errors[name] = self.error_of(predict)

    def _epoch(self, phase: Phase, place: _Place, optimizer: Any, schedule: Any) -> None:
        """Go on to the end of the epoch."""
        started = saved = time.perf_counter()
        before = place.seconds
        phase.train_mode()
        total = place.total.to(self.device)
        self.order.set_state(place.order)
        batches = list(_batches(self.data.train, self.recipe.batch_size, self.order))
        for index in batches[place.step :]:
            x, y = self.data.train.batch(index.to(self.device))
            parts = phase.loss(x, y)
            optimizer.zero_grad(set_to_none=True)
            parts.loss.backward()
            optimizer.step()
            schedule.step()
            total += torch.stack([parts.nll.detach(), parts.kl.detach()]).to(total) * len(index)
            place.seen += len(index)
            if place.step % 50 == 0:
                self._tell(phase, place, len(batches), total / place.seen)
            place.step += 1
            now = time.perf_counter()
            if self.stop() or now - saved > SAVE_EVERY:
                place.total, place.seconds, saved = total.cpu(), before + now - started, now
                self._save(phase, place, optimizer, schedule)
                if self.stop():
                    raise Interrupted
        phase.module.eval()
        mean = total / place.seen
        nll, kl = mean.tolist()
        _check_finite(phase, nll + kl, place.epoch)
        error = self.error_of(phase.predict)
        units = phase.units()
        seconds = before + time.perf_counter() - started
        self.seconds += seconds
        self._tell(phase, place, len(batches), mean, error, units)
        line = {
            "phase": phase.name,
            "epoch": place.epoch + 1,
            "loss": nll + kl,
            "nll": nll,
            "kl": phase.kl() / len(self.data.train),
            "weighted_kl": kl,
            "error": error,
            "units": units,
            "seconds": round(seconds, 3),
        }
        self.lines.append(line)
        text = "".join(json.dumps(x) + "\n" for x in self.lines)
        write_text(self.directory / "metrics.jsonl", text)
        place.next_epoch(self.order.get_state())
        self._save(phase, place, optimizer, schedule)

    def _tell(
        self,
        phase: Phase,
        place: _Place,
        steps: int,
        mean: Tensor,
        error: float | None = None,
        units: dict[str, int] | None = None,
    ) -> None:
        nll, kl = mean.tolist()
        self.watch(
            Progress(
                phase.name,
                place.epoch + 1,
                phase.epochs,
                place.step,
                steps,
                nll + kl,
                nll,
                kl,
                error,
                units,
            )
        )

    @torch.no_grad()
    def error_of(self, predict: Predict) -> float:
        """The share of the test set that is classified wrongly, in percent."""
        if isinstance(predict, nn.Module):
            predict.eval()
        wrong = torch.zeros((), dtype=torch.int64, device=self.device)
        for start in range(0, len(self.data.test), TEST_BATCH):
            x, y = self.data.test.batch(slice(start, start + TEST_BATCH))
            wrong += (predict(x).argmax(1) != y).sum()
        return round(100 * int(wrong) / len(self.data.test), 6)

    def _save(self, phase: Phase, place: _Place, optimizer: Any, schedule: Any) -> None:
        _check_finite(phase, float(place.total.sum()), place.epoch)
        checkpoint = {
            "request": json.dumps(self.request.to_dict()),
            "finished": self.finished,
            "module": phase.module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "place": dataclasses.asdict(place),
            "errors": self.errors,
            "seconds": self.seconds,
            "lines": self.lines,
            "order": self.order.get_state(),
            "rng": torch.get_rng_state(),
            "cuda_rng": (
                torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
            ),
        }
        path = self.directory / "checkpoint.pt"
        write_whole(path, lambda partial: torch.save(checkpoint, partial))

    def _load(self) -> dict[str, Any] | None:
        path = self.directory / "checkpoint.pt"
        if not path.exists():
            return None
        try:
            saved = torch.load(path, weights_only=True, map_location="cpu")
        except (EOFError, OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise RequestError(f"{path} is damaged: {first_line(error)}") from error
        if saved["request"] != json.dumps(self.request.to_dict()):
            raise RequestError(f"{path} is of another request than {self.directory}/recipe.json")
        self.finished, self.errors = saved["finished"], saved["errors"]
        self.seconds, self.lines = saved["seconds"], saved["lines"]
        self.order.set_state(saved["order"].cpu())
        torch.set_rng_state(saved["rng"].cpu())
        if saved["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(saved["cuda_rng"].cpu(), self.device)
        return saved


def _batches(data: Split, size: int, order: torch.Generator) -> Iterator[Tensor]:
    batches = list(torch.randperm(len(data), generator=order).split(size))
    # A last batch of one has no batch statistics: it joins the one before.
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    yield from batches


def _linear_decay(optimizer: Any, steps: int, decay: float) -> Any:
    """Learning rates fall linearly to zero over the last share `decay` of the steps."""

    def factor(step: int) -> float:
        return min(1.0, (steps - step) / (decay * steps)) if decay * steps > 0 else 1.0

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


def _indices(mask: Tensor) -> list[int]:
    return torch.nonzero(mask).flatten().tolist()
