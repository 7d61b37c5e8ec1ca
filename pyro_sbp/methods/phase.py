"""What a method hands to the training loop, which knows no method by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyro_sbp.gates.probing import Gates, find_gates
from pyro_sbp.gates.surgery import Units
from pyro_sbp.models.elbo import ClosedFormELBO, Parts
from pyro_sbp.pruning.exactness import Equivalence
from pyro_sbp.recipes.settings import Recipe

__all__ = [
    "Method",
    "Phase",
    "Predict",
    "Sites",
    "check_gates",
    "distillation",
    "elbo_loss",
    "gated_weights_group",
    "noise_phases",
]

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
        macs: the expected MACs of one example under the posterior; None where there is none.
        freeze_batch_norm: use the running statistics of batch norms and leave them as they are.
        prunes: it leaves a posterior, and `finish` the network pruned by it.
        kept: what of the module stays in checkpoints once the phase has ended; None for all.
        restore: called in the place of `finish` when a run goes on whose checkpoint has only `kept`
            of this phase: it does all but what needs the weights, which a later phase has.
        kl_weight: what the KL counts at the first step and after the last, and linearly between.
        decays: whether learning rates fall at the end, as the recipe says.
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
    macs: Callable[[], float] | None = None
    freeze_batch_norm: bool = False
    prunes: bool = False
    kept: nn.Module | None = None
    restore: Callable[[], None] | None = None
    kl_weight: tuple[float, float] = (1.0, 1.0)
    decays: bool = True

    def train_mode(self) -> None:
        """Put the module into training mode."""
        self.module.train()
        if self.freeze_batch_norm:
            for module in self.module.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()


def _weights_group(net: nn.Module, learning_rate: float, weight_decay: float) -> dict[str, Any]:
    """The parameter group of a network's weights."""
    return {"params": list(net.parameters()), "lr": learning_rate, "weight_decay": weight_decay}


def gated_weights_group(net: nn.Module, recipe: Recipe) -> dict[str, Any]:
    """The parameter group of the weights of a network while there is noise on it."""
    rate = recipe.gated_learning_rate or recipe.learning_rate
    return _weights_group(net, rate, recipe.weight_decay)


def elbo_loss(model: Any, guide: Any, num_data: int) -> Callable[[Tensor, Tensor], Parts]:
    """The closed-form ELBO of a phase, from a minibatch to its parts per example."""
    elbo = ClosedFormELBO()

    def loss(x: Tensor, y: Tensor) -> Parts:
        nll, kl = elbo.parts(model, guide, x, y)
        return Parts(nll / num_data, kl / num_data)

    return loss


def check_gates(net: nn.Module, gates: Gates) -> None:
    """Raise ValueError where a network has none."""
    if not gates:
        raise ValueError(f"no part of {type(net).__name__} can be gated: {gates.left_alone}")


def noise_phases(recipe: Recipe, phase: Phase) -> Iterator[Phase]:
    """A phase with noise, of all of the recipe's epochs, after those in which its KL does not yet
    count in full."""
    before: dict[str, Any] = {
        **{"finish": dict, "prunes": False, "decays": False},
        # The next phase goes on with the same module: its state has all of theirs.
        **{"kept": nn.Module(), "restore": lambda: None},
    }
    free, rising = recipe.kl_free_epochs, recipe.kl_rising_epochs
    if free:
        # Noise that costs nothing drives no batch norm astray, and may be on an untrained network.
        free_of = {**before, "kl_weight": (0.0, 0.0), "freeze_batch_norm": False}
        yield replace(phase, name="kl-free", epochs=free, **free_of)
    if rising:
        yield replace(phase, name="kl-rising", epochs=rising, kl_weight=(0.0, 1.0), **before)
    yield replace(phase, epochs=phase.epochs - free - rising)


