"""The interface that all methods implement."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from pyro_sbp.gates.probing import Gates, find_gates
from pyro_sbp.gates.units import Units
from pyro_sbp.methods.phase import Phase, Predict
from pyro_sbp.methods.phased import PhasedTraining
from pyro_sbp.methods.plain import PlainPhase, fine_tuning
from pyro_sbp.pruning.budgets import Budget
from pyro_sbp.pruning.exactness import Equivalence
from pyro_sbp.pruning.macs import shares_not_prunable
from pyro_sbp.pruning.macs_target import TargetReached
from pyro_sbp.pruning.sparsity import KeptWeights
from pyro_sbp.recipes.recipe import Recipe

__all__ = ["Method"]

R = TypeVar("R", bound=Recipe)


class Method(PhasedTraining, Generic[R]):
    """A pruning method: the phases of training, and the smaller network.

    Args:
        net: the network, which is trained in place.
        example_input: a batch of inputs, a tensor.
        recipe: the settings, of the class of this method.
        num_data: the number of training examples.
        input_features: dense layers whose input features each become a unit.

    Attributes:
        gates: the gates of the network.
        not_prunable: the layers that are not prunable, and why.
        shares: their shares of the parameters and of the MACs, before training.
        mean: the network before its last cut, with all noise at its mean.
        small: the smaller network, after the last phase with noise.
        units: which units of every gate remain.
        held: the gates in which no unit reached the threshold, so that only the best was kept. For
            SparseVD: the gates of which no kept weight reads a unit.
        equivalence: the differences between the smaller and the masked network; with several cuts,
            the largest ones.
        target: how the units were chosen, if the recipe has a target of MACs.
        teacher: the network whose soft labels are learned with `distill`. With None it is `mean`.
    """

    mean: Predict
    small: nn.Module
    units: dict[str, Units]
    gates: Gates
    held: tuple[str, ...] = ()
    equivalence: Equivalence
    target: TargetReached | None = None
    teacher: Predict | None = None

    def __init__(
        self,
        net: nn.Module,
        example_input: Any,
        recipe: R,
        num_data: int,
        input_features: tuple[str, ...] = (),
    ) -> None:
        self.net, self.example_input, self.num_data = net, example_input, num_data
        self.recipe = recipe
        # Two examples give the same gates as a larger batch, and need less memory.
        self.gates = find_gates(net, example_input[:2], input_features)
        self.not_prunable = dict(self.gates.not_prunable)
        self.shares = shares_not_prunable(net, self.gates, example_input[:2])
        self.begin()

    @abstractmethod
    def begin(self) -> None:
        """Prepare the phases.

        Raises:
            ValueError: the method cannot be used for the network or the recipe.
        """

    @abstractmethod
    def noise(self) -> Iterator[Phase]:
        """The phases with noise. The last one sets `mean`, `small` and `units`."""

    def phases(self) -> Iterator[Phase]:
        """The phases, in order. Each phase is created when it begins, from the results of the
        earlier phases.
        """
        recipe = self.recipe
        if recipe.dense_epochs:
            sizes = {gate.name: gate.size for gate in self.gates}
            dense = PlainPhase("dense", recipe.dense_epochs, self.net, recipe, sizes)
            dense.weights_file = "dense.pt"
            yield dense
        yield from self.noise()
        if recipe.finetune_epochs:
            yield self.finetuning()

    def finetuning(self) -> Phase:
        """The phase of ordinary training of the smaller network."""
        units = {name: int(units.kept.sum()) for name, units in self.units.items()}
        teacher = (self.teacher or self.mean) if self.recipe.distill else None
        return fine_tuning(self.small, self.recipe, units, teacher)

    @abstractmethod
    def prune(
        self,
        *,
        criterion: str | None = None,
        threshold: float | None = None,
        budget: Budget | None = None,
        round_to: int = 1,
        min_units: int = 1,
    ) -> None:
        """Set `small`, `units`, `held` and `equivalence` from the posterior.

        Args:
            criterion: the criterion; by default that of the recipe.
            threshold, budget, round_to, min_units: as for `choose_units`. Without a threshold and a
                budget, the threshold is that of `Recipe.rule`.

        Raises:
            ValueError: the criterion is not for this method, or `choose_units` raises it for these
                settings.
        """

    @staticmethod
    @abstractmethod
    def distributions(loc: Tensor, scale: Tensor, recipe: Any) -> tuple[Any, Any]:
        """The posterior of a site, from its location and scale, and the prior of the site."""

    def kept_weights(self) -> KeptWeights | None:
        """The number of weights that are kept; None if the method does not remove weights."""
        return None
