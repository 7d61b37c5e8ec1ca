"""Noise on units: the mechanism of SBP and RBP.

Training with noise proceeds in turns. In a turn some gates have noise; at its end their units are
chosen, the network is cut, and the next turn goes on with what is left. SBP is one turn over all
gates, RBP one turn for each gate.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, TypeVar

import pyro
import torch
from torch import Tensor, nn

from pyro_sbp.distributions import TruncatedLogNormal, TruncatedLogUniform
from pyro_sbp.gates.folding import Gate, factors
from pyro_sbp.gates.surgery import Units, cut, remaining_gates
from pyro_sbp.methods.method import Method
from pyro_sbp.methods.phase import NoisePhase, Phase, Predict, Standing, copied, noise_groups
from pyro_sbp.models.gated_guide import LOG_SCALE_RANGE, TruncatedLogNormalGuide
from pyro_sbp.models.gated_model import LOG_HIGH, LOG_LOW, GatedModel, check_prior, theta_prior
from pyro_sbp.models.sites import scales_of
from pyro_sbp.pruning.choosing import Choice, check_settings, choose_units, held_gates
from pyro_sbp.pruning.costs import UnitCosts, scales_by_cost
from pyro_sbp.pruning.exactness import Equivalence, checked_shrink
from pyro_sbp.recipes.settings import GatedRecipe

__all__ = ["GatedMethod", "Stage", "Turn", "TurnPhase", "over_all_units"]

#: Between two turns of the same noise, units are removed whose signal-to-noise ratio is
#: under this share of the threshold. Under the log-uniform prior itself the ratio is 0.33.
CUT_SHARE = 0.5


class Turn(NamedTuple):
    """A stretch of training with noise on some gates.

    Attributes:
        name: the name of its phase.
        gates: the names of the gates that have noise.
        epochs: how many epochs it takes.
        continues: the next turn continues training the same noise, and only units far under the
            threshold are removed between the two.
    """

    name: str
    gates: tuple[str, ...]
    epochs: int
    continues: bool = False


class Carried(NamedTuple):
    """The noise that the next turn continues training, for the units that are left.

    Attributes:
        posteriors: location and log scale of log theta, ``[units]`` each, by gate.
        kl_scale: the weights of the KL divergences, by gate.
    """

    posteriors: Mapping[str, tuple[Tensor, Tensor]]
    kl_scale: Mapping[str, float]


class Decision(NamedTuple):
    """What a turn keeps of all gates.

    Attributes:
        choice: the units to keep.
        snr: by gate, the signal-to-noise ratios that the units of the network stay with.
    """

    choice: Choice
    snr: dict[str, Tensor]


@dataclass(frozen=True)
class Stage:
    """The network as the cuts so far have left it.

    Attributes:
        net: the network.
        gates: its gates, with the units that remain.
        units: what became of the units of every gate of the dense network.
        snr: by gate, the signal-to-noise ratio that the remaining units stayed with: infinite
            before the turn of their gate, 0 for a unit that remains as a column of zeros.
        held: the gates in which no unit reached the threshold, so that only the best was kept.
        equivalence: the largest differences of all cuts.
        carried: the noise that the next turn continues training, if it does.
    """

    net: nn.Module
    gates: Sequence[Gate]
    units: dict[str, Units]
    snr: dict[str, Tensor]
    held: tuple[str, ...]
    equivalence: Equivalence
    carried: Carried | None = None

    @classmethod
    def dense(cls, net: nn.Module, gates: Sequence[Gate]) -> Stage:
        """The stage before the first cut."""
        whole = {gate.name: torch.ones(gate.size, dtype=torch.bool, device="cpu") for gate in gates}
        snr = {gate.name: torch.full((gate.size,), torch.inf, device="cpu") for gate in gates}
        units = {name: Units(every, every) for name, every in whole.items()}
        return cls(net, gates, units, snr, (), Equivalence(0.0, 0.0))

    def theta(self) -> dict[str, Tensor]:
        """The theta of the gates without noise: 1, as the mean is folded into the weights, and 0
        where a column of zeros remains."""
        like = next(self.net.parameters())
        return {name: (snr > 0).to(like) for name, snr in self.snr.items()}

    def beyond_multiples(self, round_to: int, snr: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weakest units of every gate that has lost units, beyond a multiple of `round_to`."""
        return {
            gate.name: snr[gate.name].argsort()[: gate.size % round_to]
            for gate in self.gates
            if 1 < round_to <= gate.size < len(self.units[gate.name].kept)
        }

    def after(
        self,
        choice: Choice,
        snr: Mapping[str, Tensor],
        net: nn.Module,
        equivalence: Equivalence,
        carried: Carried | None = None,
    ) -> Stage:
        """The stage after a cut.

        Args:
            choice: the units that were kept.
            snr: by gate, the signal-to-noise ratios of the units before the cut.
            net: the network that remains.
            equivalence: how exact the cut was.
            carried: the noise before the cut, if the next turn continues training it.
        """
        left = {
            name: torch.where(unit.kept, snr[name].detach().cpu(), 0.0)[unit.physical]
            for name, unit in choice.units.items()
        }
        return Stage(
            net,
            remaining_gates(net, self.gates, choice.units),
            {name: self.units[name].then(unit) for name, unit in choice.units.items()},
            left,
            tuple(name for name in self.units if name in {*self.held, *choice.held}),
            Equivalence(
                max(self.equivalence.max_rel_diff_float64, equivalence.max_rel_diff_float64),
                max(self.equivalence.max_abs_diff, equivalence.max_abs_diff),
            ),
            None if carried is None else _left_of(carried, choice.units),
        )


