"""The posterior of a run, read from its checkpoint: neither the network nor the data is needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_sbp.checkpoints import read_checkpoint
from pyro_sbp.distributions import TruncatedLogNormal, TruncatedLogUniform
from pyro_sbp.errors import RequestError
from pyro_sbp.guides import LOC_MARGIN, LOG_SCALE_RANGE
from pyro_sbp.models import LOG_HIGH, LOG_LOW
from pyro_sbp.runs import Run

__all__ = ["Posterior", "describe", "gate_table", "read_posterior"]

#: How many units are named on either side of the threshold.
NEAREST = 3
QUANTILES = (0, 25, 50, 75, 100)
_LOC = re.compile(r"(?P<guide>(?:.*\.)?)locs\.(?P<gate>.+)_unconstrained")


@dataclass(frozen=True)
class Posterior:
    """The posterior of a run's noise; `mean`, `snr` and `kl` are those of the guide.

    Attributes:
        gates: from gate name to the distribution of theta over its units.
        weights: the network's state at that time, from parameter name to tensor.
        epoch: how many epochs the phase that leaves it has ended.
        epochs: how many it was asked for.
    """

    gates: dict[str, TruncatedLogNormal]
    weights: dict[str, Tensor]
    epoch: int
    epochs: int

    def _statistic(self, function: Callable[[TruncatedLogNormal], Tensor]) -> dict[str, Tensor]:
        return {name: function(q) for name, q in self.gates.items()}

    def mean(self) -> dict[str, Tensor]:
        """E[theta] of every unit, by gate."""
        return self._statistic(lambda q: q.mean)

    def snr(self) -> dict[str, Tensor]:
        """The signal-to-noise ratio of every unit, by gate."""
        return self._statistic(lambda q: q.snr)

    def kl(self) -> dict[str, Tensor]:
        """The KL divergence of every unit from the prior in nats, by gate."""
        prior = TruncatedLogUniform(LOG_LOW, LOG_HIGH)
        return self._statistic(
            lambda q: torch.distributions.kl_divergence(q, prior.expand(q.batch_shape))
        )


def read_posterior(directory: Path) -> Posterior:
    """The posterior that a run has left, or has come to.

    Raises:
        RequestError: there is no checkpoint, it is damaged, or the run has no posterior yet.
    """
    path = directory / "checkpoint.pt"
    if not path.is_file():
        raise RequestError(f"{directory} has no posterior yet: there is no checkpoint.pt")
    saved = read_checkpoint(path)
    try:
        epochs = saved["request"].recipe.epochs
        states = [*saved["finished"], saved["module"]]
        for index, state in enumerate(states):
            gates, weights = _split(state)
            if gates:
                whole = index < len(saved["finished"])
                epoch = epochs if whole else saved["place"]["epoch"]
                return Posterior(gates, weights, epoch, epochs)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RequestError(f"{path} is damaged: it is no checkpoint of a run") from error
    raise RequestError(
        f"{directory} has no posterior yet: it was stopped before there was noise; "
        f"go on by pyro-sbp train --resume {directory}"
    )


def _split(
    state: Mapping[str, Tensor],
) -> tuple[dict[str, TruncatedLogNormal], dict[str, Tensor]]:
    """What a phase trained: the posteriors of the guide, and the network's tensors."""
    gates, guide = {}, None
    for name, loc in state.items():
        if match := _LOC.fullmatch(name):
            guide = match["guide"]
            log_scale = state[f"{guide}log_scales.{match['gate']}_unconstrained"]
            # The box in which the guide keeps them, whatever the last step did.
            loc = loc.clamp(LOG_LOW - LOC_MARGIN, LOG_HIGH + LOC_MARGIN)
            scale = log_scale.clamp(*LOG_SCALE_RANGE).exp()
            gates[match["gate"]] = TruncatedLogNormal(loc, scale, LOG_LOW, LOG_HIGH)
    # Beside the guide, in the phase's list of modules, is the network.
    rest = {name: v for name, v in state.items() if guide is None or not name.startswith(guide)}
    return gates, {name.removeprefix("0."): value for name, value in rest.items()}


def describe(run: Run, posterior: Posterior) -> dict[str, Any]:
    """What a posterior says about every gate, as plain values for JSON.

    Args:
        run: the run; of a finished one, `kept` and `zeroed` are those of the network handed over.
        posterior: of that run.

    Returns:
        `finished`, `epoch`, `epochs`, `threshold`, `left_alone` (the layers that have no gate and
        why; None until the run has finished) and `gates`, a list of {`gate`, `total`, `kept`,
        `zeroed` (None until the run has finished), `snr` (quantiles by percent), `mean` (of
        E[theta] over the units), `kl` (sum over the units, in nats), `under` and `over` (the units
        nearest the threshold: {`unit`, `snr`}), `held` (no unit reaches the threshold)}.
    """
    threshold = run.request.recipe.threshold
    mean, snr, kl = posterior.mean(), posterior.snr(), posterior.kl()
    done = {} if run.summary is None else {unit["gate"]: unit for unit in run.summary["units"]}
    gates = []
    for name, values in snr.items():
        over = values >= threshold
        points = torch.tensor(QUANTILES, dtype=torch.float64) / 100
        gates.append(
            {
                "gate": name,
                "total": len(values),
                # The best stays where none reaches the threshold.
                "kept": done[name]["kept"] if name in done else max(int(over.sum()), 1),
                "zeroed": done[name]["zeroed"] if name in done else None,
                "snr": dict(
                    zip(map(str, QUANTILES), values.double().quantile(points).tolist(), strict=True)
                ),
                "mean": float(mean[name].double().mean()),
                "kl": float(kl[name].double().sum()),
                "under": _nearest(values, ~over, descending=True),
                "over": _nearest(values, over, descending=False),
                "held": not bool(over.any()),
            }
        )
    return {
        "finished": run.summary is not None,
        "epoch": posterior.epoch,
        "epochs": posterior.epochs,
        "threshold": threshold,
        "gates": gates,
        "left_alone": None if run.summary is None else run.summary["left_alone"],
    }


def gate_table(gates: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[tuple[Any, ...]]]:
    """The head and the rows of a table of the gates that `describe` gives."""
    head = ["gate", "kept", "of", "zeroed", *(f"SNR {percent} %" for percent in gates[0]["snr"])]
    rows = [
        (
            gate["gate"],
            gate["kept"],
            gate["total"],
            "-" if gate["zeroed"] is None else gate["zeroed"],
            *(f"{value:.3g}" for value in gate["snr"].values()),
            f"{gate['mean']:.3f}",
            f"{gate['kl']:.1f}",
        )
        for gate in gates
    ]
    return [*head, "E[theta]", "KL, nats"], rows


def _nearest(snr: Tensor, which: Tensor, descending: bool) -> list[dict[str, Any]]:
    units = torch.nonzero(which).flatten()
    order = snr[units].argsort(descending=descending, stable=True)[:NEAREST]
    return [{"unit": int(unit), "snr": float(snr[unit])} for unit in units[order]]
