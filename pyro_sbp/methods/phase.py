"""What a method hands to the training loop, which knows no method by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyro_sbp.elbo import Parts
from pyro_sbp.pruning import Equivalence
from pyro_sbp.recipes import Recipe
from pyro_sbp.surgery import Units

__all__ = ["Method", "Phase", "Predict", "plain_phase", "weights_group"]

Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Phase:
    """One stretch of training.

    Attributes:
        name: what it is called in metrics.
        epochs: how long it lasts.
        module: what is trained, and kept in a checkpoint.
        groups: parameter groups for `torch.optim`, each with its learning rate.
        loss: from a minibatch ``(images, labels)`` to its loss in parts, per example.
        predict: from images to logits, deterministic, for the test error of every epoch.
        finish: called once after the last epoch; gives what to measure the test error of, by name.
        units: the units left of every gate.
        held: the gates of which no unit reaches the threshold, and the best stays nevertheless.
        kl: the KL of all gates in nats, without its weights.
        freeze_batch_norm: use the running statistics of batch norms and leave them as they are.
        prunes: it leaves a posterior, and `finish` the network pruned by it.
        kept: what of the module stays in checkpoints once the phase has ended; None for all.
        restore: called in the place of `finish` when a run goes on whose checkpoint has only `kept`
            of this phase: it does all but what needs the weights, which a later phase has.
    """

    name: str
    epochs: int
    module: nn.Module
    groups: list[dict[str, Any]]
    loss: Callable[[Tensor, Tensor], Parts]
    predict: Predict
    finish: Callable[[], dict[str, Predict]]
    units: Callable[[], dict[str, int]] = field(default=dict)
    held: Callable[[], tuple[str, ...]] = field(default=tuple)
    kl: Callable[[], float] = field(default=float)
    freeze_batch_norm: bool = False
    prunes: bool = False
    kept: nn.Module | None = None
    restore: Callable[[], None] | None = None

    def train_mode(self) -> None:
        """Put the module into training mode."""
        self.module.train()
        if self.freeze_batch_norm:
            for module in self.module.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()


def weights_group(net: nn.Module, learning_rate: float, weight_decay: float) -> dict[str, Any]:
    """The parameter group of a network's weights."""
    return {"params": list(net.parameters()), "lr": learning_rate, "weight_decay": weight_decay}


def plain_phase(
    name: str,
    epochs: int,
    net: nn.Module,
    recipe: Recipe,
    units: Callable[[], dict[str, int]],
    learning_rate: float | None = None,
    frozen: bool = False,
) -> Phase:
    """Ordinary training of a network.

    Args:
        name, epochs, units: of the phase.
        net: what is trained.
        recipe: the settings.
        learning_rate: by default the recipe's.
        frozen: leave the statistics of batch norms as they are.
    """

    def loss(x: Tensor, y: Tensor) -> Parts:
        nll = F.cross_entropy(net(x), y)
        return Parts(nll, nll.new_zeros(()))

    rate = recipe.learning_rate if learning_rate is None else learning_rate
    return Phase(
        name,
        epochs,
        net,
        [weights_group(net, rate, recipe.weight_decay)],
        loss,
        predict=net,
        finish=lambda: {name: net},
        units=units,
        freeze_batch_norm=frozen,
    )


class Method(ABC):
    """A way to make a network smaller.

    Args:
        net: the network; it is trained in place.
        example_input: a batch of its inputs, a tensor.
        recipe: the settings.
        num_data: the size of the training data.
        input_features: dense layers whose inputs are gated one by one.
    """

    @abstractmethod
    def __init__(
        self,
        net: nn.Module,
        example_input: Any,
        recipe: Recipe,
        num_data: int,
        input_features: tuple[str, ...] = (),
    ) -> None: ...

    @abstractmethod
    def phases(self) -> Iterator[Phase]:
        """The phases in order; each is made when it begins, from what the earlier ones left."""

    @abstractmethod
    def prune(self, **settings: Any) -> None:
        """Set `small`, `units` and `equivalence` by the posterior and `choose_units`' settings."""

    #: The network that has the gates.
    net: nn.Module
    #: The layers that are not gated, and why.
    left_alone: dict[str, str]
    #: The smaller network, once the phases are through.
    small: nn.Module
    #: What became of the units of every gate.
    units: dict[str, Units]
    #: The gates that would have lost all units, and kept the fewest allowed.
    held: tuple[str, ...] = ()
    #: How far the smaller network was from the masked one when it was cut.
    equivalence: Equivalence