def _left_of(carried: Carried, units: Mapping[str, Units]) -> Carried:
    """The noise of the units that remain in the network."""
    posteriors = {}
    for name, values in carried.posteriors.items():
        there = units[name].physical.nonzero().flatten().to(values[0].device)
        loc, log_scale = (value[there] for value in values)
        posteriors[name] = loc, log_scale
    return Carried(posteriors, carried.kl_scale)


G = TypeVar("G", bound=GatedRecipe)


class GatedMethod(Method[G]):
    """Dense training; turns of noise on gates, each of which ends with a cut; fine-tuning."""

    #: Whether `prune` may keep units that the last turn has removed.
    reopens: ClassVar[bool]

    @abstractmethod
    def turns(self) -> list[Turn]:
        """The turns in order.

        Raises:
            ValueError: the recipe has too few epochs for them.
        """

    def begin(self) -> None:
        recipe, gates = self.recipe, self.gates
        if not gates:
            layers = "; ".join(f"{name or 'it'} {why}" for name, why in gates.left_alone.items())
            raise ValueError(
                f"no layer of {type(self.net).__name__} is prunable: {layers or 'it has none'}"
            )
        check_prior(recipe.prior_scale, recipe.threshold)
        self.kl_scale = scales_of([gate.name for gate in gates], recipe.kl_scale)
        # Refuse here what a later turn would refuse after hours of training.
        scales_by_cost(self.kl_scale, self.costs(self.net, gates), recipe.macs_weight)
        self._turns = self.turns()
        self._stage = Stage.dense(self.net, gates)
        self._ended: dict[str, tuple[Tensor, Tensor]] = {}
        self._current: TurnPhase | None = None
        self._open: TurnPhase | None = None

    def noise(self) -> Iterator[Phase]:
        for index, turn in enumerate(self._turns):
            self._current = TurnPhase(self, self._stage, turn, index == len(self._turns) - 1)
            yield from self.parts_of(self._current)

    def parts_of(self, phase: TurnPhase) -> Iterator[Phase]:
        """The phases that a turn consists of."""
        yield phase

    def costs(self, net: nn.Module, gates: Sequence[Gate]) -> UnitCosts:
        """The MACs of the units of a network."""
        return UnitCosts(net, gates, self.example_input[:1])

    def end(self, phase: TurnPhase, stage: Stage) -> None:
        """Take over what a turn has left."""
        self._ended.update(phase.posteriors())
        self._current, self._stage = None, stage
        # Other methods do not need the network before the cut any more.
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
        threshold: float | None = None,
        macs_ratio: float | None = None,
        round_to: int = 1,
        min_units: int = 1,
    ) -> None:
        """Make a smaller network by the posterior of the last turn.

        Units that earlier turns removed cannot be kept; nor can those of the last turn, unless
        the method `reopens` it. `round_to` rounds a gate down that has lost units.
        """
        check_settings(threshold, macs_ratio, round_to, min_units)
        if self._open is not None:
            stage, guide = self._open.stage, self._open.guide
            theta, snr = {**stage.theta(), **guide.mean()}, {**stage.snr, **self._open.snr()}
        else:
            stage = self._stage
            theta, snr = stage.theta(), {name: value.clone() for name, value in stage.snr.items()}
        for name, beyond in stage.beyond_multiples(round_to, snr).items():
            theta[name][beyond] = snr[name][beyond] = 0
        choice = choose_units(
            stage.net,
            stage.gates,
            theta,
            snr,
            self.example_input,
            threshold=threshold,
            macs_ratio=macs_ratio,
            round_to=round_to,
            min_units=min_units,
            dense=self.net,
        )
        small, equivalence = checked_shrink(
            stage.net, stage.gates, choice.theta, self.example_input, choice.units
        )
        self._return(stage.after(choice, snr, small, equivalence))

    @staticmethod
    def distributions(
        loc: Tensor, scale: Tensor, recipe: Any
    ) -> tuple[TruncatedLogNormal, TruncatedLogUniform | TruncatedLogNormal]:
        posterior = TruncatedLogNormal(loc, scale, LOG_LOW, LOG_HIGH)
        return posterior, theta_prior(recipe.prior_scale, len(loc), loc)


