"""From a posterior to the units to keep, and from these to a smaller network that is checked."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sbp.gates import Gate, GatedNetwork, call, convert, tensors_of
from pyro_sbp.guides import TruncatedLogNormalGuide
from pyro_sbp.models import GatedModel
from pyro_sbp.surgery import relative_difference, shrink

__all__ = ["Equivalence", "EquivalenceError", "checked_shrink", "masked_mean", "prune"]

#: The largest relative difference of the pruned from the masked network, in float64.
TOLERANCE = 1e-10


class EquivalenceError(RuntimeError):
    """A pruned network does not compute what the masked network computes."""


@dataclass(frozen=True)
class Equivalence:
    """How far a pruned network is from the masked one.

    Attributes:
        max_rel_diff_float64: in float64, relative to the largest output.
        max_abs_diff: in the network's own precision, absolute.
    """

    max_rel_diff_float64: float
    max_abs_diff: float


def masked_mean(guide: TruncatedLogNormalGuide, threshold: float = 1.0) -> dict[str, Tensor]:
    """E[theta] of units with SNR >= threshold and 0 of the others, by site.

    This is the paper's deterministic test-time network (arXiv 1705.07283, section 4).

    Raises:
        ValueError: the threshold is negative or not finite.
    """
    if not 0 <= threshold < float("inf"):
        raise ValueError(f"threshold is {threshold}; expected a signal-to-noise ratio >= 0")
    snr = guide.snr()
    return {name: mean * (snr[name] >= threshold) for name, mean in guide.mean().items()}


def checked_shrink(
    net: nn.Module, gates: Sequence[Gate], theta: Mapping[str, Tensor], example_input: Any
) -> tuple[nn.Module, Equivalence]:
    """Shrink a network and compare the result with the masked network, without using `fold` there.

    The work is done in float64, and the weights that were checked are those handed over.

    Args:
        net, gates, theta, example_input: as for `shrink`.

    Returns:
        The smaller network, and how far it is from the masked one.

    Raises:
        EquivalenceError: it differs by more than 1e-10 of the largest output in float64.
    """
    x = convert(example_input, torch.float64)
    exact_net = copy.deepcopy(net).double().eval()
    exact = shrink(exact_net, gates, convert(theta, torch.float64), x)
    small = shrink(net, gates, theta, example_input)
    small.load_state_dict(exact.state_dict())
    with torch.no_grad():
        masked = _masked(exact_net, gates, convert(theta, torch.float64), x)
        relative = relative_difference(masked, call(exact.eval(), x))
        masked = _masked(copy.deepcopy(net).eval(), gates, theta, example_input)
        pruned = call(copy.deepcopy(small).eval(), example_input)
    pairs = zip(tensors_of(masked), tensors_of(pruned), strict=True)
    absolute = max(float((a - b).abs().max()) for a, b in pairs)
    if not relative <= TOLERANCE:
        raise EquivalenceError(
            f"the pruned network differs from the masked one by {relative:.1e} of the largest "
            f"output in float64; at most {TOLERANCE:.0e} is allowed"
        )
    return small, Equivalence(relative, absolute)


def _masked(net: nn.Module, gates: Sequence[Gate], theta: Mapping[str, Tensor], x: Any) -> Any:
    """The network with its activations multiplied: a row for all examples, so nothing folds."""
    return GatedNetwork(net, gates)(x, {name: value[None] for name, value in theta.items()})


def prune(
    model: GatedModel,
    guide: TruncatedLogNormalGuide,
    example_input: Any,
    threshold: float = 1.0,
) -> nn.Module:
    """Make the smaller network that the posterior asks for: units under the threshold are gone.

    Args:
        model: the gated network.
        guide: its posterior.
        example_input: an input of the network, on which the result is compared with the masked
            network.
        threshold: units with SNR >= threshold are kept.

    Returns:
        A plain network with E[theta] folded into its weights, in the training mode of the original.

    Raises:
        ValueError: the threshold is negative or not finite.
        EquivalenceError: the result differs from the masked network by more than 1e-10, relative
            to the largest output, in float64.
    """
    theta = masked_mean(guide, threshold)
    return checked_shrink(model.gated.net, model.gates, theta, example_input)[0]
