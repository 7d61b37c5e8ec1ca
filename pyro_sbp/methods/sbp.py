"""Structured Bayesian Pruning (Neklyudov et al. 2017, arXiv 1705.07283)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from pyro_sbp.distributions import TruncatedLogNormal
from pyro_sbp.gates.surgery import surviving_units
from pyro_sbp.methods.phase import (
    Method,
    Phase,
    Sites,
    check_gates,
    elbo_loss,
    gated_weights_group,
    noise_phases,
)
from pyro_sbp.models.gated_guide import LOC_MARGIN, LOG_SCALE_RANGE, TruncatedLogNormalGuide
from pyro_sbp.models.gated_model import (
    LOG_HIGH,
    LOG_LOW,
    GatedModel,
    check_prior,
    theta_prior,
    widest,
)
from pyro_sbp.models.sites import scales_of
from pyro_sbp.pruning.choosing import choose_units, held_gates, masked_mean
from pyro_sbp.pruning.costs import UnitCosts, scales_by_cost
from pyro_sbp.pruning.exactness import checked_shrink
from pyro_sbp.recipes.settings import Recipe

__all__ = ["SBP"]

_LOC = re.compile(r"(?P<guide>(?:.*\.)?)locs\.(?P<gate>.+)_unconstrained")


class SBP(Method):
    """Dense training, training with noise on all gates at once, pruning, fine-tuning."""

    name = "sbp"

    def begin(self) -> None:
        """Put noise on all gates."""
        net, recipe, gates = self.net, self.recipe, self.gates
        check_gates(net, gates)
        check_prior(recipe.prior_scale, recipe.threshold)
        kl_scale = scales_of([gate.name for gate in gates], recipe.kl_scale)
        self.costs = UnitCosts(net, gates, self.example_input[:1])
        self.model = GatedModel(
            net,
            gates,
            self.num_data,
            noise_per=recipe.noise_per,
            kl_scale=scales_by_cost(kl_scale, self.costs, recipe.macs_weight),
            prior_scale=recipe.prior_scale,
        )
        self.guide = TruncatedLogNormalGuide(
            self.model,
            init_loc=recipe.init_loc,
            init_log_scale=recipe.init_log_scale,
        ).to(next(net.parameters()))

    def noise(self) -> Iterator[Phase]:
        """The gated phase, at the end of which the network is pruned."""
        recipe = self.recipe
        gated = Phase(
            "gated",
            recipe.epochs,
            nn.ModuleList([self.net, self.guide]),
            groups=[
                gated_weights_group(self.net, recipe),
                {"params": list(self.guide.parameters()), "lr": recipe.noise_learning_rate},
            ],
            loss=elbo_loss(self.model, self.guide, self.num_data),
            predict=self._masked(recipe.threshold),
            finish=self._finish,
            units=self._units_left,
            held=self._held,
            kl=lambda: sum(float(kl.sum()) for kl in self.guide.kl().values()),
            macs=self._expected_macs,
            freeze_batch_norm=True,
            prunes=True,
        )
        yield from noise_phases(recipe, gated)

    def _masked(self, threshold: float) -> Any:
        return lambda x: self.model.gated(x, masked_mean(self.guide, threshold))

    def _units_left(self) -> dict[str, int]:
        units = surviving_units(self.gates, masked_mean(self.guide, self.recipe.threshold))
        return {name: int(unit.kept.sum()) for name, unit in units.items()}

    def _expected_macs(self) -> float:
        return self.costs.expected_under(self.guide.snr())

    def _held(self) -> tuple[str, ...]:
        return held_gates(self.guide.snr(), self.recipe.threshold)

    def prune(self, **settings: Any) -> None:
        """Make the smaller network, by `choose_units` with these settings."""
        gates = self.gates
        choice = choose_units(
            self.net,
            gates,
            self.guide.mean(),
            self.guide.snr(),
            self.example_input,
            **settings,
        )
        self.units, self.held = choice.units, choice.held
        self.small, self.equivalence = checked_shrink(
            self.net, gates, choice.theta, self.example_input, choice.units
        )

    def _finish(self) -> dict[str, Any]:
        # Where nothing carries signal the best unit of every gate stays.
        largest = max(float(snr.max()) for snr in self.guide.snr().values())
        self.prune(threshold=min(self.recipe.threshold, largest))
        # At the recipe's threshold, which the best unit of all may be under too.
        self.held = self._held()
        mean = self.guide.mean()
        self.mean = lambda x: self.model.gated(x, mean)
        return {"mean": self.mean, "pruned": self.small}

    @staticmethod
    def read(state: Mapping[str, Tensor], recipe: Recipe) -> Sites:
        """The posterior of every gate, without the network."""
        posteriors, guide = {}, None
        for name, loc in state.items():
            if match := _LOC.fullmatch(name):
                guide = match["guide"]
                log_scale = state[f"{guide}log_scales.{match['gate']}_unconstrained"]
                # The box in which the guide keeps them, whatever the last step did.
                loc = loc.clamp(LOG_LOW - LOC_MARGIN, LOG_HIGH + LOC_MARGIN)
                scale = log_scale.clamp(LOG_SCALE_RANGE[0], widest(recipe.prior_scale)).exp()
                posteriors[match["gate"]] = TruncatedLogNormal(loc, scale, LOG_LOW, LOG_HIGH)
        priors = {
            name: theta_prior(recipe.prior_scale, len(q.loc), q.loc)
            for name, q in posteriors.items()
        }
        # Beside the guide, in the phase's list of modules, is the network.
        rest = {n: v for n, v in state.items() if guide is None or not n.startswith(guide)}
        return Sites(posteriors, priors, {n.removeprefix("0."): v for n, v in rest.items()})
