"""A turn of training with noise: the units that it keeps, and its cut."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import pyro
import torch
from torch import Tensor, nn

from pyro_sbp.gates.copies import copy_network
from pyro_sbp.gates.folding import factors
from pyro_sbp.gates.gate import Gate
from pyro_sbp.gates.surgery import cut
from pyro_sbp.gates.units import Units
from pyro_sbp.methods.phase import NoisePhase, Predict, Standing, copied, noise_groups
from pyro_sbp.methods.stage import Carried, Stage, Turn, over_all_units
from pyro_sbp.models.gated_guide import TruncatedLogNormalGuide
from pyro_sbp.models.gated_model import GatedModel
from pyro_sbp.pruning.choosing import Choice, choose_units, held_gates
from pyro_sbp.pruning.costs import Costs, UnitCosts, scales_by_cost
from pyro_sbp.pruning.criteria import guide_scores
from pyro_sbp.pruning.exactness import Equivalence, checked_shrink
from pyro_sbp.pruning.macs_control import UPDATE_EVERY, KLControl
from pyro_sbp.pruning.macs_target import TargetReached, choose_by_macs
from pyro_sbp.recipes.gated_recipe import GatedRecipe

__all__ = ["CUT_SHARE", "MethodWithTurns", "TurnPhase", "choose_for_target"]

#: If the next turn continues to train the same noise, units whose score is under this share of the
#: threshold are removed between the two turns. A unit whose posterior is the log-uniform prior has
#: a signal-to-noise ratio of 0.33, and a score of 0 by other criteria.
CUT_SHARE = 0.5


class Decision(NamedTuple):
    """The units that a turn keeps.

    Attributes:
        choice: the units to keep.
        score: by gate, the scores of the units of the network.
    """

    choice: Choice
    score: dict[str, Tensor]


class MethodWithTurns(Protocol):
    """What a turn uses of its method, and where it puts its results.

    The attributes and methods are those of `GatedMethod`.
    """

    net: nn.Module
    example_input: Any
    num_data: int
    kl_scale: dict[str, float]
    control: KLControl | None
    dense_macs: float
    mean: Predict
    target: TargetReached | None

    @property
    def recipe(self) -> GatedRecipe:
        """The settings."""

    def costs(self, net: nn.Module, gates: Sequence[Gate]) -> UnitCosts:
        """The MACs of the units of a network."""

    def weighted(self, costs: UnitCosts) -> Costs:
        """The costs that weight the KL divergence."""

    def end(self, phase: TurnPhase, stage: Stage) -> None:
        """Store the result of a turn that has ended."""


def choose_for_target(
    method: MethodWithTurns,
    stage: Stage,
    theta: Mapping[str, Tensor],
    score: Mapping[str, Tensor],
    costs: UnitCosts,
    target: float,
    round_to: int = 1,
    min_units: int = 1,
) -> Choice:
    """Choose the units of the network of a stage that reaches a target of MACs.

    The comparison with the threshold of the recipe becomes the `target` of the method.

    Args:
        method: the method of the turn.
        stage: the network.
        theta, score: by gate, the multipliers and the scores of the units.
        costs: the costs of the units.
        target: the ratio of MACs.
        round_to, min_units: as for `choose_units`.

    Raises:
        ValueError: no threshold gives the target.
    """
    choice, method.target = choose_by_macs(
        stage.net,
        stage.gates,
        theta,
        score,
        method.example_input,
        costs,
        criterion=method.recipe.criterion,
        ratio=target,
        threshold=method.recipe.threshold,
        dense=method.net,
        dense_macs=method.dense_macs,
        round_to=round_to,
        min_units=min_units,
    )
    return choice


class TurnPhase(NoisePhase):
    """Training of the current network with noise on some of its gates, and their pruning.

    Args:
        method: the method.
        stage: the network at the beginning of the turn.
        turn: the turn.
        last: whether it is the last turn.
    """

    guide: TruncatedLogNormalGuide

    def __init__(self, method: MethodWithTurns, stage: Stage, turn: Turn, last: bool) -> None:
        recipe = method.recipe
        self.method, self.recipe, self.stage, self.turn, self.last = (
            method, recipe, stage, turn, last,
        )  # fmt: skip
        self.costs = method.costs(stage.net, stage.gates)
        if method.control is not None:
            kl_scale = method.control.weights
        elif stage.carried is None:
            costs = method.weighted(self.costs)
            kl_scale = scales_by_cost(method.kl_scale, costs, recipe.macs_weight)
        else:
            kl_scale = dict(stage.carried.kl_scale)
        self.kl_scale = {name: kl_scale[name] for name in turn.gates}
        model = GatedModel(
            stage.net,
            [gate for gate in stage.gates if gate.name in turn.gates],
            method.num_data,
            noise_per=recipe.noise_per,
            kl_scale=self.kl_scale,
            prior_scale=recipe.prior_scale,
        )
        guide = TruncatedLogNormalGuide(
            model, init_loc=recipe.init_loc, init_log_scale=recipe.init_log_scale
        ).to(next(stage.net.parameters()))
        if stage.carried is not None:
            guide.set_posteriors(stage.carried.posteriors)
        module = nn.ModuleDict({"net": stage.net, "guide": guide})
        super().__init__(turn.name, turn.epochs, module, model, guide, method.num_data)
        self.folds = not turn.continues
        self._hooks = _hold_zeros(stage)
        self._recorded: dict[str, Units] | None = None

    def groups(self) -> list[dict[str, Any]]:
        return noise_groups(self.stage.net, self.guide, self.recipe)

    def begin_step(self, epoch: int, step: int, steps: int) -> None:
        control = self.method.control
        if control is None or step % UPDATE_EVERY:
            return
        position = None
        if self.decays:  # the KL divergence has its full weight
            before, epochs = self.schedule_span or (0, self.epochs)
            position = (before + epoch + step / steps) / epochs
        self.model.kl_scale.update(control.update(self.costs, self._snr(), position))

    def _snr(self) -> dict[str, Tensor]:
        """The signal-to-noise ratios of the units, by gate, 0 where a column of zeros remains."""
        return {name: x.where(self._there(name), 0.0) for name, x in self.guide.snr().items()}

    def decide(self) -> Decision:
        """The units that the turn would keep if it ended now."""
        recipe, stage = self.recipe, self.stage
        mean, own = self.guide.mean(), self.scores(recipe.criterion)
        score = {**stage.score, **own}
        choice = choose_units(
            stage.net,
            stage.gates,
            {**stage.theta(), **mean},
            score,
            self.method.example_input,
            criterion=recipe.criterion,
            threshold=recipe.threshold,
        )
        return self._decided(choice, score, own, recipe.threshold)

    def _decided(
        self, choice: Choice, score: dict[str, Tensor], own: dict[str, Tensor], threshold: float
    ) -> Decision:
        """The decision of a turn.

        Args:
            choice: the units to keep.
            score: by gate, the scores of the units.
            own: the scores of the units of the gates of the turn.
            threshold: the threshold with which the units were chosen.
        """
        held = held_gates(own, threshold)
        # A unit can be kept although its score is under the threshold. Its score is then set to the
        # threshold, so that `prune` keeps it too.
        stayed = {name: value.clamp_min(self.recipe.threshold) for name, value in own.items()}
        return Decision(dataclasses.replace(choice, held=held), {**score, **stayed})

    def scores(self, criterion: str) -> dict[str, Tensor]:
        """The scores of the turn's gates, minus infinity where a column of zeros remains."""
        found = guide_scores(self.guide, criterion)
        return {name: value.where(self._there(name), -torch.inf) for name, value in found.items()}

    def _there(self, gate: str) -> Tensor:
        return self.stage.there(gate).to(next(self.stage.net.parameters()).device)

    def _decide_cut(self) -> Decision:
        """The units that remain while their noise is trained further."""
        stage, recipe = self.stage, self.recipe
        score = {**stage.score, **self.scores(recipe.criterion)}
        choice = choose_units(
            stage.net,
            stage.gates,
            stage.theta(),
            score,
            self.method.example_input,
            criterion=recipe.criterion,
            # A share of a negative threshold would be above the threshold.
            threshold=min(CUT_SHARE * recipe.threshold, recipe.threshold),
        )
        return Decision(dataclasses.replace(choice, held=()), score)

    def predictor(self) -> Predict:
        theta = self.decide().choice.theta
        own = {name: theta[name] for name in self.turn.gates}
        return partial(self._gated, theta=own)

    def _gated(self, x: Tensor, theta: Mapping[str, Tensor]) -> Tensor:
        return self.model.gated(x, theta)

    def standing(self) -> Standing:
        choice = self.decide().choice
        units = {
            name: int(unit.then(choice.units[name]).kept.sum())
            for name, unit in self.stage.units.items()
        }
        # The expected MACs are those of the current network, in which other gates may already have
        # lost units.
        expected, control = self.costs.expected_under(self._snr()), self.method.control
        numbers = None if control is None else control.standing()
        return Standing(units, choice.held, self.kl(), expected, numbers)

    def posteriors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Location and scale of log theta for all units of the turn's gates in the dense network.

        Units that were removed before the turn have the prior.
        """
        scale, units = self.recipe.prior_scale, self.stage.units
        return {
            name: over_all_units(q.loc.detach(), q.scale.detach(), units[name].remaining, scale)
            for name, q in self.guide.posteriors().items()
        }

    def finish(self) -> dict[str, Predict]:
        if not self.ends:
            return {}
        stage = self.stage
        self._detach()
        choice, score = self._final_decision()
        small, equivalence = checked_shrink(
            stage.net, stage.gates, choice.theta, self.method.example_input, choice.units
        )
        self._equivalence, self._units = equivalence, choice.units
        self.method.end(self, stage.after(choice, score, small, equivalence, self._carried()))
        if not self.last:
            return {}
        self.method.mean = partial(self._gated, theta=self.guide.mean())
        return {"mean": self.method.mean, "pruned": small}

    def _detach(self) -> None:
        """Remove the hooks of the turn and its parameters in Pyro."""
        for hook in self._hooks:
            hook.remove()
        _forget(self.model, self.guide)

    def _final_decision(self) -> Decision:
        """The units that remain after the turn.

        If the turn was restored from a record, the units are those of the record: on another
        machine, rounding can change the decision on a unit at the threshold. The scores, the gates
        that are held and the target are computed again.
        """
        decision = self._decide_end()
        if self._recorded is None:
            return decision
        theta = {**self.stage.theta(), **({} if self.turn.continues else self.guide.mean())}
        kept = {
            name: theta[name] * unit.kept.to(theta[name]) for name, unit in self._recorded.items()
        }
        choice = dataclasses.replace(decision.choice, theta=kept, units=self._recorded)
        return decision._replace(choice=choice)

    def _decide_end(self) -> Decision:
        """The units that the posterior at the end of the turn keeps."""
        if self.turn.continues:
            return self._decide_cut()
        target = self.recipe.target_macs_ratio
        return self.decide() if target is None else self._decide_by_macs(target)

    def _decide_by_macs(self, target: float) -> Decision:
        """The units of the network with a target of MACs, with a warning if the posterior is far
        from it.
        """
        method, stage, recipe = self.method, self.stage, self.recipe
        own = self.scores(recipe.criterion)
        score = {**stage.score, **own}
        theta = {**stage.theta(), **self.guide.mean()}
        choice = choose_for_target(method, stage, theta, score, self.costs, target)
        if method.target is not None and method.target.far:
            warnings.warn(method.target.warning(recipe.threshold), stacklevel=2)
        return self._decided(choice, score, own, choice.threshold)

    def _carried(self) -> Carried | None:
        if not self.turn.continues:
            return None
        posteriors = {
            name: (q.loc.detach().clone(), q.scale.detach().log())
            for name, q in self.guide.posteriors().items()
        }
        return Carried(posteriors, self.kl_scale)

    def record(self) -> dict[str, Any]:
        if not self.ends:
            return super().record()
        units = {name: (unit.kept, unit.remaining) for name, unit in self._units.items()}
        if self.last:
            return {**super().record(), "units": units}
        # `prune` starts from the weights of the last turn. The weights after an earlier turn are
        # not stored, because the next turn trains them further.
        guide, equivalence = self.guide.state_dict(), dataclasses.asdict(self._equivalence)
        return {"guide": copied(guide), "equivalence": equivalence, "units": units}

    def restore(self, record: Mapping[str, Any]) -> bool:
        if self.ends and "units" in record:  # not in checkpoints of earlier versions
            self._recorded = {name: Units(*masks) for name, masks in record["units"].items()}
        if self.last or not self.ends:
            return super().restore(record)
        self.guide.load_state_dict(record["guide"])
        self._detach()
        choice, score = self._final_decision()
        self._units = choice.units
        # The weights of this network are in the checkpoint of the current phase.
        small = copy_network(self.stage.net)
        cut(small, self.stage.gates, choice.units)
        self._equivalence = Equivalence(**record["equivalence"])
        after = self.stage.after(choice, score, small, self._equivalence, self._carried())
        self.method.end(self, after)
        return False


def _hold_zeros(stage: Stage) -> list[Any]:
    """Hooks that keep the columns of removed units at zero."""
    gone = {name: theta for name, theta in stage.theta().items() if not bool(theta.all())}
    return [
        weight.register_hook(lambda gradient, factor=factor: gradient * factor)
        for _, weight, factor in factors(stage.net, stage.gates, gone)
        if weight.requires_grad
    ]


def _forget(model: GatedModel, guide: TruncatedLogNormalGuide) -> None:
    """Remove the parameters of a turn from Pyro's store, so that its network can be freed."""
    store = pyro.get_param_store()
    roots = (f"{model._pyro_name}.", f"{guide._pyro_name}.")
    for name in [name for name in store.keys() if name.startswith(roots)]:  # noqa: SIM118
        del store[name]
