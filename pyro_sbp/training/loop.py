"""The loop over the phases of a method, with checkpoints that it goes on from."""

from __future__ import annotations

import dataclasses
import io
import json
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from pyro_sbp.datasets.augmentation import Augmentation
from pyro_sbp.datasets.loading import ImageData
from pyro_sbp.datasets.splits import Split
from pyro_sbp.errors import RequestError
from pyro_sbp.methods import Method, Phase
from pyro_sbp.methods.phase import Predict
from pyro_sbp.models.elbo import Parts
from pyro_sbp.pruning.recalibration import recalibrate_batch_norm
from pyro_sbp.recipes.request import Request
from pyro_sbp.training.checkpoints import read_checkpoint
from pyro_sbp.training.devices import dtype_of, gather, on_first
from pyro_sbp.training.files import write_text, write_whole

__all__ = ["Interrupted", "Loop", "Progress"]

#: How many test examples are predicted at a time.
TEST_BATCH = 500
#: How many training examples the batch norm statistics of a pruned network are measured on.
RECALIBRATE_ON = 10_000
#: Seconds after which a checkpoint is written within an epoch.
SAVE_EVERY = 120.0
#: Steps after which several processes agree on whether to stop or to write one.
AGREE_EVERY = 20


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
    held: tuple[str, ...] = ()
    macs: float | None = None


class Interrupted(Exception):
    """Training was asked to stop, and has left a checkpoint."""


