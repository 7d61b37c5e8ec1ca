"""The posterior of a run, read from its checkpoint, without the network or the data."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_sbp.errors import RequestError
from pyro_sbp.pruning.criteria import scores
from pyro_sbp.recipes.criteria import CRITERIA
from pyro_sbp.recipes.method_recipes import METHODS
from pyro_sbp.training.checkpoints import Checkpoint
from pyro_sbp.training.runs import Run

__all__ = [
    "Posterior",
    "describe",
    "gate_table",
    "kept_features",
    "nearest_table",
    "read_posterior",
]

#: The number of units that are listed on either side of the threshold.
NEAREST = 3
#: Percent and title of the quantiles of scores.
QUANTILES = {0: "min", 25: "25 %", 50: "median", 75: "75 %", 100: "max"}
#: The phases whose epochs have no noise.
WITHOUT_NOISE = ("dense", "finetuned")


@dataclass(frozen=True)
class Posterior:
    """The posterior of the noise of a run. `mean`, `snr` and `kl` are those of the guide.

    Attributes:
        sites: from the name of a gate (for SparseVD, of a layer) to the distribution of its
            elements.
        priors: the prior of every site.
        weights: the state of the network in the checkpoint, from parameter name to tensor.
        epoch: the number of finished epochs with noise.
        epochs: the requested number of epochs with noise.
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
        """The kind of elements of a site: "units" or "weights"."""
        return "weights" if any(len(q.batch_shape) > 1 for q in self.sites.values()) else "units"

    def _statistic(self, function: Callable[[Any], Tensor]) -> dict[str, Tensor]:
        return {name: function(q) for name, q in self.sites.items()}

    def mean(self) -> dict[str, Tensor]:
        """The mean of every element, by site."""
        return self._statistic(lambda q: q.mean)

    def snr(self) -> dict[str, Tensor]:
        """The signal-to-noise ratio of every element, by site."""
        return self._statistic(lambda q: q.snr)

    def scores(self, criterion: str) -> dict[str, Tensor]:
        """The score of every element by a criterion, by site; BMRS is for units only."""
        return scores(self.sites, self.priors, criterion)

    def kl(self) -> dict[str, Tensor]:
        """KL(posterior || prior) of every element in nats, by site."""
        return {
            name: torch.distributions.kl_divergence(q, self.priors[name])
            for name, q in self.sites.items()
        }


