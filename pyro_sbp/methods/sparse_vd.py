"""Sparse variational dropout (Molchanov et al. 2017, arXiv 1701.05369)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sbp.distributions import AdditiveNormal, ImproperLogUniform
from pyro_sbp.gates.units import Units
from pyro_sbp.methods.method import Method
from pyro_sbp.methods.phase import NoisePhase, Phase, Predict, Standing, noise_groups, rising_kl
from pyro_sbp.models.sparse_guide import AdditiveNormalGuide
from pyro_sbp.models.sparse_model import SparseModel
from pyro_sbp.pruning.budgets import Budget, Candidates, find_level
from pyro_sbp.pruning.choosing import check_settings
from pyro_sbp.pruning.sparsity import (
    KeptWeights,
    needed_units,
    remaining_units,
    shrink_sparse,
)
from pyro_sbp.recipes.method_recipes import SparseVDRecipe

__all__ = ["SparseVD"]


class SparseVD(Method[SparseVDRecipe]):
    """Dense training, training with noise on all weights, pruning, and fine-tuning. Pruning sets
    weights to zero, and removes units that no weight reads.
    """

    def begin(self) -> None:
        recipe = self.recipe
        self.model = SparseModel(
            self.net,
            self.example_input[:2],
            self.num_data,
            kl_scale=recipe.kl_scale,
            exact_kl=recipe.exact_kl,
            init_log_scale=recipe.init_log_scale,
        )
        self.not_prunable.update(self.model.not_prunable)
        self.guide = AdditiveNormalGuide(self.model)
        self._begun = False

    def noise(self) -> Iterator[Phase]:
        recipe = self.recipe
        self._begun = True
        phase = _SparsePhase(self, recipe.epochs)
        yield from rising_kl(phase, recipe.kl_free_epochs, recipe.kl_rising_epochs)

    def prune(
        self,
        *,
        criterion: str | None = None,
        threshold: float | None = None,
        budget: Budget | None = None,
        round_to: int = 1,
        min_units: int = 1,
    ) -> None:
        """Keep the weights whose signal-to-noise ratio is at least `threshold`, or at least the
        threshold that a budget selects. The other arguments are those of `choose_units`.
        """
        rule = self.recipe.rule(criterion)
        check_settings(rule.criterion.name, threshold, budget, round_to, min_units)
        snr = self.guide.snr()
        if budget is None:
            level = rule.threshold if threshold is None else threshold
        else:
            levels = torch.cat([value.flatten() for value in snr.values()]).unique()

            def units_at(level: float) -> dict[str, Units]:
                return remaining_units(self.net, self.gates, snr, level, round_to, min_units)

            def network_at(level: float) -> nn.Module:
                x = self.example_input
                return shrink_sparse(self.net, self.gates, snr, x, level, round_to, min_units).small

            candidates = Candidates(
                self.net, self.gates, self.example_input, levels, units_at, network_at, self.net
            )
            level = find_level(candidates, budget)
        self.cut(level, round_to, min_units)

    def cut(self, level: float, round_to: int = 1, min_units: int = 1) -> None:
        """Set weights under a signal-to-noise ratio to zero, and remove units that no weight
        reads."""
        snr, x = self.guide.snr(), self.example_input
        found = shrink_sparse(self.net, self.gates, snr, x, level, round_to, min_units)
        self.small, self.equivalence, self.units, self._kept = found
        self.held = tuple(name for name, units in self.units.items() if not units.kept.any())

    def posteriors(self) -> dict[str, tuple[Tensor, Tensor]]:
        if not self._begun:
            return {}
        # Not copied, because the locations are the weights: a checkpoint then stores them once.
        posteriors = self.guide.posteriors().items()
        return {name: (q.loc.detach(), q.scale.detach()) for name, q in posteriors}

    @staticmethod
    def distributions(
        loc: Tensor, scale: Tensor, recipe: Any
    ) -> tuple[AdditiveNormal, ImproperLogUniform]:
        return AdditiveNormal(loc, 2 * scale.log()), ImproperLogUniform(loc.shape, recipe.exact_kl)

    def kept_weights(self) -> KeptWeights:
        matrices = sum(p.numel() for p in self.net.parameters() if p.ndim > 1)
        return KeptWeights.of(self._kept, matrices)


class _SparsePhase(NoisePhase):
    """Training with noise on all weights."""

    guide: AdditiveNormalGuide

    def __init__(self, method: SparseVD, epochs: int) -> None:
        noisy = method.model.noisy
        super().__init__("sparse", epochs, noisy, method.model, method.guide, method.num_data)
        self.method, self.recipe = method, method.recipe

    def groups(self) -> list[dict[str, Any]]:
        noisy = self.method.model.noisy
        return noise_groups(self.method.net, noisy.log_variances, self.recipe)

    def _masks(self, threshold: float) -> dict[str, Tensor]:
        return {name: snr >= threshold for name, snr in self.guide.snr().items()}

    def _at_means(self, threshold: float) -> Predict:
        """The network with the weights at their means, and with weights under a threshold set to
        zero.
        """
        masks, means = self._masks(threshold), self.method.model.noisy.means()
        with torch.no_grad():
            masked = {name: mean * masks[name] for name, mean in means.items()}
        return partial(_call_with, self.method.model.noisy, masked)

    def predictor(self) -> Predict:
        return self._at_means(self.recipe.threshold)

    def standing(self) -> Standing:
        theta = needed_units(self.method.net, self.method.gates, self._masks(self.recipe.threshold))
        units = {name: int(kept.sum()) for name, kept in theta.items()}
        return Standing(units, tuple(name for name, left in units.items() if not left), self.kl())

    def finish(self) -> dict[str, Predict]:
        if not self.ends:
            return {}
        self.method.cut(self.recipe.threshold)
        self.method.mean = self._at_means(0.0)
        return {"mean": self.method.mean, "pruned": self.method.small}


@torch.no_grad()
def _call_with(noisy: nn.Module, means: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return noisy(x, means, None)
