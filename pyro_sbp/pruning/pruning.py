"""Make a smaller network from a gated model and its posterior."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from pyro_sbp.gates.noise import check_no_noise
from pyro_sbp.gates.units import set_units
from pyro_sbp.models.gated_guide import TruncatedLogNormalGuide
from pyro_sbp.models.gated_model import GatedModel
from pyro_sbp.models.site_statistics import check_statistics
from pyro_sbp.pruning.budgets import Budget, ratio_budget
from pyro_sbp.pruning.choosing import Choice, choose_units, nothing_reaches
from pyro_sbp.pruning.criteria import guide_scores
from pyro_sbp.pruning.exactness import checked_shrink

__all__ = ["prune", "shrink_to"]


def prune(
    model: GatedModel,
    guide: TruncatedLogNormalGuide,
    example_input: Any,
    threshold: float | None = None,
    *,
    criterion: str = "snr",
    macs_ratio: float | None = None,
    parameters_ratio: float | None = None,
    budget: Budget | None = None,
    round_to: int = 1,
    min_units: int = 1,
) -> nn.Module:
    """Prune a network by its posterior: units under the threshold are removed.

    Every gate keeps at least its best `min_units` units. If no unit of any gate reaches the
    threshold, only these units remain, with a `UserWarning`.

    Args:
        model: the gated network.
        guide: its posterior.
        example_input: an input of the network, on which the result is compared with the masked
            network.
        threshold, criterion, round_to, min_units: what to keep, as for `choose_units`.
        macs_ratio, parameters_ratio: instead of a threshold, the smallest factor by which the MACs
            or the parameters are reduced. The largest such network is returned.
        budget: another condition on the network, such as `Speedup` or `MaxErrorIncrease`.

    Returns:
        A plain network with E[theta] folded into its weights, in the training mode of the original.
        Its attribute `units` describes the units of every gate of `model`:
        ``small.units["fc1_input"].kept`` is a bool tensor ``[units]``. This gate, of the input
        features of ``fc1``, exists if it was named in the argument `input_features` of
        `find_gates`.

    Raises:
        ValueError: `choose_units` raises it for these settings, the guide has no `mean` and `snr`,
            or the noise of a `Pruner` is attached to the network.
        EquivalenceError: the `relative_difference` of the result from the masked network is more
            than 1e-10 in float64.
    """
    check_statistics(guide)
    check_no_noise(model.gated.net, "pruned")
    ratio = ratio_budget(macs_ratio, parameters_ratio)
    if budget is not None and ratio is not None:
        raise ValueError(f"give a budget or a {ratio.name}, not both")
    net, gates = model.gated.net, model.gates
    score = guide_scores(guide, criterion)
    choice = choose_units(
        net,
        gates,
        guide.mean(),
        score,
        example_input,
        criterion=criterion,
        threshold=threshold,
        budget=ratio if budget is None else budget,
        round_to=round_to,
        min_units=min_units,
    )
    if len(choice.held) == len(gates):
        warnings.warn(nothing_reaches(choice.threshold, "unit", score, criterion), stacklevel=2)
    return shrink_to(model, choice, example_input)


def shrink_to(model: GatedModel, choice: Choice, example_input: Any) -> nn.Module:
    """The smaller network with chosen units, and with their description, as `prune` returns it.

    Args:
        model: the gated network.
        choice: the units.
        example_input: an input of the network, on which the result is compared with the masked
            network.

    Raises:
        EquivalenceError: as for `prune`.
    """
    net, gates = model.gated.net, model.gates
    small, _ = checked_shrink(net, gates, choice.theta, example_input, choice.units)
    set_units(small, choice.units)
    return small
