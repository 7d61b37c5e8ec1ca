"""The loop over the phases of a method, with checkpoints that it goes on from."""

from __future__ import annotations

import dataclasses
import json
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sbp.augmentation import Augmentation
from pyro_sbp.datasets import ImageData, Split
from pyro_sbp.errors import RequestError, first_line
from pyro_sbp.files import write_text, write_whole
from pyro_sbp.methods import Method, Phase
from pyro_sbp.methods.phase import Predict
from pyro_sbp.recalibration import recalibrate_batch_norm
from pyro_sbp.recipes import Request

__all__ = ["Interrupted", "Loop", "Progress"]

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


class Loop:
    """The loop over the phases of a method.

    Args:
        request: what to do.
        method: how.
        data: on what, on the device of the request.
        directory: where the checkpoint and the metrics lie.
        watch: told of the progress.
        stop: asked after every step whether to leave a checkpoint and raise `Interrupted`.
    """

    def __init__(
        self,
        request: Request,
        method: Method,
        data: ImageData,
        directory: Path,
        watch: Callable[[Progress], None] = lambda progress: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.request, self.recipe = request, request.recipe
        self.method, self.data = method, data
        self.watch, self.stop = watch, stop
        self.device = torch.device(request.device)
        self.augment = Augmentation(self.recipe.crop, self.recipe.flip)
        self.directory = directory
        self.errors: dict[str, float | None] = {}
        self.seconds = 0.0
        self.order = torch.Generator().manual_seed(request.seed)
        self.finished: list[dict[str, Tensor]] = []
        self.lines: list[dict[str, Any]] = []

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
        # At random: a folder's images lie class by class.
        order = torch.Generator().manual_seed(self.request.seed)
        indices = list(_batches(data, size, order))[: -(-RECALIBRATE_ON // size)]
        recalibrate_batch_norm(self.method.small, (x for x, _ in data.batches(indices)))

    def go(self) -> None:
        """Run all phases, from the checkpoint on where there is one."""
        saved = self._load()
        for index, phase in enumerate(self.method.phases()):
            if index < len(self.finished):
                phase.module.load_state_dict(self.finished[index])
                self._finish(phase)
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
            for name, predict in self._finish(phase).items():
                self.errors[name] = self.error_of(predict)

    def _finish(self, phase: Phase) -> dict[str, Predict]:
        phase.module.eval()
        predictors = phase.finish()
        if phase.prunes:
            self.recalibrate()
        return predictors

    def _epoch(self, phase: Phase, place: _Place, optimizer: Any, schedule: Any) -> None:
        """Go on to the end of the epoch."""
        started = saved = time.perf_counter()
        before = place.seconds
        phase.train_mode()
        total = place.total.to(self.device)
        self.order.set_state(place.order)
        batches = list(_batches(self.data.train, self.recipe.batch_size, self.order))
        for x, y in self.data.train.batches(batches[place.step :], self.augment):
            parts = phase.loss(x, y)
            optimizer.zero_grad(set_to_none=True)
            parts.loss.backward()
            optimizer.step()
            schedule.step()
            total += torch.stack([parts.nll.detach(), parts.kl.detach()]).to(total) * len(y)
            place.seen += len(y)
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
        for x, y in self.data.test.batches(torch.arange(len(self.data.test)).split(TEST_BATCH)):
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
        if not isinstance(saved, dict) or not saved.keys() >= {"request", "finished", "place"}:
            raise RequestError(f"{path} is damaged: it is no checkpoint of a run")
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
