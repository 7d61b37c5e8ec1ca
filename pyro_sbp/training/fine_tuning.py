"""Fine-tuning of a pruned network in Python, as `pyro-sbp train` does it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor, nn

from pyro_sbp.errors import RequestError, unknown
from pyro_sbp.gates.calling import evaluating
from pyro_sbp.methods.plain import PlainPhase, fine_tuning
from pyro_sbp.pruning.recalibration import recalibrate_batch_norm
from pyro_sbp.recipes.method_recipes import SBPRecipe
from pyro_sbp.recipes.recipe import TEMPERATURE, Optimizer, Recipe, Schedule
from pyro_sbp.training.optimization import Optimization, moving_average

__all__ = ["Settings", "fine_tune"]


class Settings(TypedDict, total=False):
    """The settings of a recipe that apply to fine-tuning, with the recipe's defaults."""

    optimizer: Optimizer
    momentum: float
    weight_decay: float
    clip_gradient: float
    schedule: Schedule
    warmup: float
    decay: float
    label_smoothing: float
    average: float
    recalibrate: bool


def fine_tune(
    small: nn.Module,
    batches: Iterable[tuple[Any, Tensor]],
    epochs: int = 5,
    *,
    teacher: Callable[..., Tensor] | None = None,
    distill: float | None = None,
    learning_rate: float = 3e-4,
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    **settings: Unpack[Settings],
) -> list[float]:
    """Train a pruned network in place, as the phase of fine-tuning of `pyro-sbp train` does.

    The zeros of weight matrices stay zero, and batch norms keep their running statistics unless
    `recalibrate` is set. Afterwards each module has the training mode that it had.

    Args:
        small: a network that returns logits ``[batch, classes]``, such as `prune` returns.
        batches: pairs of an input and labels ``[batch]``, on the device of the network; a
            `DataLoader` or a list. Every epoch iterates over them once.
        epochs: the number of epochs.
        teacher: a network, or any function from inputs to logits, whose soft labels are learned in
            place of the labels (Hinton et al. 2015, arXiv 1503.02531). A module, or a
            `functools.partial` of one, is called in evaluation mode. The command line uses the
            network before pruning with the noise at its mean,
            ``partial(model.gated, theta=guide.mean())``.
        distill: the temperature of the soft labels; by default 4.
        learning_rate: the learning rate of the weights.
        precision: "bf16-mixed" computes each step under `torch.autocast` in bfloat16.
        settings: `optimizer`, `momentum`, `weight_decay`, `clip_gradient`, `schedule`, `warmup`,
            `decay`, `label_smoothing`, `average` and `recalibrate`, with the same meaning and the
            same defaults as in a recipe (docs/recipes.md).

    Returns:
        The mean loss of every epoch per example, in nats; with a teacher it is the squared
        temperature times the KL divergence from the teacher to the network.

    Raises:
        RequestError: a setting is unknown, out of its bounds or without effect, `batches` is empty
            or has no length, or the call is inside `torch.autocast`, which would keep using the
            weights of the first step.
        FloatingPointError: the loss or a parameter is not finite.
    """
    device = next((p.device.type for p in small.parameters()), "cpu")
    if torch.is_autocast_enabled(device):
        raise RequestError(
            "torch.autocast keeps copies of the weights until its block ends, so the network would "
            'not learn inside it; call fine_tune outside, with precision="bf16-mixed"'
        )
    if precision not in ("32-true", "bf16-mixed"):
        raise RequestError(f"precision is {precision!r}; expected '32-true' or 'bf16-mixed'")
    autocast = partial(torch.autocast, device, torch.bfloat16, enabled=precision == "bf16-mixed")
    if teacher is None and distill is not None:
        raise RequestError("distill is the temperature of a teacher's soft labels; give a teacher")
    if distill is not None and not distill > 0:
        raise RequestError(f"distill is {distill}; expected a temperature > 0")
    if teacher is not None and settings.get("label_smoothing"):
        raise RequestError("label_smoothing applies to the labels of the data; there is a teacher")
    temperature = (distill or TEMPERATURE) if teacher is not None else 0.0
    recipe = _recipe(epochs, learning_rate, temperature, settings)
    steps = _length(batches)
    with ExitStack() as stack:
        for net in (small, teacher.func if isinstance(teacher, partial) else teacher):
            if isinstance(net, nn.Module):
                stack.enter_context(evaluating(net))
        if recipe.recalibrate:
            recalibrate_batch_norm(small, (x for x, _ in batches))
        phase = fine_tuning(small, recipe, {}, teacher)
        stack.callback(phase.finish)
        return _train(phase, batches, steps, autocast)


def _train(
    phase: PlainPhase,
    batches: Iterable[tuple[Any, Tensor]],
    steps: int,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> list[float]:
    """The loss of every epoch of a phase."""
    recipe, small = phase.recipe, phase.module
    optimization = Optimization(phase.groups(), recipe, phase.epochs * steps, phase.decays)
    average = moving_average(small, recipe.average) if recipe.average else None
    losses = []
    for epoch in range(phase.epochs):
        phase.train_mode()
        total, seen = torch.zeros((), device="cpu"), 0
        for x, y in batches:
            with autocast():
                loss = phase.loss(x, y).loss
            optimization.zero_grad()
            loss.backward()
            optimization.step()
            if average is not None:
                average.update_parameters(small)
            total, seen = total.to(loss.device) + loss.detach() * len(y), seen + len(y)
        losses.append(float(total) / seen)
        phase.check_finite(losses[-1], epoch)
    optimization.zero_grad()
    if average is not None:
        small.load_state_dict(average.module.state_dict())
    return losses


def _recipe(epochs: int, learning_rate: float, distill: float, settings: Settings) -> Recipe:
    """The settings as a recipe, which checks them."""
    for name in settings:
        if name not in Settings.__annotations__:
            raise RequestError(unknown("setting", name, Settings.__annotations__))
    try:
        return SBPRecipe(
            finetune_epochs=epochs,
            finetune_learning_rate=learning_rate,
            distill=distill,
            **settings,
        )
    except RequestError as error:
        raise RequestError(str(error).replace("finetune_", "")) from error


def _length(batches: Iterable[Any]) -> int:
    """The number of batches of an epoch."""
    try:
        if not isinstance(batches, Sized):
            raise TypeError
        length = len(batches)
    except TypeError:  # also of a loader whose data set has no length
        raise RequestError(
            "batches has no length, which the schedule of the learning rate needs; expected a "
            "DataLoader of a data set with a length, or a list"
        ) from None
    if not length:
        raise RequestError("batches is empty; expected pairs of an input and labels")
    return length
