"""Dense networks of other runs as teachers: their soft labels for fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from pyro_sbp.architectures import find_architecture
from pyro_sbp.errors import RequestError
from pyro_sbp.gates.calling import call
from pyro_sbp.recipes.request import Request
from pyro_sbp.training.runs import read_request

__all__ = ["Teachers", "check_teacher"]


class Teachers(nn.Module):
    """The average prediction of several networks, as a deep ensemble (Lakshminarayanan et al. 2017,
    arXiv 1612.01474, section 2.4).

    Called on images, it returns the logarithm of the average of the networks' probabilities,
    ``[batch, classes]``. These are logits, which a temperature may divide (Hinton et al. 2015,
    arXiv 1503.02531).

    Args:
        networks: the networks, which return logits ``[batch, classes]``. They are put into
            evaluation mode, and are not trained.
        names: their architectures.
    """

    def __init__(self, networks: Sequence[nn.Module], names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.networks = nn.ModuleList(networks)
        self.requires_grad_(False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """The logarithm of the average probabilities, ``[batch, classes]``."""
        logits = torch.stack([call(net, x) for net in self.networks])
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return wide.log_softmax(-1).logsumexp(0) - math.log(len(self.networks))


def check_teacher(run: str | Path, request: Request) -> Request:
    """The request of the run of a teacher, if its dense network can teach the run of `request`.

    Raises:
        RequestError: the directory is not a run, the run has no dense network, or it has other
            images or labels.
    """
    run = Path(run)
    other = read_request(run)
    if not (run / "dense.pt").is_file():
        raise RequestError(
            f"--teacher: {run} has no dense.pt, the weights of a dense network; expected a run "
            "that has trained one, with dense_epochs > 0"
        )
    for what, value, wanted in (
        ("the data set", other.dataset, request.dataset),
        ("images of the size", _size(other), _size(request)),
        ("standardize", other.recipe.standardize, request.recipe.standardize),
        ("standardize_by", other.standardize_by, request.standardize_by),
        ("random_labels", other.recipe.random_labels, request.recipe.random_labels),
    ):
        if value != wanted:
            raise RequestError(f"--teacher: {run} has {what} {value}, and this run has {wanted}")
    if request.recipe.holdout not in (0, other.recipe.holdout):
        raise RequestError(
            f"--teacher: {run} reserves {other.recipe.holdout} images for validation, and this run "
            f"{request.recipe.holdout}, so the teacher may have learned the labels of validation "
            "images; give the same holdout"
        )
    return other


def _size(request: Request) -> int | None:
    """The height and width of the images of a run; None if they are those of the data."""
    return request.image_size or find_architecture(request.arch).image_size
