"""From a posterior to the units to keep, and from these to a smaller network that is checked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sbp.benchmarking import count_macs
from pyro_sbp.gates import (
    Gate,
    GatedNetwork,
    call,
    convert,
    evaluating,
    repeatable,
    tensors_of,
)
from pyro_sbp.guides import TruncatedLogNormalGuide
from pyro_sbp.models import GatedModel
from pyro_sbp.surgery import (
    Units,
    cut,
    readable,
    relative_difference,
    shrink_in_place,
    surviving_units,
)

__all__ = [
    "Choice",
    "Equivalence",
    "EquivalenceError",
    "NothingLeft",
    "check_settings",
    "check_threshold",
    "checked_shrink",
    "choose_units",
    "least_level",
    "masked_mean",
    "prune",
]

#: The largest relative difference of the pruned from the masked network, in float64.
TOLERANCE = 1e-10


class EquivalenceError(RuntimeError):
    """A pruned network does not compute what the masked network computes."""


class NothingLeft(ValueError):
    """A threshold removes every unit of every gate."""


@dataclass(frozen=True)
class Equivalence:
    """How far a pruned network is from the masked one.

    Attributes:
        max_rel_diff_float64: in float64, relative to the largest output.
        max_abs_diff: in the network's own precision, absolute.
    """

    max_rel_diff_float64: float
    max_abs_diff: float


def check_threshold(threshold: float) -> None:
    """Raise ValueError unless this can be a threshold on signal-to-noise ratios."""
    if not 0 <= threshold < float("inf"):
        raise ValueError(f"threshold is {threshold}; expected a signal-to-noise ratio >= 0")


def check_settings(
    threshold: float | None, macs_ratio: float | None, round_to: int, min_units: int
) -> None:
    """Raise ValueError unless these can be settings of `choose_units`."""
    for name, value, least in (("round_to", round_to, 1), ("min_units", min_units, 0)):
        if value < least:
            raise ValueError(f"{name} is {value}; expected an integer >= {least}")
    if threshold is not None and macs_ratio is not None:
        raise ValueError("give a threshold or a macs_ratio, not both")
    if threshold is not None:
        check_threshold(threshold)


def masked_mean(guide: TruncatedLogNormalGuide, threshold: float = 1.0) -> dict[str, Tensor]:
    """E[theta] of units with SNR >= threshold and 0 of the others, by site.

    This is the paper's deterministic test-time network (arXiv 1705.07283, section 4).

    Raises:
        ValueError: the threshold is negative or not finite.
    """
    check_threshold(threshold)
    snr = guide.snr()
    return {name: mean * (snr[name] >= threshold) for name, mean in guide.mean().items()}


@dataclass(frozen=True)
class Choice:
    """What to keep of every gate.

    Attributes:
        theta: from gate name to ``[units]``, 0 where a unit is to go.
        units: what remains of them, by gate.
        threshold: the signal-to-noise ratio that decided.
        held: the gates of which no unit reaches it, and which keep the fewest allowed.
    """

    theta: dict[str, Tensor]
    units: dict[str, Units]
    threshold: float
    held: tuple[str, ...] = ()


def choose_units(
    net: nn.Module,
    gates: Sequence[Gate],
    mean: Mapping[str, Tensor],
    snr: Mapping[str, Tensor],
    example_input: Any,
    *,
    threshold: float | None = None,
    macs_ratio: float | None = None,
    round_to: int = 1,
    min_units: int = 1,
    dense: nn.Module | None = None,
) -> Choice:
    """Choose the units to keep, by a threshold on their signal-to-noise ratio or by a budget.

    Args:
        net: the network.
        gates: its gates.
        mean, snr: from gate name to a tensor ``[units]``.
        example_input: an input of the network, at whose size MACs are counted.
        threshold: units with SNR >= threshold are kept; 1 if neither this nor a budget is given.
        macs_ratio: instead of the threshold, keep as much as leaves the network with at least this
            many times fewer MACs.
        round_to: every gate keeps a multiple of this many units: of those under the threshold, the
            best stay. A gate of fewer keeps all.
        min_units: every gate keeps its best so many units, whatever the threshold. With 0 a gate
            may lose all, and a residual branch with it all that it adds but a constant; one column
            of zeros stays for the shape.
        dense: the network whose MACs a budget counts from, where `net` was cut before.

    Raises:
        ValueError: a setting is out of range, the threshold removes every unit of every gate, or
            the budget cannot be met; the message says what can.
    """
    check_settings(threshold, macs_ratio, round_to, min_units)
    threshold = 1.0 if threshold is None else threshold
    if not gates:
        raise ValueError("there is no gate to choose units of")
    snr = {gate.name: snr[gate.name].detach().cpu() for gate in gates}
    levels = torch.cat([snr[gate.name] for gate in gates]).unique()

    def chosen(level: float) -> Choice:
        mask = {gate.name: snr[gate.name] >= level for gate in gates}
        held = held_gates(snr, level) if min_units else ()
        _bring_back(gates, mask, snr, round_to, min_units)
        theta = {name: mean[name] * mask[name].to(mean[name]) for name in mask}
        units = surviving_units(gates, theta, min_units=min_units, round_to=round_to, score=snr)
        return Choice(theta, units, level, held)

    if macs_ratio is None:
        if threshold > float(levels[-1]):
            raise NothingLeft(
                f"threshold {threshold:g} removes every unit of every gate; "
                f"the largest signal-to-noise ratio is {float(levels[-1]):.4g}"
            )
        return chosen(threshold)
    units_at = lambda level: chosen(level).units  # noqa: E731
    return chosen(least_level(net, gates, example_input, levels, macs_ratio, units_at, dense))


def held_gates(snr: Mapping[str, Tensor], threshold: float) -> tuple[str, ...]:
    """The gates of which no unit reaches a signal-to-noise ratio; `snr` is by name, ``[units]``."""
    return tuple(name for name, values in snr.items() if not (values >= threshold).any())


def least_level(
    net: nn.Module,
    gates: Sequence[Gate],
    example_input: Any,
    levels: Tensor,
    macs_ratio: float,
    units_at: Callable[[float], Mapping[str, Units]],
    dense: nn.Module | None = None,
) -> float:
    """The lowest threshold at which a network has so many times fewer MACs.

    Args:
        net, gates, example_input: the network.
        levels: the thresholds that make a difference, rising.
        macs_ratio: how many times fewer.
        units_at: from a threshold to what remains of the units.
        dense: the network whose MACs count, where `net` was cut before.

    Raises:
        ValueError: the ratio is under 1 or not met by the highest threshold.
    """
    if not 1 <= macs_ratio < float("inf"):
        raise ValueError(f"macs_ratio is {macs_ratio}; expected a number >= 1")
    ratio = _macs_ratios(net, gates, example_input, dense)
    most = ratio(units_at(float(levels[-1])))
    if most < macs_ratio:
        raise ValueError(
            f"macs_ratio {macs_ratio:g} cannot be met: with the fewest units that are allowed the "
            f"network has {most:.2f} times fewer MACs"
        )
    low, high = 0, len(levels) - 1  # the answer is at most at high
    while low < high:
        middle = (low + high) // 2
        if ratio(units_at(float(levels[middle]))) >= macs_ratio:
            high = middle
        else:
            low = middle + 1
    return float(levels[high])


def _bring_back(
    gates: Sequence[Gate],
    mask: dict[str, Tensor],
    snr: Mapping[str, Tensor],
    round_to: int,
    min_units: int,
) -> None:
    """Let the best units under the threshold stay, where that many are asked for."""
    for gate in gates:
        kept = int(surviving_units(gates, mask)[gate.name].kept.sum())
        wanted = min(-(-max(kept, min_units) // round_to) * round_to, gate.size)
        possible = readable(gate, gates, mask) & ~mask[gate.name]
        if wanted > kept and bool(possible.any()):
            score = torch.where(possible, snr[gate.name].double(), -torch.inf)
            best = score.argsort(descending=True, stable=True)[: wanted - kept]
            mask[gate.name] = mask[gate.name].clone()
            mask[gate.name][best[possible[best]]] = True


def _macs_ratios(
    net: nn.Module, gates: Sequence[Gate], example_input: Any, whole: nn.Module | None
) -> Callable[[Mapping[str, Units]], float]:
    """From what remains of the units to how many times fewer MACs, counted without computing."""
    device = torch.device("meta")
    while True:
        shape = copy.deepcopy(net).to(device, torch.float32)
        x = convert(example_input, torch.float32, device)
        try:
            dense = count_macs(shape, x)
            if whole is not None:
                dense = count_macs(copy.deepcopy(whole).to(device, torch.float32), x)
            break
        except Exception:  # some networks need numbers to be called
            if device.type == "cpu":
                raise
            device = torch.device("cpu")

    def ratio(units: Mapping[str, Units]) -> float:
        small = copy.deepcopy(shape)
        cut(small, gates, units)
        return dense / count_macs(small, x)

    return ratio


def checked_shrink(
    net: nn.Module,
    gates: Sequence[Gate],
    theta: Mapping[str, Tensor],
    example_input: Any,
    units: Mapping[str, Units] | None = None,
    reference: Mapping[str, Tensor] | None = None,
) -> tuple[nn.Module, Equivalence]:
    """Shrink a network and compare the result with the masked network, without using `fold` there.

    The work is done in float64, and the weights that were checked are those handed over.

    Args:
        net, gates, theta, example_input, units: as for `shrink`.
        reference: the theta of the masked network, if it is another one: that of no gate where
            the units that theta removes are not read anyway.

    Returns:
        The smaller network, and how far it is from the masked one.

    Raises:
        EquivalenceError: it differs by more than 1e-10 of the largest output in float64.
    """
    reference = theta if reference is None else reference
    # One copy after the other, so that there are never many of them at a time.
    with torch.no_grad():
        net_eval = copy.deepcopy(net).eval()
        with repeatable(torch.get_default_dtype()):
            masked = _masked(net_eval, gates, reference, copy.deepcopy(example_input))
        exact = net_eval.double()
        theta64 = convert(dict(theta), torch.float64)
        with repeatable(torch.float64):
            reference64 = convert(dict(reference), torch.float64)
            masked64 = _masked(exact, gates, reference64, convert(example_input, torch.float64))
        shrink_in_place(exact, gates, theta64, units)
        with repeatable(torch.float64):
            relative = relative_difference(
                masked64, call(exact, convert(example_input, torch.float64))
            )
    state = exact.state_dict()
    del exact, net_eval
    small = copy.deepcopy(net)
    cut(small, gates, surviving_units(gates, theta) if units is None else units)
    small.load_state_dict(state)
    del state
    with torch.no_grad(), evaluating(small), repeatable(torch.get_default_dtype()):
        pruned = call(small, copy.deepcopy(example_input))
    pairs = zip(tensors_of(masked), tensors_of(pruned), strict=True)
    absolute = max(float((a.double() - b.double()).abs().nan_to_num().max()) for a, b in pairs)
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
    threshold: float | None = None,
    *,
    macs_ratio: float | None = None,
    round_to: int = 1,
    min_units: int = 1,
) -> nn.Module:
    """Make the smaller network that the posterior asks for: units under the threshold are gone.

    Args:
        model: the gated network.
        guide: its posterior.
        example_input: an input of the network, on which the result is compared with the masked
            network.
        threshold, macs_ratio, round_to, min_units: what to keep, as for `choose_units`.

    Returns:
        A plain network with E[theta] folded into its weights, in the training mode of the original.

    Raises:
        ValueError: what `choose_units` refuses.
        EquivalenceError: the result differs from the masked network by more than 1e-10, relative
            to the largest output, in float64.
    """
    net, gates = model.gated.net, model.gates
    choice = choose_units(
        net,
        gates,
        guide.mean(),
        guide.snr(),
        example_input,
        threshold=threshold,
        macs_ratio=macs_ratio,
        round_to=round_to,
        min_units=min_units,
    )
    return checked_shrink(net, gates, choice.theta, example_input, choice.units)[0]
