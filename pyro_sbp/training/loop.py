"""The training loop over the phases of a method, with checkpoints from which it resumes."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pyro_sbp.datasets.augmentation import Augmentation
from pyro_sbp.datasets.loading import ImageData
from pyro_sbp.datasets.splits import LabelledImages
from pyro_sbp.deployment.unit_latency import UnitLatency
from pyro_sbp.errors import RequestError
from pyro_sbp.methods import Phase
from pyro_sbp.methods.gated import GatedMethod
from pyro_sbp.methods.phase import Predict, Standing
from pyro_sbp.methods.phased import PhasedTraining
from pyro_sbp.models.calibration import BINS, Measured, measured, sums
from pyro_sbp.models.elbo import Parts
from pyro_sbp.pruning.recalibration import recalibrate_batch_norm
from pyro_sbp.recipes.request import Request
from pyro_sbp.training.checkpoints import Checkpoint, Place, write_tensors
from pyro_sbp.training.devices import dtype_of, gather, on_first
from pyro_sbp.training.files import write_text
from pyro_sbp.training.latency_file import read_unit_latency, write_unit_latency
from pyro_sbp.training.loggers import Log
from pyro_sbp.training.optimization import Optimization, moving_average

__all__ = ["Interrupted", "Loop", "Progress"]

SPLITS = ("test", "validation", "training")
#: The largest number of values, and of images, in a batch of test images. A batch has 500 images
#: of CIFAR-10, or 10 images of 224 x 224.
TEST_NUMBERS, TEST_BATCH = 500 * 3 * 32 * 32, 500
#: The number of training examples for measuring the batch norm statistics of a pruned network.
RECALIBRATE_ON = 10_000
#: The number of seconds after which a checkpoint is written within an epoch.
SAVE_EVERY = 120.0
#: The number of steps after which several processes agree on whether to stop or to write a
#: checkpoint.
AGREE_EVERY = 20


@dataclasses.dataclass(frozen=True)
class Progress:
    """The progress of a run, passed to `watch` of `train` after every epoch and every 50 steps.

    Attributes:
        phase, epoch, epochs, step, steps: the phase, and the position within it.
        loss, nll, weighted_kl: per example; the loss is the sum of the other two.
        error: after an epoch, the test error in percent.
        standing: after an epoch, the units that remain.
    """

    phase: str
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    nll: float
    weighted_kl: float
    error: float | None = None
    standing: Standing | None = None


class Interrupted(Exception):
    """Training was asked to stop, and has written a checkpoint."""


class _Step(nn.Module):
    """The loss of a phase as a module, which Fabric can wrap."""

    def __init__(self, phase: Phase) -> None:
        super().__init__()
        self.module, self.loss = phase.module, phase.loss

    def forward(self, x: Tensor, y: Tensor, share: float, kl_weight: float) -> tuple[Tensor, Parts]:
        """The loss of this process, whose average over all processes is the loss of the batch, and
        its parts.

        Args:
            share: the number of examples of this process, divided by the average over processes.
            kl_weight: the weight of the KL divergence.
        """
        # Computed here, because Fabric converts outputs of the module to float32.
        parts = self.loss(x, y)
        if kl_weight != 1:
            parts = Parts(parts.nll, parts.kl * kl_weight)
        return parts.nll * share + parts.kl, parts


class Loop:
    """The training loop over the phases of a method.

    Args:
        request: the request of the run.
        method: the method.
        data: the data, on the device of `fabric`.
        directory: the directory of the checkpoint and the metrics.
        fabric: the devices and the precision, from `launch`.
        watch: called with the progress during training.
        stop: called after every step; if it returns true, a checkpoint is written and `Interrupted`
            is raised.
        log: called after every epoch, when its checkpoint is written.
    """

    def __init__(
        self,
        request: Request,
        method: PhasedTraining,
        data: ImageData,
        directory: Path,
        fabric: Fabric,
        watch: Callable[[Progress], None] = lambda progress: None,
        stop: Callable[[], bool] = lambda: False,
        log: Log | None = None,
    ) -> None:
        self.request, self.recipe = request, request.recipe
        self.method, self.data = method, data
        self.watch, self.stop, self.log = watch, stop, log or Log()
        self.fabric, self.device = fabric, fabric.device
        self.dtype = dtype_of(request.precision)
        last = request.channels_last
        self.memory_format = torch.channels_last if last else torch.contiguous_format
        self.augment = Augmentation(self.recipe.crop, self.recipe.flip)
        self.directory = directory
        #: In percent, by split ("test", "validation", "training") and by the name of the network.
        self.errors: dict[str, dict[str, float | None]] = {split: {} for split in SPLITS}
        #: NLL and ECE, by split and by the name of the network.
        self.calibration: dict[str, dict[str, dict[str, float]]] = {split: {} for split in SPLITS}
        self.seconds = 0.0
        self.order = torch.Generator().manual_seed(request.seed)
        self.finished: list[dict[str, Any]] = []
        self.lines: list[dict[str, Any]] = []

    def replay(self) -> None:
        """Restore the results of all phases up to the last one with noise.

        Raises:
            RequestError: there is no checkpoint, or it is from before the last part of the first
                phase with noise.
        """
        saved = self._load()
        if saved is None:
            raise RequestError(f"{self.directory} has no checkpoint.pt to prune from")
        self._set_unit_latency()
        noisy = False
        for index, phase in enumerate(self.method.phases()):
            if index > len(self.finished) or (noisy and not phase.noisy):
                break
            if index < len(self.finished):
                self._restore(phase, self.finished[index])
            else:
                phase.module.load_state_dict(saved.current["module"])
                self._finish(phase)
            noisy = noisy or (phase.noisy and phase.ends)
        if not noisy:
            raise RequestError(f"{self.directory} was stopped before its noise was trained")

    def recalibrate(self, net: nn.Module | None = None) -> None:
        """Measure the batch norm statistics of a network, by default the smaller one, if
        `recalibrate` is set."""
        if not self.recipe.recalibrate:
            return
        size, data = self.recipe.batch_size, self.data.train
        # Drawn at random, because the images of a folder are ordered by class.
        order = torch.Generator().manual_seed(self.request.seed)
        sample = torch.randperm(len(data), generator=order, device="cpu")[:RECALIBRATE_ON]
        with closing(data.batches(sample.split(size))) as batches:
            small = self.method.small if net is None else net
            recalibrate_batch_norm(small, (self._input(x) for x, _ in batches))

    def go(self) -> None:
        """Run all phases, or resume from the checkpoint if there is one."""
        saved = self._load()
        if saved is None and self.request.weights is not None and not self.recipe.dense_epochs:
            self.measure("dense", self.method.net)
        self._set_unit_latency()
        for index, phase in enumerate(self.method.phases()):
            if index < len(self.finished):
                self._restore(phase, self.finished[index])
                continue
            self.train(phase, saved)
            saved = None

    def _set_unit_latency(self) -> None:
        """Give the method the latencies of its units, if its KL divergence is weighted by them.

        They are measured at the beginning of the run, by the first process, and are written into
        the run directory. A resumed run reads them, because the weights of the KL divergence must
        not change.
        """
        method = self.method
        if not isinstance(method, GatedMethod) or method.recipe.cost != "latency":
            return
        directory = self.directory

        def measured() -> UnitLatency:
            if not (directory / "checkpoint.pt").exists():
                x, _ = self.data.test.batch(slice(0, 8))
                write_unit_latency(directory, method.measure_latency(self._input(x)))
            return read_unit_latency(directory)

        found = self.fabric.broadcast(on_first(self.fabric, measured))
        assert found is not None
        try:
            found.relative()
        except ValueError as error:
            raise RequestError(str(error)) from error
        method.unit_latency = found

    def train(self, phase: Phase, saved: Checkpoint | None = None) -> None:
        """Train a phase to its end, from a checkpoint if one is given, and measure the resulting
        networks.
        """
        optimization = self._optimization(phase)
        average = self._average(phase)
        place = Place(self.order.get_state(), torch.zeros(2, device="cpu"))
        if saved is not None:
            phase.module.load_state_dict(saved.current["module"])
            optimization.load(saved.optimizer, saved.schedule)
            if average is not None and saved.average is not None:
                average.load_state_dict(saved.average)
            place = saved.place
        step = self.fabric.setup_module(_Step(phase))
        while place.epoch < phase.epochs:
            self._epoch(phase, step, place, optimization, average)
        if average is not None:
            phase.module.load_state_dict(average.module.state_dict())
        predictors = self._finish(phase)
        self.finished.append(phase.record())
        self._write_weights(phase)
        for name, predict in predictors.items():
            self.measure(name, predict)

    def _write_weights(self, phase: Phase) -> None:
        """Write the weights of the network after a phase, if the phase names a file for them."""
        if phase.weights_file:
            path, state = self.directory / phase.weights_file, phase.module.state_dict()
            on_first(self.fabric, lambda: write_tensors(path, state))

    def _restore(self, phase: Phase, record: dict[str, Any]) -> None:
        """Restore the state of the method at the end of a phase."""
        phase.module.eval()
        if phase.restore(record) and phase.noisy:
            self.recalibrate()

    def _finish(self, phase: Phase) -> dict[str, Predict]:
        phase.module.eval()
        predictors = phase.finish()
        if phase.noisy and phase.ends and phase.folds:
            self.recalibrate()
        return predictors

    def _input(self, x: Tensor) -> Tensor:
        return x.to(self.dtype, memory_format=self.memory_format)

    def _batches(self, order: Tensor) -> list[Tensor]:
        """The indices of the examples of each step, for all processes together."""
        batches = list(order.split(self.recipe.batch_size))
        # One example has no batch statistics. If a process would get only one in the last batch,
        # this batch is merged with the one before.
        if len(batches) > 1 and len(batches[-1]) < 2 * self.fabric.world_size:
            batches[-2:] = [torch.cat(batches[-2:])]
        return batches

    def _optimization(self, phase: Phase) -> Optimization:
        """The optimizers and the learning rates of a phase at its first step."""
        steps = len(self._batches(torch.arange(len(self.data.train), device="cpu")))
        before, epochs = phase.schedule_span or (0, phase.epochs)
        optimization = Optimization(phase.groups(), self.recipe, epochs * steps, phase.decays)
        optimization.skip(before * steps)
        return optimization

    def _average(self, phase: Phase) -> AveragedModel | None:
        """The moving average of the weights of a phase; None if the recipe has no `average`."""
        if phase.noisy or not self.recipe.average:
            return None
        return moving_average(phase.module, self.recipe.average)

    def _epoch(
        self,
        phase: Phase,
        step: nn.Module,
        place: Place,
        optimization: Optimization,
        average: AveragedModel | None,
    ) -> None:
        """Train until the end of the current epoch."""
        started = saved = time.perf_counter()
        before = place.seconds
        phase.train_mode()
        total = place.total.to(self.device) / self.fabric.world_size  # the share of this process
        self.order.set_state(place.order)
        order = torch.randperm(len(self.data.train), generator=self.order, device="cpu")
        batches = self._batches(order)
        left = batches[place.step :]
        rank, world = self.fabric.global_rank, self.fabric.world_size
        indices = [batch[rank::world] for batch in left]
        # `closing` ends the worker processes immediately, also if the loop raises an error.
        with closing(self.data.train.batches(indices, self.augment)) as shares:
            for batch, (x, y) in zip(left, shares, strict=True):
                # Gradients are averaged over processes, whose shares may differ by one example.
                share = world * len(y) / len(batch)
                weight = _kl_weight(phase, place, len(batches))
                phase.begin_step(place.epoch, place.step, len(batches))
                loss, parts = step(self._input(x), y, share, weight)
                optimization.zero_grad()
                self.fabric.backward(loss)
                optimization.step()
                if average is not None:
                    average.update_parameters(phase.module)
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
                    self._save(phase, place, optimization, average)
                if stop:
                    raise Interrupted
        total = self._sum(total)
        self._same_buffers(phase.module)
        if average is not None:
            self._same_buffers(average.module)
        phase.module.eval()
        mean = total / place.seen
        nll, kl = mean.tolist()
        phase.check_finite(nll + kl, place.epoch)
        error = self.evaluate(phase.predictor() if average is None else average.module).error
        standing = phase.standing()
        seconds = before + time.perf_counter() - started
        self.seconds += seconds
        self._tell(phase, place, len(batches), mean, error, standing)
        line = {
            "phase": phase.name,
            "epoch": place.epoch + 1,
            "loss": nll + kl,
            "nll": nll,
            "kl": standing.kl / len(self.data.train),
            "weighted_kl": kl,
            "error": error,
            "units": dict(standing.units),
            "held": list(standing.held),
            **({} if standing.macs is None else {"macs": standing.macs}),
            **({} if standing.control is None else {"control": dict(standing.control)}),
            "seconds": round(seconds, 3),
        }
        self.lines.append(line)
        text = "".join(json.dumps(x) + "\n" for x in self.lines)
        on_first(self.fabric, lambda: write_text(self.directory / "metrics.jsonl", text))
        place.next_epoch(self.order.get_state())
        self._save(phase, place, optimization, average)
        # After the checkpoint, so that a resumed run does not log an epoch twice.
        on_first(self.fabric, lambda: self.log.epoch(line, len(self.lines)))

    def _agree(self, now: bool, stop: bool, save: bool) -> tuple[bool, bool]:
        """Whether to stop, and whether to write a checkpoint.

        With several processes, `now` says whether they exchange their requests in this step. Then
        each result is true if any process asks for it.
        """
        if self.fabric.world_size == 1:
            return stop, save
        if not now:
            return False, False
        asked = self._sum(torch.tensor([stop, save], dtype=torch.float32, device=self.device))
        return bool(asked[0]), bool(asked[1])

    def _sum(self, value: Tensor) -> Tensor:
        total = self.fabric.all_reduce(value.clone(), reduce_op="sum")
        assert isinstance(total, Tensor)
        return total

    def _same_buffers(self, module: nn.Module) -> None:
        """Copy the buffers of the first process to the others.

        The running statistics of batch norms differ, because each process has other examples.
        """
        if self.fabric.world_size > 1:
            for buffer in module.buffers():
                torch.distributed.broadcast(buffer, 0)

    def _tell(
        self,
        phase: Phase,
        place: Place,
        steps: int,
        mean: Tensor,
        error: float | None = None,
        standing: Standing | None = None,
    ) -> None:
        nll, kl = mean.tolist()
        where = (phase.name, place.epoch + 1, phase.epochs, place.step, steps)
        self.watch(Progress(*where, nll + kl, nll, kl, error, standing))

    def measure(self, name: str, predict: Predict) -> None:
        """Measure the error and the calibration of a network.

        They are measured on the test set, on the images reserved for validation, and on the
        training images if their labels are random.
        """
        splits: dict[str, LabelledImages] = {"test": self.data.test}
        if self.data.validation is not None:
            splits["validation"] = self.data.validation
        if self.recipe.random_labels:
            splits["training"] = self.data.train
        for split, images in splits.items():
            found = self.evaluate(predict, images)
            self.errors[split][name] = found.error
            self.calibration[split][name] = {"nll": found.nll, "ece": found.ece}

    @torch.no_grad()
    def evaluate(self, predict: Predict, split: LabelledImages | None = None) -> Measured:
        """The error and the calibration of a network on a split; by default the test set.

        They are computed in the precision of the parameters. Training may use bfloat16, but the
        returned network does not.
        """
        images = self.data.test if split is None else split
        if isinstance(predict, nn.Module):
            predict.eval()
        total = torch.zeros(2 + BINS, dtype=torch.float64, device=self.device)
        rank, world = self.fabric.global_rank, self.fabric.world_size
        batches = torch.arange(len(images), device="cpu").split(_test_batch(images))[rank::world]
        with closing(images.batches(batches)) as shares:
            for x, y in shares:
                total += sums(predict(self._input(x)), y)
        return measured(self._sum(total), len(images))

    def _save(
        self,
        phase: Phase,
        place: Place,
        optimization: Optimization,
        average: AveragedModel | None,
    ) -> None:
        phase.check_finite(float(place.total.sum()), place.epoch)
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        optimizer, schedule = optimization.state()
        checkpoint = Checkpoint(
            request=self.request,
            finished=self.finished,
            current={"module": phase.module.state_dict(), "network": phase.net_prefix},
            optimizer=optimizer,
            schedule=schedule,
            average=None if average is None else average.state_dict(),
            place=place,
            errors=self.errors,
            calibration=self.calibration,
            seconds=self.seconds,
            lines=self.lines,
            order=self.order.get_state(),
            random=gather(self.fabric, random),
            left_alone=self.method.not_prunable,
            posteriors=self.method.posteriors(),
            gates={gate.name: gate.size for gate in self.method.gates},
            method=self.method.state(),
        )
        on_first(self.fabric, lambda: checkpoint.write(self.directory / "checkpoint.pt"))

    def _load(self) -> Checkpoint | None:
        path = self.directory / "checkpoint.pt"
        if not path.exists():
            return None
        saved = Checkpoint.read(path)
        if saved.request != self.request:
            raise RequestError(
                f"{path} belongs to another request than {self.directory}/recipe.json"
            )
        self.finished, self.errors = saved.finished, saved.errors
        # Checkpoints of earlier versions have no calibration.
        self.calibration = saved.calibration or self.calibration
        self.seconds, self.lines = saved.seconds, saved.lines
        self.order.set_state(saved.order.cpu())
        self.method.load_state(saved.method)
        random = saved.random[self.fabric.global_rank]
        torch.set_rng_state(random["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"], self.device)
        return saved


def _test_batch(split: LabelledImages) -> int:
    """The batch size for predictions on a split."""
    return min(TEST_BATCH, max(1, TEST_NUMBERS // math.prod(split.image_shape)))


def _kl_weight(phase: Phase, place: Place, steps: int) -> float:
    """The weight of the KL divergence at the current step of a phase."""
    first, last = phase.kl_weight
    return first + (last - first) * (place.epoch + place.step / steps) / phase.epochs
