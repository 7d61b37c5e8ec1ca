"""Structured Bayesian Pruning (Neklyudov et al. 2017, arXiv 1705.07283)."""

from __future__ import annotations

from collections.abc import Iterator

from pyro_sbp.methods.gated import GatedMethod
from pyro_sbp.methods.phase import Phase, rising_kl
from pyro_sbp.methods.stage import Turn
from pyro_sbp.methods.turn_phase import TurnPhase
from pyro_sbp.recipes.method_recipes import SBPRecipe

__all__ = ["SBP"]


class SBP(GatedMethod[SBPRecipe]):
    """Dense training, training with noise on all gates at once, pruning, and fine-tuning."""

    reopens = True

    def turns(self) -> list[Turn]:
        recipe, names = self.recipe, tuple(gate.name for gate in self.gates)
        if not recipe.cut_every:
            return [Turn("gated", names, recipe.epochs)]
        lengths = [recipe.cut_every] * (self._full_epochs // recipe.cut_every)
        if rest := self._full_epochs % recipe.cut_every:
            lengths.append(rest)
        lengths[0] += recipe.epochs - self._full_epochs
        *before, last = [
            Turn(f"gated {index + 1}", names, epochs, continues=True)
            for index, epochs in enumerate(lengths)
        ]
        return [*before, last._replace(continues=False)]

    @property
    def _full_epochs(self) -> int:
        """The number of epochs in which the KL divergence has its full weight."""
        return self.recipe.epochs - self.recipe.kl_free_epochs - self.recipe.kl_rising_epochs

    def parts_of(self, phase: TurnPhase) -> Iterator[Phase]:
        recipe, cut_every = self.recipe, self.recipe.cut_every
        if not cut_every:
            yield from rising_kl(phase, recipe.kl_free_epochs, recipe.kl_rising_epochs)
            return
        index = self._turns.index(phase.turn)
        phase.schedule_span = index * cut_every, self._full_epochs
        if index:
            yield phase
        else:
            yield from rising_kl(phase, recipe.kl_free_epochs, recipe.kl_rising_epochs)