@dataclasses.dataclass
class _Place:
    """Where a phase stands.

    Attributes:
        order: state of the generator of the order of the data, at the start of the epoch.
        total: sums of NLL and KL over the examples of the epoch, of all processes.
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


class _Step(nn.Module):
    """The loss of a phase as the call of a module, which Fabric can wrap."""

    def __init__(self, phase: Phase) -> None:
        super().__init__()
        self.module, self.loss = phase.module, phase.loss

    def forward(self, x: Tensor, y: Tensor, share: float, kl_weight: float) -> tuple[Tensor, Parts]:
        """The loss of which the processes' average counts, by this one's share, and its parts."""
        # Not outside, where Fabric has made float32 of it.
        parts = self.loss(x, y)
        if kl_weight != 1:
            parts = Parts(parts.nll, parts.kl * kl_weight)
        return parts.nll * share + parts.kl, parts


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
        data: on what, on the device of `fabric`.
        directory: where the checkpoint and the metrics lie.
        fabric: the devices and the precision, from `launch`.
        watch: told of the progress.
        stop: asked after every step whether to leave a checkpoint and raise `Interrupted`.
    """

    def __init__(
        self,
        request: Request,
        method: Method,
        data: ImageData,
        directory: Path,
        fabric: Fabric,
        watch: Callable[[Progress], None] = lambda progress: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.request, self.recipe = request, request.recipe
        self.method, self.data = method, data
        self.watch, self.stop = watch, stop
        self.fabric, self.device = fabric, fabric.device
        self.dtype = dtype_of(request.precision)
        last = request.channels_last
        self.memory_format = torch.channels_last if last else torch.contiguous_format
        self.augment = Augmentation(self.recipe.crop, self.recipe.flip)
        self.directory = directory
        self.errors: dict[str, float | None] = {}
        self.validation_errors: dict[str, float | None] = {}
        self.training_errors: dict[str, float | None] = {}
        self.seconds = 0.0
        self.order = torch.Generator().manual_seed(request.seed)
        self.finished: list[dict[str, Tensor]] = []
        self.lines: list[dict[str, Any]] = []

    def replay(self) -> None:
        """Load what the phases left, up to the last one that leaves a posterior."""
        saved = self._load()
        if saved is None:
            raise RequestError(f"{self.directory} has no checkpoint.pt to prune from")
        pruned = False
        for index, phase in enumerate(self.method.phases()):
            if index > len(self.finished) or (pruned and not phase.prunes):
                break
            if index < len(self.finished):
                self._restore(phase, self.finished[index])
            else:
                phase.module.load_state_dict(saved["module"])
                self._finish(phase)
            pruned = pruned or phase.prunes
        if not pruned:
            raise RequestError(f"{self.directory} was stopped before it had a posterior")

    def recalibrate(self) -> None:
        """Measure the batch norm statistics of the smaller network anew, if that is asked for."""
        if not self.recipe.recalibrate:
            return
        size, data = self.recipe.batch_size, self.data.train
        # At random: a folder's images lie class by class.
        order = torch.Generator().manual_seed(self.request.seed)
        sample = torch.randperm(len(data), generator=order)[:RECALIBRATE_ON]
        with closing(data.batches(sample.split(size))) as batches:
            recalibrate_batch_norm(self.method.small, (self._input(x) for x, _ in batches))

    def go(self) -> None:
        """Run all phases, from the checkpoint on where there is one."""
        saved = self._load()
        for index, phase in enumerate(self.method.phases()):
            if index < len(self.finished):
                self._restore(phase, self.finished[index])
                continue
            optimizer = torch.optim.Adam(phase.groups, fused=True)
            steps = len(self._batches(torch.arange(len(self.data.train))))
            schedule = _linear_decay(
                optimizer, phase.epochs * steps, self.recipe.decay if phase.decays else 0.0
            )
            place = _Place(self.order.get_state(), torch.zeros(2))
            if saved is not None:
                phase.module.load_state_dict(saved["module"])
                optimizer.load_state_dict(saved["optimizer"])
                schedule.load_state_dict(saved["schedule"])
                place, saved = _Place(**saved["place"]), None
            step = self.fabric.setup_module(_Step(phase))
            while place.epoch < phase.epochs:
                self._epoch(phase, step, place, optimizer, schedule)
            predictors = self._finish(phase)
            kept = phase.module if phase.kept is None else phase.kept
            self.finished.append(_copy(kept.state_dict()))
            for name, predict in predictors.items():
                self.measure(name, predict)

    def _restore(self, phase: Phase, state: dict[str, Tensor]) -> None:
        """Bring the method to where an ended phase left it."""
        if phase.restore is None:
            phase.module.load_state_dict(state)
            self._finish(phase)
        else:
            assert phase.kept is not None
            phase.kept.load_state_dict(state)
            phase.restore()

    def _finish(self, phase: Phase) -> dict[str, Predict]:
        phase.module.eval()
        predictors = phase.finish()
        if phase.prunes:
            self.recalibrate()
        return predictors

    def _input(self, x: Tensor) -> Tensor:
        return x.to(self.dtype, memory_format=self.memory_format)

    def _batches(self, order: Tensor) -> list[Tensor]:
        """The examples of each step, of all processes together."""
        batches = list(order.split(self.recipe.batch_size))
        # A share of one has no batch statistics: such a last batch joins the one before.
        if len(batches) > 1 and len(batches[-1]) < 2 * self.fabric.world_size:
            batches[-2:] = [torch.cat(batches[-2:])]
        return batches

    def _epoch(
        self, phase: Phase, step: nn.Module, place: _Place, optimizer: Any, schedule: Any
    ) -> None:
        """Go on to the end of the epoch."""
        started = saved = time.perf_counter()
        before = place.seconds
        phase.train_mode()
        total = place.total.to(self.device) / self.fabric.world_size  # a part of all each
        self.order.set_state(place.order)
        order = torch.randperm(len(self.data.train), generator=self.order)
        batches = self._batches(order)
        left = batches[place.step :]
        rank, world = self.fabric.global_rank, self.fabric.world_size
        indices = [batch[rank::world] for batch in left]
        # At once, not when a failure's traceback goes, end the processes that read images.
        with closing(self.data.train.batches(indices, self.augment)) as shares:
            for batch, (x, y) in zip(left, shares, strict=True):
                # Gradients are averaged over the processes, whose shares may differ by an example.
                share = world * len(y) / len(batch)
                weight = _kl_weight(phase, place, len(batches))
                loss, parts = step(self._input(x), y, share, weight)
                optimizer.zero_grad(set_to_none=True)
                self.fabric.backward(loss)
                optimizer.step()
                schedule.step()
                total += torch.stack([parts.nll.detach(), parts.kl.detach()]).to(total) * len(y)
                place.seen += len(batch)
                if place.step % 50 == 0:
                    self._tell(phase, place, len(batches), total * world / place.seen)
                place.step += 1
                now = time.perf_counter()
                stop, save = self._agree(
                    place.step % AGREE_EVERY == 0 or place.step == len(batches),
                    self.stop(),
                    now - saved > SAVE_EVERY,
                )
                if stop or save:
                    place.total, place.seconds = self._sum(total).cpu(), before + now - started
                    saved = now
                    self._save(phase, place, optimizer, schedule)
                if stop:
                    raise Interrupted
        total = self._sum(total)
        self._same_buffers(phase.module)
        phase.module.eval()
        mean = total / place.seen
        nll, kl = mean.tolist()
        _check_finite(phase, nll + kl, place.epoch)
        error = self.error_of(phase.predict)
        units = phase.units()
        seconds = before + time.perf_counter() - started
        self.seconds += seconds
        held = phase.held()
        macs = None if phase.macs is None else phase.macs()
        self._tell(phase, place, len(batches), mean, error, units, held, macs)
        line = {
            "phase": phase.name,
            "epoch": place.epoch + 1,
            "loss": nll + kl,
            "nll": nll,
            "kl": phase.kl() / len(self.data.train),
            "weighted_kl": kl,
            "error": error,
            "units": units,
            "held": list(held),
            **({} if macs is None else {"macs": macs}),
            "seconds": round(seconds, 3),
        }
        self.lines.append(line)
        text = "".join(json.dumps(x) + "\n" for x in self.lines)
        on_first(self.fabric, lambda: write_text(self.directory / "metrics.jsonl", text))
        place.next_epoch(self.order.get_state())
        self._save(phase, place, optimizer, schedule)

    def _agree(self, now: bool, stop: bool, save: bool) -> tuple[bool, bool]:
        """Whether to stop, and to write a checkpoint: what any process asks for, when they meet."""
        if self.fabric.world_size == 1:
            return stop, save
        if not now:
            return False, False
        asked = self._sum(torch.tensor([stop, save], dtype=torch.float32, device=self.device))
        return bool(asked[0]), bool(asked[1])

    def _sum(self, value: Tensor) -> Tensor:
        return self.fabric.all_reduce(value.clone(), reduce_op="sum")

    def _same_buffers(self, module: nn.Module) -> None:
        """The running statistics of batch norms differ by the shares: the first one's count."""
        if self.fabric.world_size > 1:
            for buffer in module.buffers():
                torch.distributed.broadcast(buffer, 0)

    def _tell(
        self,
        phase: Phase,
        place: _Place,
        steps: int,
        mean: Tensor,
        error: float | None = None,
        units: dict[str, int] | None = None,
        held: tuple[str, ...] = (),
        macs: float | None = None,
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
                held,
                macs,
            )
        )

    def measure(self, name: str, predict: Predict) -> None:
        """Note the error under a name: on the test set, on what is held out, and how much of random
        labels was memorised."""
        self.errors[name] = self.error_of(predict)
        if self.data.validation is not None:
            self.validation_errors[name] = self.error_of(predict, self.data.validation)
        if self.recipe.random_labels:
            self.training_errors[name] = self.error_of(predict, self.data.train)

    @torch.no_grad()
    def error_of(self, predict: Predict, split: Split | None = None) -> float:
        """The share of a split, the test set if none is given, that is classified wrongly, in
        percent.

        It is computed in the precision of the parameters: the network handed over does not
        multiply in bfloat16, as training may have.
        """
        split = self.data.test if split is None else split
        if isinstance(predict, nn.Module):
            predict.eval()
        wrong = torch.zeros((), dtype=torch.int64, device=self.device)
        rank, world = self.fabric.global_rank, self.fabric.world_size
        batches = torch.arange(len(split)).split(TEST_BATCH)[rank::world]
        with closing(split.batches(batches)) as shares:
            for x, y in shares:
                wrong += (predict(self._input(x)).argmax(1) != y).sum()
        return round(100 * int(self._sum(wrong)) / len(split), 6)

    def _save(self, phase: Phase, place: _Place, optimizer: Any, schedule: Any) -> None:
        _check_finite(phase, float(place.total.sum()), place.epoch)
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        random_of_all = gather(self.fabric, random)
        checkpoint = {
            "request": json.dumps(self.request.to_dict()),
            "finished": self.finished,
            "module": phase.module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "place": dataclasses.asdict(place),
            "errors": self.errors,
            "validation_errors": self.validation_errors,
            "training_errors": self.training_errors,
            "seconds": self.seconds,
            "lines": self.lines,
            "order": self.order.get_state(),
            "random": random_of_all,
            "left_alone": self.method.left_alone,
        }
        on_first(self.fabric, lambda: _write(checkpoint, self.directory / "checkpoint.pt"))

    def _load(self) -> dict[str, Any] | None:
        path = self.directory / "checkpoint.pt"
        if not path.exists():
            return None
        saved = read_checkpoint(path)
        if saved["request"] != self.request:
            raise RequestError(f"{path} is of another request than {self.directory}/recipe.json")
        self.finished, self.errors = saved["finished"], saved["errors"]
        self.validation_errors = saved.get("validation_errors") or {}
        self.training_errors = saved.get("training_errors") or {}
        self.seconds, self.lines = saved["seconds"], saved["lines"]
        self.order.set_state(saved["order"].cpu())
        random = saved["random"][self.fabric.global_rank]
        torch.set_rng_state(random["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"], self.device)
        return saved


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    # In memory first: torch tells of a disk that is full in words of its own.
    content = io.BytesIO()
    torch.save(checkpoint, content)
    write_whole(path, content.getbuffer())


def _kl_weight(phase: Phase, place: _Place, steps: int) -> float:
    """What the KL counts at the step where a phase stands."""
    first, last = phase.kl_weight
    return first + (last - first) * (place.epoch + place.step / steps) / phase.epochs


def _linear_decay(optimizer: Any, steps: int, decay: float) -> Any:
    """Learning rates fall linearly to zero over the last share `decay` of the steps."""

    def factor(step: int) -> float:
        return min(1.0, (steps - step) / (decay * steps)) if decay * steps > 0 else 1.0

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}
