"""Recursive Bayesian Pruning (Zhou et al. 2018, arXiv 1812.00353), by a derivation of our own.

The noise of a network is a Markov chain over its gates. Each is judged given those before it,
which are point masses by then: pruned, folded into the weights, and the network smaller.
`docs/rbp.md` has the derivation, and what of it the paper's abstracts state.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_sbp.distributions import TruncatedLogNormal
from pyro_sbp.gates.folding import Gate, factors
from pyro_sbp.gates.probing import Gates
from pyro_sbp.gates.surgery import Units, cut, remaining_gates, surviving_units
from pyro_sbp.methods.phase import (
    Method,
    Phase,
    Sites,
    check_gates,
    elbo_loss,
    gated_weights_group,
)
from pyro_sbp.methods.sbp import SBP
from pyro_sbp.models.gated_guide import LOG_SCALE_RANGE, TruncatedLogNormalGuide
from pyro_sbp.models.gated_model import LOG_HIGH, LOG_LOW, GatedModel, check_prior, theta_prior
from pyro_sbp.models.sites import scales_of
from pyro_sbp.pruning.choosing import Choice, choose_units, held_gates
from pyro_sbp.pruning.costs import UnitCosts, scales_by_cost
from pyro_sbp.pruning.exactness import Equivalence, checked_shrink
from pyro_sbp.recipes.settings import Recipe

__all__ = ["RBP", "in_order"]

#: What a `_Turn` holds besides the posterior, alone or beside the network.
_OF_TURN = re.compile(r"(?:1\.)?(?:exactness|there\.(?P<gate>.+))")


def in_order(gates: Gates) -> list[Gate]:
    """Gates in the order in which their noise comes into the network.

    A gate stands at the inputs of its readers, so its place is that of the reader that is called
    first, whatever wrote the units: a residual stream comes where its first block reads it. Of two
    gates at the same layer the one on whole channels comes before that on their single features.
    """
    place = {layer: index for index, layer in enumerate(gates.called)}

    def key(gate: Gate) -> tuple[int, bool]:
        return min(place[span.layer] for span in gate.readers), not gate.writers

    return sorted(gates, key=key)


@dataclass(frozen=True)
class _Stage:
    """The network as the cuts so far have left it.

    Attributes:
        net: the network.
        gates: its gates, of the units that remain.
        units: what became of the units of every gate of the dense network.
        snr: by gate, of the units that remain: the signal-to-noise ratio that they stayed with,
            infinite before their gate's turn, 0 where one remains as a column of zeros.
        held: the gates of which the best unit stayed though it was under the threshold.
        equivalence: the worst of all cuts.
    """

    net: nn.Module
    gates: list[Gate]
    units: dict[str, Units]
    snr: dict[str, Tensor]
    held: tuple[str, ...]
    equivalence: Equivalence

    @classmethod
    def dense(cls, net: nn.Module, gates: Sequence[Gate]) -> _Stage:
        """Before the first cut."""
        whole = {gate.name: torch.ones(gate.size, dtype=torch.bool) for gate in gates}
        snr = {gate.name: torch.full((gate.size,), torch.inf) for gate in gates}
        units = {name: Units(every, every) for name, every in whole.items()}
        return cls(net, list(gates), units, snr, (), Equivalence(0.0, 0.0))

    def theta(self) -> dict[str, Tensor]:
        """The point masses: 1, as the mean is folded in, and 0 where a column of zeros remains."""
        like = next(self.net.parameters())
        return {name: (snr > 0).to(like) for name, snr in self.snr.items()}

    def beyond_multiples(self, round_to: int) -> dict[str, Tensor]:
        """The weakest units of every gate that has lost some and is no multiple of a number."""
        return {
            gate.name: self.snr[gate.name].argsort()[: gate.size % round_to]
            for gate in self.gates
            if 1 < round_to <= gate.size < len(self.units[gate.name].kept)
        }

    def after(
        self, choice: Choice, snr: Mapping[str, Tensor], net: nn.Module, exactness: Equivalence
    ) -> _Stage:
        """The stage after a cut.

        Args:
            choice: what was kept.
            snr: by gate, of the units that were there.
            net: the network that remains.
            exactness: of this cut.
        """
        left = {
            name: torch.where(unit.kept, snr[name].detach().cpu(), 0.0)[unit.physical]
            for name, unit in choice.units.items()
        }
        return _Stage(
            net,
            remaining_gates(net, self.gates, choice.units),
            {name: self.units[name].then(unit) for name, unit in choice.units.items()},
            left,
            tuple(name for name in self.units if name in {*self.held, *choice.held}),
            Equivalence(
                max(self.equivalence.max_rel_diff_float64, exactness.max_rel_diff_float64),
                max(self.equivalence.max_abs_diff, exactness.max_abs_diff),
            ),
        )


class _Turn(nn.Module):
    """What stays in checkpoints of the turn of a gate: its posterior, which of the gate's first
    units it is over, and how exact the cut was."""

    exactness: Tensor

    def __init__(self, guide: TruncatedLogNormalGuide, there: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.guide = guide
        self.register_buffer("exactness", torch.zeros(2, dtype=torch.float64))
        self.there = nn.Module()
        for name, units in there.items():
            self.there.register_buffer(_flat(name), units.clone())


class RBP(Method):
    """Dense training; then for one gate after the other training with noise on it alone and
    pruning, each on the network that the one before left; fine-tuning."""

    name = "rbp"

    def begin(self) -> None:
        """Order the gates, and share the epochs out among them."""
        recipe, gates = self.recipe, self.gates
        check_gates(self.net, gates)
        check_prior(recipe.prior_scale, recipe.threshold)
        self.kl_scale = scales_of([gate.name for gate in gates], recipe.kl_scale)
        # Refuses here what a turn would refuse after epochs.
        scales_by_cost(self.kl_scale, self._costs(self.net, gates), recipe.macs_weight)
        self._turns = _turns(in_order(gates), recipe)
        self._stage = _Stage.dense(self.net, gates)

    def noise(self) -> Iterator[Phase]:
        """The turns of the gates."""
        for index, (names, epochs) in enumerate(self._turns):
            yield self._turn(names, epochs, last=index == len(self._turns) - 1)

    def _turn(self, names: tuple[str, ...], epochs: int, last: bool) -> Phase:
        """Training with noise on some gates of the network as it is now, and their pruning."""
        recipe, stage = self.recipe, self._stage
        gates = [gate for gate in stage.gates if gate.name in names]
        costs = self._costs(stage.net, stage.gates)
        kl_scale = scales_by_cost(self.kl_scale, costs, recipe.macs_weight)
        model = GatedModel(
            stage.net,
            gates,
            self.num_data,
            noise_per=recipe.noise_per,
            kl_scale={name: kl_scale[name] for name in names},
            prior_scale=recipe.prior_scale,
        )
        guide = TruncatedLogNormalGuide(
            model,
            init_loc=recipe.init_loc,
            init_log_scale=recipe.init_log_scale,
        ).to(next(stage.net.parameters()))
        turn = _Turn(guide, {name: stage.units[name].physical for name in names})
        hooks = _hold_zeros(stage)

        def units() -> dict[str, int]:
            theta = {**stage.theta(), **_masked(guide, recipe.threshold)}
            now = surviving_units(stage.gates, theta)
            return {name: int(old.then(now[name]).kept.sum()) for name, old in stage.units.items()}

        def expected_macs() -> float:
            # Of the network that is left, whose other gates are decided on or yet to come.
            return costs.expected_under(guide.snr())

        def finish() -> dict[str, Any]:
            for hook in hooks:
                hook.remove()
            _forget(model, guide)
            choice, snr = self._choose(stage, guide)
            small, exactness = checked_shrink(
                stage.net, stage.gates, choice.theta, self.example_input, choice.units
            )
            values = dataclasses.astuple(exactness)
            turn.exactness.copy_(torch.tensor(values, dtype=torch.float64))
            self._end(stage.after(choice, snr, small, exactness))
            if not last:
                return {}
            mean = guide.mean()
            self.mean = lambda x: model.gated(x, mean)
            return {"mean": self.mean, "pruned": small}

        def restore() -> None:
            choice, snr = self._choose(stage, guide)
            small = copy.deepcopy(stage.net)  # its weights come with the phase under way
            cut(small, stage.gates, choice.units)
            self._end(stage.after(choice, snr, small, Equivalence(*turn.exactness.tolist())))

        return Phase(
            "gated" if recipe.order == "together" else f"gate {names[0]}",
            epochs,
            nn.ModuleList([stage.net, turn]),
            groups=[
                gated_weights_group(stage.net, recipe),
                {"params": list(guide.parameters()), "lr": recipe.noise_learning_rate},
            ],
            loss=elbo_loss(model, guide, self.num_data),
            predict=lambda x: model.gated(x, _masked(guide, recipe.threshold)),
            finish=finish,
            units=units,
            held=lambda: held_gates(guide.snr(), recipe.threshold),
            kl=lambda: sum(float(kl.sum()) for kl in guide.kl().values()),
            macs=expected_macs,
            freeze_batch_norm=True,
            prunes=True,
            # Of the last turn the weights stay too: they are what `prune` goes on from.
            kept=None if last else turn,
            restore=None if last else restore,
        )

    def _costs(self, net: nn.Module, gates: Sequence[Gate]) -> UnitCosts:
        return UnitCosts(net, gates, self.example_input[:1])

    def _choose(
        self, stage: _Stage, guide: TruncatedLogNormalGuide
    ) -> tuple[Choice, dict[str, Tensor]]:
        """What a turn keeps of all gates, and the signal-to-noise ratios that it stays with."""
        recipe, own = self.recipe, guide.snr()
        mean = {**stage.theta(), **guide.mean()}
        snr = {**stage.snr, **own}
        # Where nothing carries signal the best unit of every gate stays.
        largest = max(float(value.max()) for value in snr.values())
        choice = choose_units(
            stage.net,
            stage.gates,
            mean,
            snr,
            self.example_input,
            threshold=min(recipe.threshold, largest),
        )
        held = held_gates(own, recipe.threshold)
        # What stays although it is under the threshold stays: `prune` shall not ask again.
        stayed = {name: value.clamp_min(recipe.threshold) for name, value in own.items()}
        return dataclasses.replace(choice, held=held), {**snr, **stayed}

    def _end(self, stage: _Stage) -> None:
        """Take over what a turn has left."""
        self._stage = stage
        self._hand_over(stage)

    def _hand_over(self, stage: _Stage) -> None:
        self.small, self.units, self.held = stage.net, stage.units, stage.held
        self.equivalence = stage.equivalence

    def prune(self, **settings: Any) -> None:
        """Make a smaller network of what the last turn left, by `choose_units` with these settings.

        What a turn has removed is gone: a threshold under the recipe's leaves the network as it is,
        and `round_to` rounds down a gate that has lost units.
        """
        stage = self._stage
        theta, snr = stage.theta(), {name: value.clone() for name, value in stage.snr.items()}
        for name, over in stage.beyond_multiples(settings.get("round_to", 1)).items():
            theta[name][over] = snr[name][over] = 0
        choice = choose_units(
            stage.net,
            stage.gates,
            theta,
            snr,
            self.example_input,
            dense=self.net,
            **settings,
        )
        small, exactness = checked_shrink(
            stage.net, stage.gates, choice.theta, self.example_input, choice.units
        )
        self._hand_over(stage.after(choice, stage.snr, small, exactness))

    @staticmethod
    def read(state: Mapping[str, Tensor], recipe: Recipe) -> Sites:
        """The posterior of the gates of a turn, without the network, over all of their units.

        Of a unit that was gone before the turn it is the prior.
        """
        own = {name: match for name in state if (match := _OF_TURN.fullmatch(name))}
        there = {match["gate"]: state[name] for name, match in own.items()}
        found = SBP.read({name: v for name, v in state.items() if name not in own}, recipe)
        for name, q in found.posteriors.items():
            units = there[_flat(name)]
            prior = theta_prior(recipe.prior_scale, len(units), q.loc)
            loc, scale = (x.new_zeros(len(units)) for x in (q.loc, q.scale))
            if isinstance(prior, TruncatedLogNormal):
                loc, scale = prior.loc.to(loc).clone(), prior.scale.to(scale).clone()
            else:  # as near as this family comes to the log-uniform
                loc, scale = loc + (LOG_LOW + LOG_HIGH) / 2, scale + math.exp(LOG_SCALE_RANGE[1])
            loc[units], scale[units] = q.loc, q.scale
            found.posteriors[name] = TruncatedLogNormal(loc, scale, LOG_LOW, LOG_HIGH)
            found.priors[name] = prior
        return found


def _flat(gate: str) -> str:
    """The name of a gate as that of a buffer, which has no dots."""
    return gate.replace(".", "/")


def _turns(gates: Sequence[Gate], recipe: Recipe) -> list[tuple[tuple[str, ...], int]]:
    """The gates that have noise at a time, and for how many epochs."""
    names = [gate.name for gate in gates]
    if recipe.order == "together":
        return [(tuple(names), recipe.epochs)]
    if recipe.epochs < len(names):
        raise ValueError(
            f"epochs is {recipe.epochs}, but there are {len(names)} gates: rbp needs an epoch for "
            "each of them"
        )
    each, more = divmod(recipe.epochs, len(names))
    if recipe.order == "reversed":
        names.reverse()
    return [((name,), each + (index < more)) for index, name in enumerate(names)]


def _masked(guide: TruncatedLogNormalGuide, threshold: float) -> dict[str, Tensor]:
    """E[theta] of the units that a cut would keep, 0 of the others, by gate."""
    mean = guide.mean()
    return {
        name: mean[name] * (snr >= snr.max().clamp(max=threshold))
        for name, snr in guide.snr().items()
    }


def _hold_zeros(stage: _Stage) -> list[Any]:
    """Let columns that stand for removed units stay zero, until the hooks are taken away."""
    gone = {name: theta for name, theta in stage.theta().items() if not bool(theta.all())}
    return [
        weight.register_hook(lambda gradient, factor=factor: gradient * factor)
        for _, weight, factor in factors(stage.net, stage.gates, gone)
    ]


def _forget(model: GatedModel, guide: TruncatedLogNormalGuide) -> None:
    """Take a turn's parameters out of Pyro's store, which would keep every network alive."""
    store = pyro.get_param_store()
    roots = (f"{model._pyro_name}.", f"{guide._pyro_name}.")
    for name in [name for name in store.keys() if name.startswith(roots)]:  # noqa: SIM118
        del store[name]
