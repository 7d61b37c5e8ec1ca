"""Phases of training: the interface between a method and the training loop."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyro_sbp.models.elbo import ClosedFormELBO, Parts
from pyro_sbp.recipes.recipe import Recipe

__all__ = [
    "NoisePhase",
    "Phase",
    "Predict",
    "Standing",
    "copied",
    "noise_groups",
    "rising_kl",
    "weights_group",
]

Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Standing:
    """The state of a phase after an epoch.

    Attributes:
        units: the number of units that remain in every gate.
        held: the gates in which no unit reaches the threshold, so that only the best is kept.
        kl: the KL divergence of all sites in nats, without weights.
        macs: the expected MACs of one example under the posterior; None without noise on units.
        control: the numbers of `KLControl.standing`, if weights of the KL divergence change.
    """

    units: Mapping[str, int]
    held: tuple[str, ...] = field(default=())
    kl: float = 0.0
    macs: float | None = None
    control: Mapping[str, float] | None = None


class Phase(ABC):
    """A phase of training.

    Args:
        name: its name in the metrics.
        epochs: the number of epochs.
        module: the module to train. Its state is part of a checkpoint.

    Attributes:
        freeze_batch_norm: whether batch norms use their running statistics without updating them.
        noisy: whether there is noise.
        ends: whether training of the module ends with this phase; with noise, the network is then
            pruned. Otherwise the next phase continues to train the module.
        folds: whether, with noise, the mean of the noise is folded into the network when the phase
            ends; batch norms of the network may then be recalibrated.
        decays: whether learning rates follow the recipe's schedule; otherwise they are constant.
        schedule_span: the number of epochs of the schedule before this phase, and of the whole
            schedule; by default the schedule covers this phase only.
        weights_file: the file in the run directory to which the weights of the network are written
            when the phase ends; no file if it is empty.
        net_prefix: the prefix of the names of the network's tensors in the state of the module.
        kl_weight: the weight of the KL divergence at the first step and after the last step; it is
            linear in between.
    """

    freeze_batch_norm = False
    noisy = False
    ends = True
    folds = True
    decays = True
    weights_file = ""
    net_prefix = ""
    kl_weight = (1.0, 1.0)

    def __init__(self, name: str, epochs: int, module: nn.Module) -> None:
        self.name, self.epochs, self.module = name, epochs, module
        self.schedule_span: tuple[int, int] | None = None

    @abstractmethod
    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups for `torch.optim`, each with its learning rate: first the weights,
        then the parameters of the noise, if any."""

    @abstractmethod
    def loss(self, x: Tensor, y: Tensor) -> Parts:
        """The loss of a minibatch of images and labels, in parts, per example."""

    # Most phases have nothing to prepare, so the method is not abstract.
    def begin_step(self, epoch: int, step: int, steps: int) -> None:  # noqa: B027
        """Prepare the loss of the next step, such as the weights of its KL divergence.

        Args:
            epoch: the number of finished epochs of the phase.
            step, steps: the number of finished steps of the epoch, and of all its steps.
        """

    @abstractmethod
    def predictor(self) -> Predict:
        """The deterministic network that would be returned now, as a function from images to
        logits.

        It is valid until the parameters change.
        """

    @abstractmethod
    def standing(self) -> Standing:
        """The state of the phase after an epoch."""

    def finish(self) -> dict[str, Predict]:
        """End the phase after its last epoch.

        Returns:
            The networks whose errors are measured, by name.
        """
        return {}

    def record(self) -> dict[str, Any]:
        """The values that a checkpoint stores for the phase after it has ended."""
        if not self.ends:  # the next phase continues to train the module
            return {}
        return {"module": copied(self.module.state_dict()), "network": self.net_prefix}

    def restore(self, record: Mapping[str, Any]) -> bool:
        """Restore the state of the method at the end of the phase.

        Args:
            record: the values that `record` returned.

        Returns:
            Whether the weights of the network were restored. Otherwise a later phase restores them.
        """
        if not self.ends:
            return False
        self.module.load_state_dict(record["module"])
        self.finish()
        return True

    def changed(self, **changes: Any) -> Self:
        """A phase for the same module, with some attributes changed."""
        other = copy.copy(self)
        for name, value in changes.items():
            setattr(other, name, value)
        return other

    def train_mode(self) -> None:
        """Put the module into training mode."""
        self.module.train()
        if self.freeze_batch_norm:
            for module in self.module.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def check_finite(self, loss: float, epoch: int) -> None:
        """Raise FloatingPointError if the loss of an epoch or a parameter is not finite.

        Args:
            loss: the loss.
            epoch: the number of epochs before.
        """
        where = f"in epoch {epoch + 1} of phase {self.name!r}"
        for name, parameter in self.module.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise FloatingPointError(
                    f"the parameter {name!r} is not finite {where}: a lower learning rate may help"
                )
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} {where}: a lower learning rate may help")


class NoisePhase(Phase):
    """Training with noise by the closed-form ELBO.

    Args:
        name, epochs, module: as for `Phase`.
        model, guide: the Pyro model and its guide.
        num_data: the number of training examples.
    """

    # With batch statistics, a factor common to all units would not change the likelihood.
    freeze_batch_norm = True
    noisy = True
    net_prefix = "net."

    def __init__(
        self, name: str, epochs: int, module: nn.Module, model: Any, guide: Any, num_data: int
    ) -> None:
        super().__init__(name, epochs, module)
        self.model, self.guide, self.num_data = model, guide, num_data
        self._elbo = ClosedFormELBO()

    def loss(self, x: Tensor, y: Tensor) -> Parts:
        nll, kl = self._elbo.parts(self.model, self.guide, x, y)
        return Parts(nll / self.num_data, kl / self.num_data)

    def kl(self) -> float:
        """The KL divergence of all sites in nats, without weights."""
        return sum(float(kl.sum()) for kl in self.guide.kl().values())


def rising_kl(phase: Phase, free: int, rising: int) -> Iterator[Phase]:
    """Split a phase with noise, so that the weight of its KL divergence rises at the beginning.

    Args:
        phase: the phase, with the total number of epochs.
        free: the number of first epochs, in which the weight of the KL divergence is 0.
        rising: the number of next epochs, in which the weight rises linearly to 1.
    """
    before = phase.changed(ends=False, decays=False)
    if free:
        # If the KL divergence has no weight, batch statistics do no harm (see `NoisePhase`), and an
        # untrained network needs them.
        yield before.changed(
            name="kl-free", epochs=free, kl_weight=(0.0, 0.0), freeze_batch_norm=False
        )
    if rising:
        yield before.changed(name="kl-rising", epochs=rising, kl_weight=(0.0, 1.0))
    yield phase.changed(epochs=phase.epochs - free - rising)


def weights_group(net: nn.Module, recipe: Recipe, learning_rate: float) -> dict[str, Any]:
    """The parameter group for the weights of a network."""
    parameters = list(net.parameters())
    return {"params": parameters, "lr": learning_rate, "weight_decay": recipe.weight_decay}


def noise_groups(net: nn.Module, noise: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """The parameter groups for a network with noise: its weights, and the posterior."""
    rate = recipe.gated_learning_rate or recipe.learning_rate
    return [
        weights_group(net, recipe, rate),
        {
            "params": list(noise.parameters()),
            "lr": recipe.noise_learning_rate,
            "weight_decay": 0.0,
        },
    ]


def copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of a state dict with detached tensors, which training does not change."""
    return {name: value.detach().clone() for name, value in state.items()}
