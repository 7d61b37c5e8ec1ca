"""Ordinary training of a network, with the labels of the data or the soft labels of a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_sbp.gates.calling import call
from pyro_sbp.methods.phase import Phase, Predict, Standing, weights_group
from pyro_sbp.models.elbo import Parts
from pyro_sbp.recipes.recipe import Recipe

__all__ = ["PlainPhase", "distillation", "fine_tuning"]


class PlainPhase(Phase):
    """Ordinary training of a network.

    Args:
        name, epochs: as for `Phase`.
        net: the network.
        recipe: the settings.
        units: the number of units of every gate.
        learning_rate: the learning rate; by default that of the recipe.
        frozen: whether batch norms use their running statistics without updating them.
        hold_zeros: whether weights that are zero at the start remain zero: removed weights, and the
            columns of removed units.
        teacher: the network whose soft labels are learned, at the temperature `recipe.distill`
            (Hinton et al. 2015, arXiv 1503.02531). With None, the labels of the data are learned.
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
    """The phase that trains a pruned network and keeps its zero weights at zero.

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
    """Hooks that set the gradient of the zeros of weight tensors to zero.

    Vectors are excluded, because many of them start at zero, such as biases and the gains of
    residual branches.
    """
    trained = (p for p in net.parameters() if p.ndim > 1 and p.requires_grad)
    matrices = [(p, p.detach() != 0) for p in trained]
    return [
        p.register_hook(lambda grad, mask=mask: grad * mask)
        for p, mask in matrices
        if not bool(mask.all())
    ]


def distillation(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 times the KL divergence from the teacher's to the student's probabilities, in nats,
    averaged over the batch.

    Args:
        logits: the logits of the student, ``[batch, classes]``.
        teacher: the logits of the teacher, of the same shape.
        temperature: T, by which both are divided. With the factor T^2 the size of the gradients
            does not depend on T (Hinton et al. 2015, arXiv 1503.02531, section 2).
    """
    # If two networks nearly agree, their difference is below the resolution of bfloat16.
    wide = torch.promote_types(logits.dtype, torch.float32)
    student, soft = ((x.to(wide) / temperature).log_softmax(1) for x in (logits, teacher))
    return temperature**2 * F.kl_div(student, soft, log_target=True, reduction="batchmean")
