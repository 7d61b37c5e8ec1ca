"""The loss of a phase as a module, and the weight of its KL divergence."""

from __future__ import annotations

from torch import Tensor, nn

from pyro_sbp.methods import Phase
from pyro_sbp.models.elbo import Parts
from pyro_sbp.training.checkpoints import Place

__all__ = ["PhaseLoss", "kl_weight"]


class PhaseLoss(nn.Module):
    """The loss of a phase as a module, which Fabric can wrap."""

    def __init__(self, phase: Phase) -> None:
        super().__init__()
        self.module, self.loss = phase.module, phase.loss

    def forward(self, x: Tensor, y: Tensor, share: float, kl_weight: float) -> tuple[Tensor, Parts]:
        """The loss of this process, whose average over all processes is the loss of the batch, and
        its parts.

        Args:
            share: the number of examples of this process, divided by the average over processes.
            kl_weight: the weight of the KL divergence.
        """
        # Computed here, because Fabric converts outputs of the module to float32.
        parts = self.loss(x, y)
        if kl_weight != 1:
            parts = Parts(parts.nll, parts.kl * kl_weight)
        return parts.nll * share + parts.kl, parts


def kl_weight(phase: Phase, place: Place, steps: int) -> float:
    """The weight of the KL divergence at the current step of a phase. It changes linearly between
    the two values of `Phase.kl_weight`."""
    first, last = phase.kl_weight
    return first + (last - first) * (place.epoch + place.step / steps) / phase.epochs
