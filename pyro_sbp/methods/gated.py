"""The mechanism that SBP and RBP share: training with noise on units, in turns.

Training with noise consists of turns. In a turn, some gates have noise. At the end of the turn, the
units to keep are chosen, the others are removed, and the next turn trains the smaller network. SBP
has one turn for all gates. RBP has one turn for each gate. `turn_phase` has the training and the
end of a turn.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from pyro_sbp.deployment.unit_latency import UnitLatency, measure_unit_latency
from pyro_sbp.distributions import TruncatedLogNormal, TruncatedLogUniform
from pyro_sbp.gates.gate import Gate
from pyro_sbp.methods.method import Method
from pyro_sbp.methods.phase import Phase
from pyro_sbp.methods.stage import Stage, Turn
from pyro_sbp.methods.turn_phase import TurnPhase, choose_for_target
from pyro_sbp.models.gated_model import LOG_HIGH, LOG_LOW, theta_prior
from pyro_sbp.models.sites import scales_of
from pyro_sbp.pruning.budgets import Budget
from pyro_sbp.pruning.choosing import check_settings, choose_units
from pyro_sbp.pruning.costs import Costs, UnitCosts, scales_by_cost
from pyro_sbp.pruning.criteria import check_prior, scores
from pyro_sbp.pruning.exactness import checked_shrink
from pyro_sbp.pruning.macs_control import KLControl
from pyro_sbp.pruning.macs_target import check_target
from pyro_sbp.recipes.gated_recipe import GatedRecipe

__all__ = ["GatedMethod"]

G = TypeVar("G", bound=GatedRecipe)


class GatedMethod(Method[G]):
    """Dense training, then turns with noise on gates, each of which ends with a cut, then
    fine-tuning."""

    #: Whether `prune` can restore units that the last turn has removed.
    reopens: ClassVar[bool]
    #: The latency of the units of the dense network, if the recipe's `cost` is "latency". It is set
    #: before the first turn, and is used in all turns.
    unit_latency: UnitLatency | None = None
    #: The MACs of the dense network; set only if the recipe's `cost` is "macs".
    dense_macs: float
    #: The weights of the KL divergence, if they change during training.
    control: KLControl | None = None

    @abstractmethod
    def turns(self) -> list[Turn]:
        """The turns, in order.

        Raises:
            ValueError: the recipe has fewer epochs than turns.
        """

    def begin(self) -> None:
        recipe, gates = self.recipe, self.gates
        if not gates:
            raise ValueError(
                f"no layer of {type(self.net).__name__} is prunable: {gates.reasons()}"
            )
        check_prior(recipe.prior_scale, recipe.threshold, recipe.criterion)
        self.kl_scale = scales_of([gate.name for gate in gates], recipe.kl_scale)
        # Check the arguments now, so that an error does not appear after hours of training.
        if recipe.cost == "macs":
            costs = self.costs(self.net, gates)
            self.dense_macs = costs.expected({})
            scales_by_cost(self.kl_scale, costs, recipe.macs_weight)
            if recipe.current_costs or recipe.target_macs_ratio is not None:
                self.control = self._control(costs)
        self._turns = self.turns()
        self._stage = Stage.dense(self.net, gates)
        self._ended: dict[str, tuple[Tensor, Tensor]] = {}
        self._current: TurnPhase | None = None
        self._open: TurnPhase | None = None

    def _control(self, costs: UnitCosts) -> KLControl:
        """The weights of the KL divergence that follow the current costs, or reach the target."""
        recipe, target = self.recipe, self.recipe.target_macs_ratio
        if target is not None:
            check_target(target, self.net, self.gates, costs, self.kl_scale, self.example_input)
        return KLControl(self.kl_scale, recipe.macs_weight, recipe.threshold, costs, target)

    def state(self) -> dict[str, Any] | None:
        return None if self.control is None else self.control.state_dict()

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        if self.control is not None and state is not None:
            self.control.load_state_dict(state)

    def noise(self) -> Iterator[Phase]:
        for index, turn in enumerate(self._turns):
            self._current = TurnPhase(self, self._stage, turn, index == len(self._turns) - 1)
            yield from self.parts_of(self._current)

    def parts_of(self, phase: TurnPhase) -> Iterator[Phase]:
        """The phases of a turn."""
        yield phase

    def costs(self, net: nn.Module, gates: Sequence[Gate]) -> UnitCosts:
        """The MACs of the units of a network."""
        return UnitCosts(net, gates, self.example_input[:1])

    def measure_latency(self, x: Tensor) -> UnitLatency:
        """Measure the latency of the units of the dense network.

        Args:
            x: images, whose memory format is measured.
        """
        size = self.recipe.cost_batch_size
        return measure_unit_latency(self.net, self.gates, x, batch_size=size)

    def weighted(self, costs: UnitCosts) -> Costs:
        """The costs that weight the KL divergence: MACs or latencies, by the recipe's `cost`."""
        if self.recipe.cost == "macs":
            return costs
        assert self.unit_latency is not None  # set by the loop, before the first turn
        return self.unit_latency

    def end(self, phase: TurnPhase, stage: Stage) -> None:
        """Store the result of a turn that has ended."""
        self._ended.update(phase.posteriors())
        self._current, self._stage = None, stage
        # Only methods that reopen a turn still need the network before the cut.
        self._open = phase if self.reopens else None
        self._return(stage)

    def _return(self, stage: Stage) -> None:
        self.small, self.units, self.held = stage.net, stage.units, stage.held
        self.equivalence = stage.equivalence

    def posteriors(self) -> dict[str, tuple[Tensor, Tensor]]:
        current = {} if self._current is None else self._current.posteriors()
        return {**self._ended, **current}

    def prune(
        self,
        *,
        criterion: str | None = None,
        threshold: float | None = None,
        budget: Budget | None = None,
        round_to: int = 1,
        min_units: int = 1,
    ) -> None:
        """Make a smaller network from the posterior of the last turn.

        Units that earlier turns have removed cannot be restored. Units that the last turn has
        removed can be restored only if the method `reopens` it. In a gate that has lost units,
        `round_to` rounds down.
        """
        rule = self.recipe.rule(criterion)
        criterion = rule.criterion.name
        check_settings(criterion, threshold, budget, round_to, min_units)
        target = self.recipe.target_macs_ratio
        if not (threshold is None and budget is None and criterion == self.recipe.criterion):
            target = None
        if target is None and budget is None and threshold is None:
            threshold = rule.threshold
        self.target = None  # that of an earlier choice
        if self._open is not None:
            stage, guide = self._open.stage, self._open.guide
            theta = {**stage.theta(), **guide.mean()}
            score = {**stage.score, **self._open.scores(criterion)}
        else:
            stage = self._stage
            theta, score = stage.theta(), self._scores(criterion)
        rounded = stage.beyond_multiples(round_to, score)
        for name, beyond in rounded.items():
            theta[name][beyond], score[name][beyond] = 0, -torch.inf
        if target is not None:
            costs, rounding = self.costs(stage.net, stage.gates), (round_to, min_units)
            choice = choose_for_target(self, stage, theta, score, costs, target, *rounding)
            if self._open is None or rounded:  # the scores are not those of the posterior
                self.target = None
        else:
            choice = choose_units(
                stage.net,
                stage.gates,
                theta,
                score,
                self.example_input,
                criterion=criterion,
                threshold=threshold,
                budget=budget,
                round_to=round_to,
                min_units=min_units,
                dense=self.net,
            )
        small, equivalence = checked_shrink(
            stage.net, stage.gates, choice.theta, self.example_input, choice.units
        )
        self._return(stage.after(choice, score, small, equivalence))

    def _scores(self, criterion: str) -> dict[str, Tensor]:
        """The scores of the units of the last stage, by gate. For the recipe's criterion, they are
        the scores with which the units were kept. For another criterion, they are computed from the
        posteriors.
        """
        stage = self._stage
        if criterion == self.recipe.criterion:
            return {name: value.clone() for name, value in stage.score.items()}
        found = {n: self.distributions(*values, self.recipe) for n, values in self._ended.items()}
        posteriors, priors = ({n: pair[i] for n, pair in found.items()} for i in (0, 1))
        return {
            name: value.cpu()[stage.units[name].remaining].where(stage.there(name), -torch.inf)
            for name, value in scores(posteriors, priors, criterion).items()
        }

    @staticmethod
    def distributions(
        loc: Tensor, scale: Tensor, recipe: Any
    ) -> tuple[TruncatedLogNormal, TruncatedLogUniform | TruncatedLogNormal]:
        posterior = TruncatedLogNormal(loc, scale, LOG_LOW, LOG_HIGH)
        return posterior, theta_prior(recipe.prior_scale, len(loc), loc)
