"""Sparse variational dropout (Molchanov et al. 2017, arXiv 1701.05369)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_sbp.distributions import AdditiveNormal, ImproperLogUniform
from pyro_sbp.gates.surgery import Units
from pyro_sbp.methods.phase import (
    Method,
    Phase,
    Sites,
    elbo_loss,
    gated_weights_group,
    noise_phases,
)
from pyro_sbp.models.sparse_guide import AdditiveNormalGuide
from pyro_sbp.models.sparse_model import SparseModel
from pyro_sbp.models.weight_noise import unflat, within_range
from pyro_sbp.pruning.choosing import NothingLeft, check_settings, least_level
from pyro_sbp.pruning.sparsity import needed_units, remaining_units, shrink_sparse
from pyro_sbp.recipes.settings import THRESHOLDS, Recipe

__all__ = ["SparseVD"]

_LOG_VARIANCES = "log_variances."


class SparseVD(Method):
    """Dense training, training with noise on all weights, weights to zero, units that nobody reads
    removed, fine-tuning."""

    name = "sparse-vd"

    def begin(self) -> None:
        """Put noise on all weights."""
        recipe = self.recipe
        self.model = SparseModel(
            self.net,
            self.example_input[:2],
            self.num_data,
            kl_scale=recipe.kl_scale,
            exact_kl=recipe.exact_kl,
            init_log_scale=recipe.init_log_scale,
        )
        self.left_alone.update(self.model.left_alone)
        self.guide = AdditiveNormalGuide(self.model)
        self._masked_means: tuple[Any, dict[str, Tensor]] = ((), {})

    def noise(self) -> Iterator[Phase]:
        """The phases of a rising KL, at the end of which weights become zero and units go."""
        recipe, net = self.recipe, self.net
        noisy = self.model.noisy
        yield from noise_phases(
            recipe,
            Phase(
                "sparse",
                recipe.epochs,
                noisy,
                groups=[
                    gated_weights_group(net, recipe),
                    {
                        "params": list(noisy.log_variances.parameters()),
                        "lr": recipe.noise_learning_rate,
                    },
                ],
                loss=elbo_loss(self.model, self.guide, self.num_data),
                predict=self._masked,
                finish=self._finish,
                units=self._units_left,
                held=self._held,
                kl=lambda: sum(float(kl.sum()) for kl in self.guide.kl().values()),
                freeze_batch_norm=True,
                prunes=True,
            ),
        )

    def _kept_weights(self, threshold: float) -> dict[str, Tensor]:
        return {name: snr >= threshold for name, snr in self.guide.snr().items()}

    @torch.no_grad()
    def _masked(self, x: Tensor, threshold: float | None = None) -> Any:
        """The network at the means, without the weights under the threshold."""
        threshold = self.recipe.threshold if threshold is None else threshold
        noisy = self.model.noisy
        # The same for all batches of a test.
        state = (threshold, *(parameter._version for parameter in noisy.parameters()))
        if self._masked_means[0] != state:
            masks = self._kept_weights(threshold)
            state = (threshold, *(parameter._version for parameter in noisy.parameters()))
            means = {name: mean * masks[name] for name, mean in noisy.means().items()}
            self._masked_means = (state, means)
        return noisy(x, self._masked_means[1], None)

    def _units_left(self) -> dict[str, int]:
        theta = needed_units(self.net, self.gates, self._kept_weights(self.recipe.threshold))
        return {name: int(kept.sum()) for name, kept in theta.items()}

    def _held(self) -> tuple[str, ...]:
        return tuple(name for name, left in self._units_left().items() if not left)

    def prune(
        self,
        threshold: float | None = None,
        macs_ratio: float | None = None,
        round_to: int = 1,
        min_units: int = 1,
    ) -> None:
        """Make the smaller network of the weights of a signal-to-noise ratio of `threshold` or
        more, or of the lowest threshold that gives `macs_ratio` times fewer MACs; the rest as for
        `choose_units`."""
        check_settings(threshold, macs_ratio, round_to, min_units)
        snr = self.guide.snr()
        levels = torch.cat([value.flatten() for value in snr.values()]).unique()
        if macs_ratio is None:
            level = THRESHOLDS["sparse-vd"] if threshold is None else threshold
            if level > float(levels[-1]):
                raise NothingLeft(
                    f"threshold {level:g} removes every weight; the largest signal-to-noise ratio "
                    f"is {float(levels[-1]):.4g}"
                )
        else:

            def units_at(level: float) -> dict[str, Units]:
                return remaining_units(self.net, self.gates, snr, level, round_to, min_units)

            level = least_level(
                self.net, self.gates, self.example_input, levels, macs_ratio, units_at
            )
        self._cut(level, round_to, min_units)

    def _cut(self, level: float, round_to: int = 1, min_units: int = 1) -> None:
        snr, x = self.guide.snr(), self.example_input
        found = shrink_sparse(self.net, self.gates, snr, x, level, round_to, min_units)
        self.small, self.equivalence, self.units, self.kept = found
        self.held = tuple(name for name, units in self.units.items() if not units.kept.any())

    def _finish(self) -> dict[str, Any]:
        self._cut(self.recipe.threshold)
        self.mean = lambda x: self._masked(x, 0.0)
        return {"mean": self.mean, "pruned": self.small}

    def summary(self) -> dict[str, Any]:
        """The weights of every layer that reach the threshold, and all over those that do: the
        compression as the paper counts it."""
        kept, total = (sum(counts) for counts in zip(*self.kept.values(), strict=True))
        # Of layers without noise all are kept.
        matrices = sum(p.numel() for p in self.net.parameters() if p.ndim > 1)
        kept, total = kept + matrices - total, matrices
        return {
            "weights": {
                "layers": [
                    {"layer": name, "kept": some, "total": whole}
                    for name, (some, whole) in self.kept.items()
                ],
                "kept": kept,
                "total": total,
                "compression": total / kept if kept else None,
            }
        }

    @staticmethod
    def read(state: Mapping[str, Tensor], recipe: Recipe) -> Sites:
        """The posterior of every layer's weight, without the network."""
        posteriors, priors = {}, {}
        weights = {n.removeprefix("net."): v for n, v in state.items() if n.startswith("net.")}
        for name, log_variance in state.items():
            if name.startswith(_LOG_VARIANCES):
                layer = unflat(name.removeprefix(_LOG_VARIANCES))
                mean = weights[f"{layer}.weight"]
                # The range in which the model keeps it, whatever the last step did.
                posteriors[layer] = AdditiveNormal(mean, within_range(log_variance.clone(), mean))
                priors[layer] = ImproperLogUniform(mean.shape, recipe.exact_kl)
        return Sites(posteriors, priors, weights if posteriors else dict(state))