def read_posterior(directory: Path) -> Posterior:
    """Read the posterior of the last checkpoint of a run.

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
    if gates is None:  # a checkpoint of an earlier version
        gates = saved.lines[-1]["units"] if saved.lines else {}
    of_gates = all(loc.ndim == 1 for loc, _ in saved.posteriors.values())
    # In the order of the network, which may differ from the order of the turns.
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
    """The layers in the order of the network. The parameters of a guide have another order."""
    return [name.removesuffix(".weight") for name in weights]


def describe(run: Run, posterior: Posterior, criterion: str | None = None) -> dict[str, Any]:
    """Describe a posterior gate by gate, as plain values for JSON.

    Args:
        run: the run. If it has finished, `kept` and `zeroed` are those of the final network, unless
            another criterion is asked for.
        posterior: the posterior of the run.
        criterion: the criterion that decides; by default that of the run's recipe. The threshold is
            that of `Recipe.rule`.

    Returns:
        `finished`, `epoch`, `epochs`, `criterion`, `threshold`, `elements` ("units", or for
        SparseVD "weights"), `left_alone` (the layers that are not prunable, and why; None for old
        runs that do not record it), `shares` (their shares of the parameters and of the MACs, once
        the run has finished), `waiting` (the gates that RBP has not trained yet) and `gates`,
        a list of {`gate` (for weights, the layer), `total`, `kept`, `kept_units` (the indices of
        the kept units; None for weights), `zeroed` (None for weights and until the run has
        finished), `snr` and `score` (quantiles by percentage, of the signal-to-noise ratio and of
        the score of the criterion), `mean` (over the elements, of E[theta] or of the absolute means
        of the weights), `kl` (sum over the elements, in nats), `under` and `over` (the elements
        closest to the threshold: {`unit`, `snr`, `score`}; for a weight, `unit` is the list of its
        indices), `held` (whether no element reaches the threshold)}.

    Raises:
        RequestError: there is no such criterion, or it is not for the run's method.
    """
    recipe = run.request.recipe
    rule = recipe.rule(criterion)
    threshold = rule.threshold
    mean, snr, kl = posterior.mean(), posterior.snr(), posterior.kl()
    score = posterior.scores(rule.criterion.name)
    of_units = posterior.elements == "units"
    done, stored = {}, {}
    if run.summary is not None and of_units and rule == recipe.rule():
        done = {unit.gate: unit for unit in run.summary.units}
        stored = run.units or {}
    gates = []
    for name, values in score.items():
        over = values >= threshold
        count = int(over.sum())
        gates.append(
            {
                "gate": name,
                "total": values.numel(),
                # The best unit is kept if no unit reaches the threshold.
                "kept": done[name].kept if name in done else max(count, int(of_units)),
                "kept_units": _kept_units(stored.get(name), values, over) if of_units else None,
                "zeroed": done[name].zeroed if name in done else None,
                "snr": _quantiles(snr[name]),
                "score": _quantiles(values),
                "mean": float(mean[name].double().abs().mean()),
                "kl": float(kl[name].double().sum()),
                "under": _nearest(values, snr[name], ~over, descending=True),
                "over": _nearest(values, snr[name], over, descending=False),
                "held": not count,
            }
        )
    left_alone = posterior.left_alone
    return {
        "finished": run.summary is not None,
        "epoch": posterior.epoch,
        "epochs": posterior.epochs,
        "criterion": rule.criterion.name,
        "threshold": threshold,
        "elements": posterior.elements,
        "gates": gates,
        "left_alone": left_alone if run.summary is None else dict(run.summary.left_alone),
        "shares": {} if run.summary is None else dict(run.summary.shares),
        "waiting": list(posterior.waiting),
    }


def _kept_units(stored: Mapping[str, Any] | None, score: Tensor, over: Tensor) -> list[int]:
    """The indices of the units of a gate that the final network has. Without a final network, those
    of the units that would be kept now."""
    if stored is not None:
        return list(stored["kept"])
    return torch.nonzero(over).flatten().tolist() or [int(score.argmax())]


def kept_features(description: Mapping[str, Any]) -> dict[str, str]:
    """The input features that are kept, by their gate: indices, with ranges such as ``3-5``."""
    return {
        gate["gate"]: _ranges(gate["kept_units"])
        for gate in description["gates"]
        if gate["kept_units"] is not None and gate["gate"].endswith("_input")
    }


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in words, with ranges for those that follow each other."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def nearest_table(description: Mapping[str, Any]) -> tuple[list[str], list[tuple[Any, ...]]]:
    """The head and the rows of a table of the elements closest to the threshold, by gate.

    A unit is identified by its index, and a weight by its indices in the weight tensor.
    """
    of_units, threshold = description["elements"] == "units", f"{description['threshold']:.3g}"
    element = "unit" if of_units else "weight[index]"
    short = CRITERIA[description["criterion"]].short
    head = [
        "gate" if of_units else "layer",
        f"{element} ({short}) below {threshold}",
        f"{element} ({short}) from {threshold} up",
    ]
    rows = [
        (gate["gate"], _in_words(gate["under"]), _in_words(gate["over"]))
        for gate in description["gates"]
    ]
    return head, rows


def _in_words(nearest: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{n['unit']} ({n['score']:.3g})" for n in nearest) or "-"


def _quantiles(values: Tensor) -> dict[str, float]:
    """Quantiles by percentage. `torch.quantile` is limited to 16 million values."""
    ordered = values.double().flatten().sort().values
    found = {}
    for percent in QUANTILES:
        place = percent / 100 * (len(ordered) - 1)
        low, share = int(place), place - int(place)
        high = min(low + 1, len(ordered) - 1)
        found[str(percent)] = float(ordered[low] + share * (ordered[high] - ordered[low]))
    return found


def gate_table(description: Mapping[str, Any]) -> tuple[list[str], list[tuple[Any, ...]]]:
    """The head and the rows of a table of the gates that `describe` returns."""
    gates, of_units = description["gates"], description["elements"] == "units"
    first = "gate" if of_units else "layer"
    short = CRITERIA[description["criterion"]].short
    head = [first, "kept", "of", "zeroed", *(f"{short} {title}" for title in QUANTILES.values())]
    rows = [
        (
            gate["gate"],
            gate["kept"],
            gate["total"],
            "-" if gate["zeroed"] is None else gate["zeroed"],
            *(f"{value:.3g}" for value in gate["score"].values()),
            f"{gate['mean']:.3f}",
            f"{gate['kl']:.1f}",
        )
        for gate in gates
    ]
    return [*head, "E[theta]" if of_units else "|mean|", "KL, nats"], rows


def _nearest(score: Tensor, snr: Tensor, which: Tensor, descending: bool) -> list[dict[str, Any]]:
    places = torch.nonzero(which.flatten()).flatten()
    values, ratios = score.flatten(), snr.flatten()
    best = values[places].argsort(descending=descending, stable=True)[:NEAREST]
    found = []
    for place in places[best].tolist():
        unit = [int(i) for i in torch.unravel_index(torch.tensor(place, device="cpu"), score.shape)]
        found.append(
            {
                "unit": unit if len(unit) > 1 else unit[0],
                "snr": float(ratios[place]),
                "score": float(values[place]),
            }
        )
    return found
