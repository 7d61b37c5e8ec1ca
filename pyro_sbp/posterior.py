"""The posterior of a run, read from its checkpoint: neither the network nor the data is needed."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_sbp.checkpoints import read_checkpoint
from pyro_sbp.errors import RequestError
from pyro_sbp.recipes import METHODS
from pyro_sbp.runs import Run

__all__ = ["Posterior", "describe", "gate_table", "read_posterior"]

#: How many units are named on either side of the threshold.
NEAREST = 3
QUANTILES = (0, 25, 50, 75, 100)
#: The phases whose epochs have no noise.
WITHOUT_NOISE = ("dense", "finetuned")


@dataclass(frozen=True)
class Posterior:
    """The posterior of a run's noise; `mean`, `snr` and `kl` are those of the guide.

    Attributes:
        sites: from the name of a gate, of SparseVD a layer, to the distribution over its elements.
        priors: of every site.
        weights: the network's state at that time, from parameter name to tensor.
        epoch: how many epochs with noise have ended.
        epochs: how many were asked for.
        left_alone: the layers that have no noise, and why; None where the run does not tell.
    """

    sites: dict[str, Any]
    priors: dict[str, Any]
    weights: dict[str, Tensor]
    epoch: int
    epochs: int
    left_alone: dict[str, str] | None = None

    def _statistic(self, function: Callable[[Any], Tensor]) -> dict[str, Tensor]:
        return {name: function(q) for name, q in self.sites.items()}

    def mean(self) -> dict[str, Tensor]:
        """The mean of every element, by site."""
        return self._statistic(lambda q: q.mean)

    def snr(self) -> dict[str, Tensor]:
        """The signal-to-noise ratio of every element, by site."""
        return self._statistic(lambda q: q.snr)

    def kl(self) -> dict[str, Tensor]:
        """The KL divergence of every element from the prior in nats, by site."""
        return {
            name: torch.distributions.kl_divergence(q, self.priors[name])
            for name, q in self.sites.items()
        }


def read_posterior(directory: Path) -> Posterior:
    """The posterior that a run has left, or has come to.

    Raises:
        RequestError: there is no checkpoint, it is damaged, or the run has no posterior yet.
    """
    path = directory / "checkpoint.pt"
    if not path.is_file():
        raise RequestError(f"{directory} has no posterior yet: there is no checkpoint.pt")
    saved = read_checkpoint(path)
    request = saved["request"]
    read = pkgutil.resolve_name(METHODS[request.method]).read
    sites: dict[str, Any] = {}
    priors: dict[str, Any] = {}
    weights: dict[str, Tensor] = {}
    try:
        # A later phase goes on with what an earlier one left, or has sites of its own.
        for state in [*saved["finished"], saved["module"]]:
            found = read(state, request.recipe)
            if found.posteriors:
                sites.update(found.posteriors)
                priors.update(found.priors)
                weights = found.weights
        ended = sum(line["phase"] not in WITHOUT_NOISE for line in saved["lines"])
        left_alone = saved.get("left_alone")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RequestError(f"{path} is damaged: it is no checkpoint of a run") from error
    if not sites:
        raise RequestError(
            f"{directory} has no posterior yet: it was stopped before there was noise; "
            f"go on by pyro-sbp train --resume {directory}"
        )
    return Posterior(sites, priors, weights, ended, request.recipe.epochs, left_alone)


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
