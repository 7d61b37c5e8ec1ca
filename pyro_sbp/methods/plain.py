"""Ordinary training of a network, by the labels of the data or by a teacher's soft labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_sbp.gates.folding import call
from pyro_sbp.methods.phase import Phase, Predict, Standing, weights_group
from pyro_sbp.models.elbo import Parts
from pyro_sbp.recipes.settings import Recipe

__all__ = ["PlainPhase", "distillation", "fine_tuning"]


class PlainPhase(Phase):
    """Ordinary training of a network.

    Args:
        name, epochs: as for `Phase`.
        net: the network.
        recipe: the settings.
        units: the units of every gate.
        learning_rate: the learning rate; by default the recipe's.
        frozen: leave the statistics of batch norms as they are.
        hold_zeros: weights that are zero at the start stay zero: single weights, and columns that
            stand for a removed unit.
        teacher: the network whose soft labels are learned at the temperature `recipe.distill`
            (Hinton et al. 2015, arXiv 1503.02531). None learns the labels of the data.
    """

    def __init__(
        self,
        name: str,
        epochs: int,
        net: nn.Module,
        recipe: Recipe,
        units: Mapping[str, int],
        *,
        learning_rate: float | None = None,
        frozen: bool = False,
        hold_zeros: bool = False,
        teacher: Predict | None = None,
    ) -> None:
        super().__init__(name, epochs, net)
        self.recipe, self.units, self.teacher = recipe, dict(units), teacher
        self.learning_rate = recipe.learning_rate if learning_rate is None else learning_rate
        self.freeze_batch_norm = frozen
        self._hooks = _hold_zeros(net) if hold_zeros else []

    def groups(self) -> list[dict[str, Any]]:
        return [weights_group(self.module, self.recipe, self.learning_rate)]

    def loss(self, x: Any, y: Tensor) -> Parts:
        logits = call(self.module, x)
        if self.teacher is None:
            nll = F.cross_entropy(logits, y, label_smoothing=self.recipe.label_smoothing)
        else:
            with torch.no_grad():
                soft = call(self.teacher, x)
            nll = distillation(logits, soft, self.recipe.distill)
        return Parts(nll, nll.new_zeros(()))

    def predictor(self) -> Predict:
        return self.module

    def standing(self) -> Standing:
        return Standing(self.units)

    def finish(self) -> dict[str, Predict]:
        for hook in self._hooks:
            hook.remove()
        return {self.name: self.module}


def fine_tuning(
    small: nn.Module, recipe: Recipe, units: Mapping[str, int], teacher: Predict | None
) -> PlainPhase:
    """The phase that trains a pruned network, in which what is zero stays zero.

    Args:
        small: the network.
        recipe, units: as for `PlainPhase`.
        teacher: the network whose soft labels are learned; None learns the labels of the data.
    """
    return PlainPhase(
        "finetuned",
        recipe.finetune_epochs,
        small,
        recipe,
        units,
        learning_rate=recipe.finetune_learning_rate,
        frozen=not recipe.recalibrate,
        hold_zeros=True,
        teacher=teacher,
    )


def _hold_zeros(net: nn.Module) -> list[Any]:
    """Hooks by which the zeros of matrices get no gradient.

    Vectors are left out: many start as zeros, such as biases and the gains of residual branches.
    """
    matrices = [(p, p.detach() != 0) for p in net.parameters() if p.ndim > 1]
    return [
        p.register_hook(lambda grad, mask=mask: grad * mask)
        for p, mask in matrices
        if not bool(mask.all())
    ]


def distillation(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 times the KL divergence from the teacher's to the student's probabilities, per example.

    Args:
        logits: of the student, ``[batch, classes]``.
        teacher: the teacher's logits, of the same shape.
        temperature: T, by which both are divided. The factor T^2 keeps the size of the gradients
            (Hinton et al. 2015, arXiv 1503.02531, section 2).
    """
    # Two networks that nearly agree differ by less than bfloat16 resolves.
    wide = torch.promote_types(logits.dtype, torch.float32)
    student, soft = ((x.to(wide) / temperature).log_softmax(1) for x in (logits, teacher))
    return temperature**2 * F.kl_div(student, soft, log_target=True, reduction="batchmean")
