"""The posterior of a run, read from its checkpoint: neither the network nor the data is needed."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_sbp.errors import RequestError
from pyro_sbp.recipes.settings import METHODS
from pyro_sbp.training.checkpoints import Checkpoint
from pyro_sbp.training.runs import Run

__all__ = ["Posterior", "describe", "gate_table", "nearest_table", "read_posterior"]

#: How many units are named on either side of the threshold.
NEAREST = 3
#: Percent and title of the quantiles of the signal-to-noise ratio.
QUANTILES = {0: "min", 25: "25 %", 50: "median", 75: "75 %", 100: "max"}
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
        left_alone: the layers that are not prunable, and why; None for runs that do not record it.
        waiting: the gates that RBP has not trained yet.
    """

    sites: dict[str, Any]
    priors: dict[str, Any]
    weights: dict[str, Tensor]
    epoch: int
    epochs: int
    left_alone: dict[str, str] | None = None
    waiting: Sequence[str] = ()

    @property
    def elements(self) -> str:
        """What a site has a distribution over: units, or weights."""
        return "weights" if any(len(q.batch_shape) > 1 for q in self.sites.values()) else "units"

    def _statistic(self, function: Callable[[Any], Tensor]) -> dict[str, Tensor]:
        return {name: function(q) for name, q in self.sites.items()}

    def mean(self) -> dict[str, Tensor]:
        """The mean of every element, by site."""
        return self._statistic(lambda q: q.mean)

    def snr(self) -> dict[str, Tensor]:
        """The signal-to-noise ratio of every element, by site."""
        return self._statistic(lambda q: q.snr)

    def kl(self) -> dict[str, Tensor]:
        """KL(posterior || prior) of every element in nats, by site."""
        return {
            name: torch.distributions.kl_divergence(q, self.priors[name])
            for name, q in self.sites.items()
        }


def read_posterior(directory: Path) -> Posterior:
    """The posterior of the last checkpoint of a run.

    Raises:
        RequestError: there is no checkpoint, it is damaged, or the run has no posterior yet.
    """
    path = directory / "checkpoint.pt"
    if not path.is_file():
        raise RequestError(f"{directory} has no posterior yet: there is no checkpoint.pt")
    saved = Checkpoint.read(path)
    recipe = saved.request.recipe
    distributions = pkgutil.resolve_name(METHODS[recipe.method]).distributions
    weights = saved.network()
    gates = saved.gates
    if gates is None:  # of an earlier version
        gates = saved.lines[-1]["units"] if saved.lines else {}
    of_gates = all(loc.ndim == 1 for loc, _ in saved.posteriors.values())
    # In the order of the network, which that of the turns need not be.
    order = gates if of_gates else _layers(weights)
    names = [name for name in order if name in saved.posteriors]
    names += [name for name in saved.posteriors if name not in names]
    if not names:
        raise RequestError(
            f"{directory} has no posterior yet: it was stopped before there was noise; "
            f"resume with `pyro-sbp train --resume {directory}`"
        )
    found = {name: distributions(*saved.posteriors[name], recipe) for name in names}
    return Posterior(
        {name: posterior for name, (posterior, _) in found.items()},
        {name: prior for name, (_, prior) in found.items()},
        weights,
        sum(line["phase"] not in WITHOUT_NOISE for line in saved.lines),
        recipe.epochs,
        saved.left_alone,
        [name for name in gates if name not in found] if of_gates else [],
    )


def _layers(weights: Mapping[str, Tensor]) -> list[str]:
    """The layers of a network, in its order, which that of a guide's parameters is not."""
    return [name.removesuffix(".weight") for name in weights]


