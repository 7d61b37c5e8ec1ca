"""Structured Bayesian Pruning (Neklyudov et al. 2017, arXiv 1705.07283)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from pyro_sbp.elbo import ClosedFormELBO, Parts
from pyro_sbp.guides import TruncatedLogNormalGuide
from pyro_sbp.methods.phase import Method, Phase, plain_phase, weights_group
from pyro_sbp.models import GatedModel, check_prior
from pyro_sbp.probing import find_gates
from pyro_sbp.pruning import checked_shrink, choose_units, masked_mean
from pyro_sbp.recipes import Recipe
from pyro_sbp.surgery import surviving_units

__all__ = ["SBP"]


class SBP(Method):
    """Dense training, training with noise on all gates at once, pruning, fine-tuning."""

    def __init__(
        self,
        net: nn.Module,
        example_input: Any,
        recipe: Recipe,
        num_data: int,
        input_features: tuple[str, ...] = (),
    ) -> None:
        self.net = net
        self.recipe = recipe
        self.example_input = example_input
        # Two examples find what eight do, in less memory.
        gates = find_gates(net, example_input[:2], input_features)
        if not gates:
            raise ValueError(f"no part of {type(net).__name__} can be gated: {gates.left_alone}")
        self.left_alone = gates.left_alone
        check_prior(recipe.prior_scale, recipe.threshold)
        self.model = GatedModel(
            net,
            gates,
            num_data,
            noise_per=recipe.noise_per,
            kl_scale=recipe.kl_scale,
            prior_scale=recipe.prior_scale,
        )
        self.guide = TruncatedLogNormalGuide(
            self.model, init_loc=recipe.init_loc, init_log_scale=recipe.init_log_scale
        ).to(next(net.parameters()))

    def phases(self) -> Iterator[Phase]:
        """The dense phase, the gated one, and the fine-tuning of the pruned network."""
        recipe = self.recipe
        if recipe.dense_epochs:
            sizes = {gate.name: gate.size for gate in self.model.gates}
            yield plain_phase("dense", recipe.dense_epochs, self.net, recipe, lambda: sizes)
        elbo = ClosedFormELBO()

        def loss(x: Tensor, y: Tensor) -> Parts:
            nll, kl = elbo.parts(self.model, self.guide, x, y)
            return Parts(nll / self.model.num_data, kl / self.model.num_data)

        yield Phase(
            "gated",
            recipe.epochs,
            nn.ModuleList([self.net, self.guide]),
            groups=[
                weights_group(self.net, recipe.learning_rate, recipe.weight_decay),
                {"params": list(self.guide.parameters()), "lr": recipe.noise_learning_rate},
            ],
            loss=loss,
            predict=self._masked(recipe.threshold),
            finish=self._finish,
            units=self._units_left,
            held=self._held,
            kl=lambda: sum(float(kl.sum()) for kl in self.guide.kl().values()),
            freeze_batch_norm=True,
            prunes=True,
        )
        if recipe.finetune_epochs:
            left = {name: int(units.kept.sum()) for name, units in self.units.items()}
            yield plain_phase(
                "finetuned",
                recipe.finetune_epochs,
                self.small,
                recipe,
                lambda: left,
                recipe.finetune_learning_rate,
                frozen=not recipe.recalibrate,
            )

    def _masked(self, threshold: float) -> Any:
        return lambda x: self.model.gated(x, masked_mean(self.guide, threshold))

    def _units_left(self) -> dict[str, int]:
        units = surviving_units(self.model.gates, masked_mean(self.guide, self.recipe.threshold))
        return {name: int(unit.kept.sum()) for name, unit in units.items()}

    def _held(self) -> tuple[str, ...]:
        snr = self.guide.snr()
        return tuple(n for n, value in snr.items() if not (value >= self.recipe.threshold).any())

    def prune(self, **settings: Any) -> None:
        """Make the smaller network, by `choose_units` with these settings."""
        gates = self.model.gates
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
        return {"mean": self._masked(0.0), "pruned": self.small}
