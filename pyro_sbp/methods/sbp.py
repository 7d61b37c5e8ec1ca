"""Structured Bayesian Pruning (Neklyudov et al. 2017, arXiv 1705.07283)."""

from __future__ import annotations

from collections.abc import Iterator

from pyro_sbp.methods.gated import GatedMethod, Turn, TurnPhase
from pyro_sbp.methods.phase import Phase, rising_kl
from pyro_sbp.recipes.settings import SBPRecipe

__all__ = ["SBP"]


class SBP(GatedMethod[SBPRecipe]):
    """Dense training, training with noise on all gates at once, pruning, fine-tuning."""

    name = "sbp"
    reopens = True

    def turns(self) -> list[Turn]:
        names = tuple(gate.name for gate in self.gates)
        return [Turn("gated", names, self.recipe.epochs)]

    def parts_of(self, phase: TurnPhase) -> Iterator[Phase]:
        yield from rising_kl(phase, self.recipe.kl_free_epochs, self.recipe.kl_rising_epochs)