class TurnPhase(NoisePhase):
    """Training with noise on some gates of the network that is left, and their pruning.

    Args:
        method: the method.
        stage: the network at the beginning of the turn.
        turn: the turn.
        last: whether it is the last turn.
    """

    guide: TruncatedLogNormalGuide

    def __init__(self, method: GatedMethod[Any], stage: Stage, turn: Turn, last: bool) -> None:
        recipe: GatedRecipe = method.recipe
        self.method, self.recipe, self.stage, self.turn, self.last = (
            method, recipe, stage, turn, last,
        )  # fmt: skip
        self.costs = method.costs(stage.net, stage.gates)
        if stage.carried is None:
            kl_scale = scales_by_cost(method.kl_scale, self.costs, recipe.macs_weight)
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

    def groups(self) -> list[dict[str, Any]]:
        return noise_groups(self.stage.net, self.guide, self.recipe)

    def decide(self) -> Decision:
        """The units that the turn keeps if it ends now."""
        recipe, stage = self.recipe, self.stage
        mean, own = self.guide.mean(), self.snr()
        snr = {**stage.snr, **own}
        choice = choose_units(
            stage.net,
            stage.gates,
            {**stage.theta(), **mean},
            snr,
            self.method.example_input,
            threshold=recipe.threshold,
        )
        held = held_gates(own, recipe.threshold)
        # Units that are kept though they are under the threshold stay kept when `prune` is called.
        stayed = {name: value.clamp_min(recipe.threshold) for name, value in own.items()}
        return Decision(dataclasses.replace(choice, held=held), {**snr, **stayed})

    def snr(self) -> dict[str, Tensor]:
        """The signal-to-noise ratios of the turn's gates, 0 where a column of zeros remains."""
        return {
            name: snr.where(self.stage.snr[name].to(snr.device) > 0, 0.0)
            for name, snr in self.guide.snr().items()
        }

    def _decide_cut(self) -> Decision:
        """What stays in the network while its noise is trained further."""
        stage, own = self.stage, self.snr()
        choice = choose_units(
            stage.net,
            stage.gates,
            stage.theta(),
            {**stage.snr, **own},
            self.method.example_input,
            threshold=CUT_SHARE * self.recipe.threshold,
        )
        return Decision(dataclasses.replace(choice, held=()), {**stage.snr, **own})

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
        # The expected MACs are those of the network that is left, whose other gates have had
        # their turn or are still to have it.
        expected = self.costs.expected_under(self.snr())
        return Standing(units, choice.held, self.kl(), expected)

    def posteriors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Location and scale of log theta for all units that the turn's gates had at first.

        Units that were removed before the turn have the prior.
        """
        scale, units = self.recipe.prior_scale, self.stage.units
        return {
            name: over_all_units(q.loc.detach(), q.scale.detach(), units[name].physical, scale)
            for name, q in self.guide.posteriors().items()
        }

    def finish(self) -> dict[str, Predict]:
        if not self.ends:
            return {}
        stage = self.stage
        choice, snr = self._closed()
        small, equivalence = checked_shrink(
            stage.net, stage.gates, choice.theta, self.method.example_input, choice.units
        )
        self._equivalence, self._units = equivalence, choice.units
        self.method.end(self, stage.after(choice, snr, small, equivalence, self._carried()))
        if not self.last:
            return {}
        self.method.mean = partial(self._gated, theta=self.guide.mean())
        return {"mean": self.method.mean, "pruned": small}

    def _closed(self) -> Decision:
        """The decision, after removing the hooks of the turn and its parameters in Pyro."""
        for hook in self._hooks:
            hook.remove()
        _forget(self.model, self.guide)
        return self._decide_cut() if self.turn.continues else self.decide()

    def _carried(self) -> Carried | None:
        if not self.turn.continues:
            return None
        posteriors = {
            name: (q.loc.detach().clone(), q.scale.detach().log())
            for name, q in self.guide.posteriors().items()
        }
        return Carried(posteriors, self.kl_scale)

    def record(self) -> dict[str, Any]:
        # The weights of the last turn are what `prune` goes on from; those of an earlier turn are
        # in the next one.
        if self.last or not self.ends:
            return super().record()
        guide, equivalence = self.guide.state_dict(), dataclasses.asdict(self._equivalence)
        units = {name: (unit.kept, unit.physical) for name, unit in self._units.items()}
        return {"guide": copied(guide), "equivalence": equivalence, "units": units}

    def restore(self, record: Mapping[str, Any]) -> bool:
        if self.last or not self.ends:
            return super().restore(record)
        self.guide.load_state_dict(record["guide"])
        choice, snr = self._closed()
        if "units" in record:  # another machine may decide otherwise on a unit at the threshold
            units = {name: Units(*masks) for name, masks in record["units"].items()}
            choice = dataclasses.replace(choice, units=units)
        self._units = choice.units
        small = copy.deepcopy(self.stage.net)  # its weights come with the phase under way
        cut(small, self.stage.gates, choice.units)
        self._equivalence = Equivalence(**record["equivalence"])
        after = self.stage.after(choice, snr, small, self._equivalence, self._carried())
        self.method.end(self, after)
        return False


def over_all_units(
    loc: Tensor, scale: Tensor, there: Tensor, prior_scale: float | None
) -> tuple[Tensor, Tensor]:
    """Location and scale of log theta over all units that a gate had at first.

    Args:
        loc, scale: of the units that are left, ``[left]``.
        there: which these are, bool ``[units]``.
        prior_scale: as for `GatedModel`. The other units have this prior, or for the log-uniform
            prior the distribution of the posterior's family that is nearest to it.
    """
    there = there.to(loc.device)
    prior = theta_prior(prior_scale, len(there), loc)
    if isinstance(prior, TruncatedLogNormal):
        locs, scales = prior.loc.to(loc).clone(), prior.scale.to(scale).clone()
    else:
        locs = loc.new_full(there.shape, (LOG_LOW + LOG_HIGH) / 2)
        scales = scale.new_full(there.shape, math.exp(LOG_SCALE_RANGE[1]))
    locs[there], scales[there] = loc, scale
    return locs, scales


def _hold_zeros(stage: Stage) -> list[Any]:
    """Hooks by which columns that stand for removed units stay zero."""
    gone = {name: theta for name, theta in stage.theta().items() if not bool(theta.all())}
    return [
        weight.register_hook(lambda gradient, factor=factor: gradient * factor)
        for _, weight, factor in factors(stage.net, stage.gates, gone)
        if weight.requires_grad
    ]


def _forget(model: GatedModel, guide: TruncatedLogNormalGuide) -> None:
    """Remove a turn's parameters from Pyro's store, which would keep every network alive."""
    store = pyro.get_param_store()
    roots = (f"{model._pyro_name}.", f"{guide._pyro_name}.")
    for name in [name for name in store.keys() if name.startswith(roots)]:  # noqa: SIM118
        del store[name]
