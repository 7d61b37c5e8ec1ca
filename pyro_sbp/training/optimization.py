"""The optimizers and learning rates of a phase."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
)
from torch.optim.swa_utils import AveragedModel

from pyro_sbp.recipes.recipe import Recipe

__all__ = ["Optimization", "moving_average"]


class Optimization:
    """The optimizers of a phase, each with its schedule, from the settings of the recipe.

    The weights are trained by `Recipe.optimizer`, and the noise always by Adam.

    Args:
        groups: the parameter groups from `Phase.groups`: the weights, then the noise if there is
            any.
        recipe: the settings.
        steps: the number of steps of the phase.
        decays: whether learning rates follow the schedule; otherwise they are constant.
    """

    def __init__(
        self, groups: Sequence[Mapping[str, Any]], recipe: Recipe, steps: int, decays: bool
    ) -> None:
        weights, *noise = (dict(group) for group in groups)
        self._weights, self._clip = weights["params"], recipe.clip_gradient
        self.optimizers: list[Optimizer]
        if recipe.optimizer == "sgd":
            momentum = recipe.momentum
            self.optimizers = [
                torch.optim.SGD([weights], momentum=momentum, nesterov=momentum > 0, fused=True)
            ]
            if noise:
                self.optimizers.append(torch.optim.Adam(noise, fused=True))
        else:
            # The noise has no weight decay, so AdamW and Adam are the same for it.
            kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
            self.optimizers = [kind([weights, *noise], fused=True)]
        self.schedules = [
            _schedule(optimizer, recipe, steps) if decays else LambdaLR(optimizer, _constant)
            for optimizer in self.optimizers
        ]

    def skip(self, steps: int) -> None:
        """Advance the learning rates by some steps."""
        with warnings.catch_warnings():
            # torch expects a step of the optimizer first.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            for _ in range(steps):
                for schedule in self.schedules:
                    schedule.step()

    def zero_grad(self) -> None:
        """Set all gradients to None."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Take a step, after clipping the gradients of the weights if `clip_gradient` is set."""
        if self._clip:
            torch.nn.utils.clip_grad_norm_(self._weights, self._clip)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The states of the optimizers and of the schedules, for `load`."""
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        schedules = [schedule.state_dict() for schedule in self.schedules]
        return _joined(optimizers), _joined(schedules)

    def load(self, optimizer: dict[str, Any], schedule: dict[str, Any]) -> None:
        """Resume from the states that `state` returned."""
        for of_weights_or_noise, state in zip(self.optimizers, self._split(optimizer), strict=True):
            of_weights_or_noise.load_state_dict(state)
        for its_schedule, state in zip(self.schedules, self._split(schedule), strict=True):
            its_schedule.load_state_dict(state)

    def _split(self, state: dict[str, Any]) -> list[dict[str, Any]]:
        return [state] if len(self.optimizers) == 1 else [state["weights"], state["noise"]]


def moving_average(module: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the parameters and buffers of a module.

    The first updates have a smaller decay, (1 + n) / (10 + n) after n updates (as
    ``tf.train.ExponentialMovingAverage`` with ``num_updates``). Otherwise the average of a short
    phase would consist mostly of its first weights.

    Args:
        module: the module.
        decay: the largest decay, in [0, 1).
    """

    def update(averages: Sequence[Tensor], values: Sequence[Tensor], count: Tensor | int) -> None:
        done = torch.as_tensor(count, dtype=torch.float64)
        share = 1 - ((1 + done) / (10 + done)).clamp(max=decay)
        for average, value in zip(averages, values, strict=True):
            if average.is_floating_point():
                average.lerp_(value, share.to(average))
            else:  # integers, such as counts of batches, have no average
                average.copy_(value)

    return AveragedModel(module, multi_avg_fn=update, use_buffers=True)


def _joined(states: list[dict[str, Any]]) -> dict[str, Any]:
    if len(states) == 1:
        return states[0]
    weights, noise = states
    return {"weights": weights, "noise": noise}


def _constant(step: int) -> float:
    return 1.0


def _schedule(optimizer: Optimizer, recipe: Recipe, steps: int) -> LRScheduler:
    """The learning rates over the steps of a phase."""
    warmup = round(recipe.warmup * steps)
    if recipe.schedule == "one-cycle":
        if steps < 3:  # too few steps to rise and fall
            return LambdaLR(optimizer, _constant)
        rates = [group["lr"] for group in optimizer.param_groups]
        # OneCycleLR divides by the number of rising steps - 1 and by the number of falling steps.
        rising_steps = min(max(2, round((recipe.warmup or 0.3) * steps)), steps - 1)
        return OneCycleLR(
            optimizer, rates, steps, pct_start=rising_steps / steps, cycle_momentum=False
        )
    after = max(1, steps - warmup)
    schedule: LRScheduler
    if recipe.schedule == "cosine":
        schedule = CosineAnnealingLR(optimizer, after)
    else:
        decay = recipe.decay * after

        def factor(step: int) -> float:
            return min(1.0, (after - step) / decay) if decay > 0 else 1.0

        schedule = LambdaLR(optimizer, factor)
    if not warmup:
        return schedule
    rising = LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [rising, schedule], [warmup])