def plain_phase(
    name: str,
    epochs: int,
    net: nn.Module,
    recipe: Recipe,
    units: Callable[[], dict[str, int]],
    learning_rate: float | None = None,
    frozen: bool = False,
    hold_zeros: bool = False,
    teacher: Predict | None = None,
) -> Phase:
    """Ordinary training of a network, or distillation from another.

    Args:
        name, epochs, units: of the phase.
        net: what is trained.
        recipe: the settings.
        learning_rate: by default the recipe's.
        frozen: leave the statistics of batch norms as they are.
        hold_zeros: weights that are zero when it begins, single ones and columns that stand for a
            removed unit, stay so.
        teacher: whose soft labels it learns, at the recipe's temperature, where there is one
            (Hinton et al. 2015, arXiv 1503.02531).
    """
    # Not vectors, of which many begin as zeros: biases, and gains of residual branches.
    matrices = [(p, p.detach() != 0) for p in net.parameters() if p.ndim > 1]
    hooks = [
        p.register_hook(lambda grad, mask=mask: grad * mask)
        for p, mask in matrices
        if hold_zeros and not bool(mask.all())
    ]

    def loss(x: Tensor, y: Tensor) -> Parts:
        if teacher is None:
            nll = F.cross_entropy(net(x), y)
        else:
            with torch.no_grad():
                soft = teacher(x)
            nll = distillation(net(x), soft, recipe.distill)
        return Parts(nll, nll.new_zeros(()))

    def finish() -> dict[str, Predict]:
        for hook in hooks:
            hook.remove()
        return {name: net}

    rate = recipe.learning_rate if learning_rate is None else learning_rate
    groups = [_weights_group(net, rate, recipe.weight_decay)]
    return Phase(name, epochs, net, groups, loss, net, finish, units, freeze_batch_norm=frozen)


def distillation(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 times the KL divergence from the teacher's to the student's probabilities, per example.

    Both are of logits ``[batch, classes]`` over the temperature T; it is 0 where they agree. With
    the factor its gradients keep their size whatever T (Hinton et al. 2015, arXiv 1503.02531,
    section 2).
    """
    # Two networks that nearly agree differ by less than bfloat16 can tell.
    wide = torch.promote_types(logits.dtype, torch.float32)
    student, soft = ((x.to(wide) / temperature).log_softmax(1) for x in (logits, teacher))
    return temperature**2 * F.kl_div(student, soft, log_target=True, reduction="batchmean")


class Sites(NamedTuple):
    """What a phase has trained.

    Attributes:
        posteriors: of every site, over its elements; none in a phase without noise.
        priors: of every site.
        weights: the network's tensors, from their names.
    """

    posteriors: dict[str, Any]
    priors: dict[str, Any]
    weights: dict[str, Tensor]


class Method(ABC):
    """A way to make a network smaller.

    Args:
        net: the network; it is trained in place.
        example_input: a batch of its inputs, a tensor.
        recipe: the settings.
        num_data: the size of the training data.
        input_features: dense layers whose inputs are gated one by one.
    """

    def __init__(
        self,
        net: nn.Module,
        example_input: Any,
        recipe: Recipe,
        num_data: int,
        input_features: tuple[str, ...] = (),
    ) -> None:
        self.net, self.example_input, self.num_data = net, example_input, num_data
        recipe.check_method(self.name)
        self.recipe = recipe.for_method(self.name)
        # Two examples find what eight do, in less memory.
        self.gates = find_gates(net, example_input[:2], input_features)
        self.left_alone = dict(self.gates.left_alone)
        self.begin()

    @abstractmethod
    def begin(self) -> None:
        """Make ready what the phases need.

        Raises:
            ValueError: the network or the recipe is none for this method.
        """

    @abstractmethod
    def noise(self) -> Iterator[Phase]:
        """The phases with noise, of which the last leaves `mean`, `small` and `units`."""

    def phases(self) -> Iterator[Phase]:
        """The phases in order; each is made when it begins, from what the earlier ones left."""
        recipe = self.recipe
        if recipe.dense_epochs:
            sizes = {gate.name: gate.size for gate in self.gates}
            yield plain_phase("dense", recipe.dense_epochs, self.net, recipe, lambda: sizes)
        yield from self.noise()
        if recipe.finetune_epochs:
            kept = {name: int(units.kept.sum()) for name, units in self.units.items()}
            yield plain_phase(
                "finetuned",
                recipe.finetune_epochs,
                self.small,
                recipe,
                lambda: kept,
                learning_rate=recipe.finetune_learning_rate,
                frozen=not recipe.recalibrate,
                hold_zeros=True,
                teacher=self.mean if recipe.distill else None,
            )

    @abstractmethod
    def prune(self, **settings: Any) -> None:
        """Set `small`, `units` and `equivalence` by the posterior and `choose_units`' settings."""

    @staticmethod
    @abstractmethod
    def read(state: Mapping[str, Tensor], recipe: Recipe) -> Sites:
        """What the state of a phase's module says, without the network."""

    def summary(self) -> dict[str, Any]:
        """What is to be told of the smaller network besides its units, as plain values."""
        return {}

    #: What a request calls it.
    name: str
    #: The network before its last cut, with all noise at its mean.
    mean: Predict
    #: The smaller network, once the phases are through.
    small: nn.Module
    #: What became of the units of every gate.
    units: dict[str, Units]
    #: The gates that would have lost all units, and kept the fewest allowed.
    held: tuple[str, ...] = ()
    #: How far the smaller network was from the masked one when it was cut.
    equivalence: Equivalence
