"""Phases: what a method hands to the training loop, which knows no method by name."""

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
from pyro_sbp.recipes.settings import Recipe

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
    """Where a phase stands after an epoch.

    Attributes:
        units: the units left of every gate.
        held: the gates in which no unit reaches the threshold, so that only the best is kept.
        kl: the KL divergence of all sites in nats, without weights.
        macs: the expected MACs of one example under the posterior; None without noise on units.
    """

    units: Mapping[str, int]
    held: tuple[str, ...] = field(default=())
    kl: float = 0.0
    macs: float | None = None


class Phase(ABC):
    """One stretch of training.

    Args:
        name: its name in the metrics.
        epochs: how many epochs it takes.
        module: what is trained. Its state is part of a checkpoint.

    Attributes:
        freeze_batch_norm: batch norms use their running statistics and do not update them.
        noisy: there is noise.
        ends: it ends the work on its module, and with noise the network is pruned then. Otherwise
            the next phase goes on with the module.
        folds: with noise, the mean of the noise is folded into the network when the phase ends, and
            batch norms of the network may then be recalibrated.
        decays: learning rates follow the recipe's schedule; otherwise they are constant.
        schedule_span: the epochs of the schedule before the phase, and the epochs of the whole
            schedule; by default the schedule is over the phase itself.
        weights_file: the file of the run directory that the network's weights are written to when
            the phase ends; none if it is empty.
        net_prefix: what stands before the names of the network's tensors in the module's state.
        kl_weight: the weight of the KL divergence at the first step and after the last, and
            linearly between.
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
        then the noise if there is any."""

    @abstractmethod
    def loss(self, x: Tensor, y: Tensor) -> Parts:
        """The loss of a minibatch of images and labels, in parts, per example."""

    @abstractmethod
    def predictor(self) -> Predict:
        """The network as it would be returned now, from images to logits, deterministic.

        It is valid until the parameters change.
        """

    @abstractmethod
    def standing(self) -> Standing:
        """Where the phase stands after an epoch."""

    def finish(self) -> dict[str, Predict]:
        """End the phase after its last epoch.

        Returns:
            The networks to measure the errors of, by name.
        """
        return {}

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps of the phase once it has ended."""
        if not self.ends:  # the next phase goes on with the module
            return {}
        return {"module": copied(self.module.state_dict()), "network": self.net_prefix}

    def restore(self, record: Mapping[str, Any]) -> bool:
        """Bring the method to where the ended phase left it.

        Args:
            record: what `record` gave.

        Returns:
            Whether the network has its weights. Otherwise the state of a later phase has them.
        """
        if not self.ends:
            return False
        self.module.load_state_dict(record["module"])
        self.finish()
        return True

    def changed(self, **changes: Any) -> Self:
        """A phase of the same module with other attributes."""
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
        num_data: the size of the training data.
    """

    # With batch statistics a factor that all units share would cost no likelihood.
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
    """A phase with noise, preceded by epochs in which its KL divergence does not count in full.

    Args:
        phase: the phase, of all epochs together.
        free: the first epochs, in which the weight of the KL divergence is 0.
        rising: the next epochs, in which it rises linearly to 1.
    """
    before = phase.changed(ends=False, decays=False)
    if free:
        # Noise that costs nothing does not distort batch statistics, and the network may be
        # untrained.
        yield before.changed(
            name="kl-free", epochs=free, kl_weight=(0.0, 0.0), freeze_batch_norm=False
        )
    if rising:
        yield before.changed(name="kl-rising", epochs=rising, kl_weight=(0.0, 1.0))
    yield phase.changed(epochs=phase.epochs - free - rising)


def weights_group(net: nn.Module, recipe: Recipe, learning_rate: float) -> dict[str, Any]:
    """The parameter group of the weights of a network."""
    parameters = list(net.parameters())
    return {"params": parameters, "lr": learning_rate, "weight_decay": recipe.weight_decay}


def noise_groups(net: nn.Module, noise: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """The parameter groups of a network with noise: its weights, and the posterior."""
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
    """A copy of a state dict, whose tensors are not updated any more."""
    return {name: value.detach().clone() for name, value in state.items()}