def describe(run: Run, posterior: Posterior) -> dict[str, Any]:
    """What a posterior says about every gate, as plain values for JSON.

    Args:
        run: the run; of a finished one, `kept` and `zeroed` are those of the final network.
        posterior: of that run.

    Returns:
        `finished`, `epoch`, `epochs`, `threshold`, `elements` ("units", or "weights" of SparseVD),
        `left_alone` (the layers that are not prunable, and why; None for old runs that do not
        record it), `waiting` (the gates that RBP has not trained yet) and `gates`, a list of
        {`gate` (the layer, for weights), `total`, `kept`, `zeroed` (None for weights and until the
        run has finished), `snr` (quantiles by percent), `mean` (over the elements, of E[theta] or
        of the absolute means of the weights), `kl` (sum over the elements, in nats), `under` and
        `over` (the elements nearest the threshold: {`unit`, `snr`}; for a weight, `unit` is the
        list of its indices), `held` (no element reaches the threshold)}.
    """
    threshold = run.request.recipe.threshold
    mean, snr, kl = posterior.mean(), posterior.snr(), posterior.kl()
    of_units = posterior.elements == "units"
    done = {}
    if run.summary is not None and of_units:
        done = {unit.gate: unit for unit in run.summary.units}
    gates = []
    for name, values in snr.items():
        over = values >= threshold
        count = int(over.sum())
        gates.append(
            {
                "gate": name,
                "total": values.numel(),
                # The best unit stays where none reaches the threshold.
                "kept": done[name].kept if name in done else max(count, int(of_units)),
                "zeroed": done[name].zeroed if name in done else None,
                "snr": _quantiles(values),
                "mean": float(mean[name].double().abs().mean()),
                "kl": float(kl[name].double().sum()),
                "under": _nearest(values, ~over, descending=True),
                "over": _nearest(values, over, descending=False),
                "held": not count,
            }
        )
    left_alone = posterior.left_alone
    return {
        "finished": run.summary is not None,
        "epoch": posterior.epoch,
        "epochs": posterior.epochs,
        "threshold": threshold,
        "elements": posterior.elements,
        "gates": gates,
        "left_alone": left_alone if run.summary is None else dict(run.summary.left_alone),
        "waiting": list(posterior.waiting),
    }


def nearest_table(description: Mapping[str, Any]) -> tuple[list[str], list[tuple[Any, ...]]]:
    """The head and the rows of a table of the elements nearest the threshold, by gate.

    A unit is named by its index, a weight by its indices in the layer's weight tensor.
    """
    of_units, threshold = description["elements"] == "units", f"{description['threshold']:.3g}"
    element = "unit" if of_units else "weight[index]"
    head = [
        "gate" if of_units else "layer",
        f"{element} (SNR) below {threshold}",
        f"{element} (SNR) from {threshold} up",
    ]
    rows = [
        (gate["gate"], _in_words(gate["under"]), _in_words(gate["over"]))
        for gate in description["gates"]
    ]
    return head, rows


def _in_words(nearest: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{n['unit']} ({n['snr']:.3g})" for n in nearest) or "-"


def _quantiles(values: Tensor) -> dict[str, float]:
    """Quantiles by percent; torch's own takes no more than 16 million values."""
    ordered = values.double().flatten().sort().values
    found = {}
    for percent in QUANTILES:
        place = percent / 100 * (len(ordered) - 1)
        low, share = int(place), place - int(place)
        high = min(low + 1, len(ordered) - 1)
        found[str(percent)] = float(ordered[low] + share * (ordered[high] - ordered[low]))
    return found


def gate_table(description: Mapping[str, Any]) -> tuple[list[str], list[tuple[Any, ...]]]:
    """The head and the rows of a table of the gates that `describe` gives."""
    gates, of_units = description["gates"], description["elements"] == "units"
    first = "gate" if of_units else "layer"
    head = [first, "kept", "of", "zeroed", *(f"SNR {title}" for title in QUANTILES.values())]
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
    return [*head, "E[theta]" if of_units else "|mean|", "KL, nats"], rows


def _nearest(snr: Tensor, which: Tensor, descending: bool) -> list[dict[str, Any]]:
    places = torch.nonzero(which.flatten()).flatten()
    values = snr.flatten()
    best = values[places].argsort(descending=descending, stable=True)[:NEAREST]
    found = []
    for place in places[best].tolist():
        unit = [int(i) for i in torch.unravel_index(torch.tensor(place, device="cpu"), snr.shape)]
        found.append({"unit": unit if len(unit) > 1 else unit[0], "snr": float(values[place])})
    return found
