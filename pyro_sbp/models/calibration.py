"""The error and the calibration of a network on labelled images.

The expected calibration error is that of Guo et al. 2017, "On Calibration of Modern Neural
Networks" (arXiv 1706.04599), equation 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BINS", "Measured", "measured", "sums"]

#: Bins of equal width of the expected calibration error.
BINS = 15
#: The value that replaces an infinite logit.
LARGEST = 1e30


@dataclass(frozen=True)
class Measured:
    """The error and the calibration of a network on labelled images.

    Attributes:
        error: the percentage of wrong predictions.
        nll: the negative log-likelihood in nats per example.
        ece: the expected calibration error in percent.
    """

    error: float
    nll: float
    ece: float


def sums(logits: Tensor, labels: Tensor) -> Tensor:
    """The sums over a batch from which `measured` computes its values.

    The sums of several batches add up to those of all their examples.

    Args:
        logits: ``[batch, classes]``.
        labels: the index of the class of each example, ``[batch]``.

    Returns:
        float64 ``[2 + BINS]``: the number of wrong predictions, the negative log-likelihood in
        nats, and for each bin of the largest probability the number of correct predictions minus
        the sum of these probabilities.
    """
    wrong = logits.argmax(1) != labels
    # An infinite logit would make the sums NaN.
    log_probabilities = logits.double().nan_to_num(0.0, LARGEST, -LARGEST).log_softmax(1)
    nll = -log_probabilities.gather(1, labels[:, None]).sum()
    confidence = log_probabilities.amax(1).exp()
    # The bins are open at their lower ends: ((b - 1) / BINS, b / BINS].
    bins = ((confidence * BINS).ceil() - 1).clamp(0, BINS - 1)
    # A matrix product, because scatter-add on CUDA is not deterministic.
    in_bin = bins[:, None] == torch.arange(BINS, device=logits.device)
    gaps = ((~wrong).double() - confidence) @ in_bin.double()
    return torch.cat([wrong.sum().double()[None], nll[None], gaps])


def measured(total: Tensor, count: int) -> Measured:
    """The error and the calibration from the sums of all batches.

    Args:
        total: the sum of the tensors that `sums` returned for the batches, ``[2 + BINS]``.
        count: the number of examples.
    """
    wrong, nll, *gaps = (total / count).tolist()
    ece = sum(abs(gap) for gap in gaps)
    return Measured(round(100 * wrong, 6), round(nll, 6), round(100 * ece, 6))
