"""What a method hands to the training loop, which knows no method by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyro_sbp.elbo import Parts
from pyro_sbp.pruning import Equivalence
from pyro_sbp.recipes import Recipe
from pyro_sbp.surgery import Units

__all__ = ["Method", "Phase", "Predict"]

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

    def train_mode(self) -> None:
        """Put the module into training mode."""
        self.module.train()
        if self.freeze_batch_norm:
            for module in self.module.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()


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
