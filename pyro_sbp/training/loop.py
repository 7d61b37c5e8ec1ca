"""The training loop over the phases of a method, with checkpoints from which it resumes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pyro_sbp.datasets.augmentation import Augmentation
from pyro_sbp.datasets.loading import ImageData
from pyro_sbp.errors import RequestError
from pyro_sbp.methods import Phase
from pyro_sbp.methods.phase import Predict, Standing
from pyro_sbp.methods.phased import PhasedTraining
from pyro_sbp.pruning.recalibration import recalibrate_batch_norm
from pyro_sbp.recipes.request import Request
from pyro_sbp.training.checkpoints import Checkpoint, Place, write_tensors
from pyro_sbp.training.devices import (
    dtype_of,
    gather,
    on_first,
    random_state,
    set_random_state,
    sum_over_processes,
)
from pyro_sbp.training.evaluation import Evaluation
from pyro_sbp.training.files import write_text
from pyro_sbp.training.latency_cost import set_unit_latency
from pyro_sbp.training.loggers import Log
from pyro_sbp.training.optimization import Optimization, moving_average
from pyro_sbp.training.phase_loss import PhaseLoss, kl_weight
from pyro_sbp.training.progress import Progress, ignore, metrics_line

__all__ = ["Interrupted", "Loop", "never"]

#: The number of training examples for measuring the batch norm statistics of a pruned network.
RECALIBRATE_ON = 10_000
#: The number of seconds after which a checkpoint is written within an epoch.
SAVE_EVERY = 120.0
#: The number of steps after which several processes agree on whether to stop or to write a
#: checkpoint.
AGREE_EVERY = 20
#: The number of steps after which `watch` is called.
TELL_EVERY = 50


class Interrupted(Exception):
    """Training was asked to stop, and has written a checkpoint."""


def never() -> bool:
    """Return False: the training is not stopped."""
    return False


@dataclass
class _Running:
    """A phase in training.

    Attributes:
        phase: the phase.
        loss: its loss, wrapped by Fabric.
        optimization: its optimizers and learning rates.
        average: the moving average of its weights; None if the recipe has no `average`.
        place: the position in the phase.
        steps: the number of steps of an epoch.
    """

    phase: Phase
    loss: nn.Module
    optimization: Optimization
    average: AveragedModel | None
    place: Place
    steps: int

    def restore(self, saved: Checkpoint) -> None:
        """Continue from a checkpoint within the phase."""
        self.phase.module.load_state_dict(saved.current["module"])
        self.optimization.load(saved.optimizer, saved.schedule)
        if self.average is not None and saved.average is not None:
            self.average.load_state_dict(saved.average)
        self.place = saved.place

    def progress(
        self, mean: Tensor, error: float | None = None, standing: Standing | None = None
    ) -> Progress:
        """The progress within an epoch, or after it if the error is given.

        Args:
            mean: NLL and weighted KL per example, ``[2]``.
            error, standing: as in `Progress`.
        """
        nll, kl = mean.tolist()
        where = (self.place.epoch + 1, self.phase.epochs, self.place.step, self.steps)
        return Progress(self.phase.name, *where, nll + kl, nll, kl, error, standing)


@dataclass
class _Clock:
    """The time of an epoch in seconds, continued after `before` seconds."""

    before: float
    started: float = field(default_factory=time.perf_counter)

    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.started


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
        log: called after every epoch, after its checkpoint has been written.
    """

    def __init__(
        self,
        request: Request,
        method: PhasedTraining,
        data: ImageData,
        directory: Path,
        fabric: Fabric,
        watch: Callable[[Progress], None] = ignore,
        stop: Callable[[], bool] = never,
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
        self.evaluation = Evaluation(data, fabric, self._input, self.recipe.random_labels)
        self.seconds = 0.0
        self.order = torch.Generator().manual_seed(request.seed)
        self.finished: list[dict[str, Any]] = []
        self.lines: list[dict[str, Any]] = []

    def go(self) -> None:
        """Run all phases, or resume from the checkpoint if there is one."""
        saved = self._load()
        if saved is None and self.request.weights is not None and not self.recipe.dense_epochs:
            self.evaluation.measure("dense", self.method.net)
        self._set_unit_latency()
        for index, phase in enumerate(self.method.phases()):
            if index < len(self.finished):
                self._restore(phase, self.finished[index])
                continue
            self.train(phase, saved)
            saved = None

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

    def _set_unit_latency(self) -> None:
        def example() -> Tensor:
            return self._input(self.data.test.batch(slice(0, 8))[0])

        set_unit_latency(self.method, self.directory, self.fabric, example)

    def train(self, phase: Phase, saved: Checkpoint | None = None) -> None:
        """Train a phase to its end, from a checkpoint if one is given, and measure the resulting
        networks.
        """
        run = self._begun(phase)
        if saved is not None:
            run.restore(saved)
        run.loss = self.fabric.setup_module(run.loss)
        while run.place.epoch < phase.epochs:
            self._epoch(run)
        if run.average is not None:
            phase.module.load_state_dict(run.average.module.state_dict())
        predictors = self._finish(phase)
        self.finished.append(phase.record())
        self._write_weights(phase)
        for name, predict in predictors.items():
            self.evaluation.measure(name, predict)

    def _begun(self, phase: Phase) -> _Running:
        """A phase before its first step."""
        steps = len(self._batches(torch.arange(len(self.data.train), device="cpu")))
        before, epochs = phase.schedule_span or (0, phase.epochs)
        optimization = Optimization(phase.groups(), self.recipe, epochs * steps, phase.decays)
        optimization.skip(before * steps)
        averaged = self.recipe.average and not phase.noisy
        average = moving_average(phase.module, self.recipe.average) if averaged else None
        place = Place(self.order.get_state(), torch.zeros(2, device="cpu"))
        return _Running(phase, PhaseLoss(phase), optimization, average, place, steps)

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

    def _epoch(self, run: _Running) -> None:
        """Train until the end of the current epoch, measure the network, and write the metrics and
        a checkpoint.
        """
        phase, average, place = run.phase, run.average, run.place
        clock = _Clock(place.seconds)
        phase.train_mode()
        mean = self._steps(run, clock) / place.seen
        self._same_buffers(phase.module)
        if average is not None:
            self._same_buffers(average.module)
        phase.module.eval()
        phase.check_finite(sum(mean.tolist()), place.epoch)
        predict = phase.predictor() if average is None else average.module
        error, standing = self.evaluation.evaluate(predict).error, phase.standing()
        seconds = clock.seconds()
        self.seconds += seconds
        progress = run.progress(mean, error, standing)
        self.watch(progress)
        line = metrics_line(progress, standing.kl / len(self.data.train), seconds)
        self.lines.append(line)
        text = "".join(json.dumps(x) + "\n" for x in self.lines)
        on_first(self.fabric, lambda: write_text(self.directory / "metrics.jsonl", text))
        place.next_epoch(self.order.get_state())
        self._save(run)
        # After the checkpoint, so that a resumed run does not log an epoch twice.
        on_first(self.fabric, lambda: self.log.epoch(line, len(self.lines)))

    def _steps(self, run: _Running, clock: _Clock) -> Tensor:
        """Take the remaining steps of the current epoch.

        Returns:
            The sums of NLL and weighted KL over the examples of the epoch and all processes, [2].

        Raises:
            Interrupted: `stop` returned true.
        """
        place, rank, world = run.place, self.fabric.global_rank, self.fabric.world_size
        total = place.total.to(self.device) / world  # the share of this process
        self.order.set_state(place.order)
        order = torch.randperm(len(self.data.train), generator=self.order, device="cpu")
        batches = self._batches(order)[place.step :]
        indices = [batch[rank::world] for batch in batches]
        saved = time.perf_counter()
        # `closing` ends the worker processes immediately, also if the loop raises an error.
        with closing(self.data.train.batches(indices, self.augment)) as shares:
            for batch, (x, y) in zip(batches, shares, strict=True):
                total += self._step(run, x, y, len(batch)).to(total) * len(y)
                place.seen += len(batch)
                if place.step % TELL_EVERY == 0:
                    self.watch(run.progress(total * world / place.seen))
                place.step += 1
                stop, save = self._agree(
                    place.step % AGREE_EVERY == 0 or place.step == run.steps,
                    self.stop(),
                    time.perf_counter() - saved > SAVE_EVERY,
                )
                if stop or save:
                    saved = time.perf_counter()
                    place.seconds = clock.seconds()
                    place.total = sum_over_processes(self.fabric, total).cpu()
                    self._save(run)
                if stop:
                    raise Interrupted
        return sum_over_processes(self.fabric, total)

    def _step(self, run: _Running, x: Tensor, y: Tensor, examples: int) -> Tensor:
        """Take one step.

        Args:
            run: the phase.
            x, y: images and labels of this process.
            examples: the number of examples of all processes.

        Returns:
            NLL and weighted KL per example, ``[2]``.
        """
        phase, place = run.phase, run.place
        # Gradients are averaged over processes, whose shares may differ by one example.
        share = self.fabric.world_size * len(y) / examples
        weight = kl_weight(phase, place, run.steps)
        phase.begin_step(place.epoch, place.step, run.steps)
        loss, parts = run.loss(self._input(x), y, share, weight)
        run.optimization.zero_grad()
        self.fabric.backward(loss)
        run.optimization.step()
        if run.average is not None:
            run.average.update_parameters(phase.module)
        return torch.stack([parts.nll.detach(), parts.kl.detach()])

    def _agree(self, now: bool, stop: bool, save: bool) -> tuple[bool, bool]:
        """Whether to stop, and whether to write a checkpoint.

        With several processes, `now` says whether they exchange their requests in this step. Then
        each result is true if any process asks for it.
        """
        if self.fabric.world_size == 1:
            return stop, save
        if not now:
            return False, False
        asked = sum_over_processes(
            self.fabric, torch.tensor([stop, save], dtype=torch.float32, device=self.device)
        )
        return bool(asked[0]), bool(asked[1])

    def _same_buffers(self, module: nn.Module) -> None:
        """Copy the buffers of the first process to the others.

        The running statistics of batch norms differ, because each process has other examples.
        """
        if self.fabric.world_size > 1:
            for buffer in module.buffers():
                torch.distributed.broadcast(buffer, 0)

    def _save(self, run: _Running) -> None:
        """Write a checkpoint."""
        phase, place = run.phase, run.place
        phase.check_finite(float(place.total.sum()), place.epoch)
        optimizer, schedule = run.optimization.state()
        checkpoint = Checkpoint(
            request=self.request,
            finished=self.finished,
            current={"module": phase.module.state_dict(), "network": phase.net_prefix},
            optimizer=optimizer,
            schedule=schedule,
            average=None if run.average is None else run.average.state_dict(),
            place=place,
            errors=self.evaluation.errors,
            calibration=self.evaluation.calibration,
            seconds=self.seconds,
            lines=self.lines,
            order=self.order.get_state(),
            random=gather(self.fabric, random_state(self.device)),
            left_alone=self.method.not_prunable,
            posteriors=self.method.posteriors(),
            gates={gate.name: gate.size for gate in self.method.gates},
            method=self.method.state(),
        )
        on_first(self.fabric, lambda: checkpoint.write(self.directory / "checkpoint.pt"))

    def _load(self) -> Checkpoint | None:
        """Read the checkpoint, if there is one, and restore all but the current phase.

        Raises:
            RequestError: the checkpoint is damaged, or belongs to another request.
        """
        path = self.directory / "checkpoint.pt"
        if not path.exists():
            return None
        saved = Checkpoint.read(path)
        if saved.request != self.request:
            raise RequestError(
                f"{path} belongs to another request than {self.directory}/recipe.json"
            )
        self.finished, self.evaluation.errors = saved.finished, saved.errors
        # Checkpoints of earlier versions have no calibration.
        self.evaluation.calibration = saved.calibration or self.evaluation.calibration
        self.seconds, self.lines = saved.seconds, saved.lines
        self.order.set_state(saved.order.cpu())
        self.method.load_state(saved.method)
        set_random_state(self.device, saved.random[self.fabric.global_rank])
        return saved
