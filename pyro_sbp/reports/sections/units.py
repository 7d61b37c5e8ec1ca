"""The section of the units, or weights, of a run: their scores, and which are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pyro_sbp.reasons import with_share
from pyro_sbp.recipes.criteria import Criterion
from pyro_sbp.reports import pages, plots
from pyro_sbp.reports.findings import Findings
from pyro_sbp.reports.pictures import Pictures
from pyro_sbp.reports.posterior import Posterior, gate_table, nearest_table
from pyro_sbp.training.runs import Run

__all__ = ["units"]


def units(found: Findings, pictures: Pictures) -> list[str]:
    """The scores of the units of every gate, or of the weights of every layer."""
    description, posterior = found.description, found.posterior
    if description is None or posterior is None:
        return [pages.paragraph(f"No posterior: {found.missing['posterior']}.", "soft")]
    elements, criterion = description["elements"], found.rule.criterion
    head, rows = gate_table(description)
    return [
        pages.paragraph(_meaning(description, criterion)),
        pages.table(head, rows, f"{elements.capitalize()} by {head[0]}"),
        *_gates_under_threshold(description),
        pages.side(_pictures(found.run, posterior, description, criterion, pictures)),
        pages.details(
            f"{elements.capitalize()} closest to the threshold {description['threshold']:.3g}",
            [pages.table(*nearest_table(description), f"Closest {elements}")],
        ),
        *_waiting(description),
        *_not_prunable(description),
    ]


def _meaning(description: Mapping[str, Any], criterion: Criterion) -> str:
    threshold = description["threshold"]
    if description["elements"] == "weights":
        return (
            f"Weights with a signal-to-noise ratio (SNR) of {threshold:.3g} or more are kept, "
            f"{_log_alpha(threshold)}. The table shows quantiles of the SNR, the mean of the "
            "absolute values of the weights, and the KL of the layer in nats:"
        )
    return (
        f"Units with a {criterion.title} ({criterion.short}) of {threshold:.3g} or more are kept. "
        "The table shows its quantiles, the mean of E[theta] over the units, and the KL of the "
        "gate in nats:"
    )


def _log_alpha(threshold: float) -> str:
    """A threshold on the signal-to-noise ratio of weights, as a bound on log alpha."""
    if threshold == 0:
        return "so every weight is kept, whatever its log alpha"
    return f"which is a log alpha of {-2 * math.log(threshold):.3g} or less"


def _gates_under_threshold(description: Mapping[str, Any]) -> list[str]:
    """A note about the gates, or layers, in which no element reaches the threshold."""
    held = ", ".join(gate["gate"] for gate in description["gates"] if gate["held"])
    if not held:
        return []
    none, kept = (
        ("No unit", ", and the best is kept")
        if description["elements"] == "units"
        else ("No weight", "")
    )
    return [pages.paragraph(f"{none} reaches the threshold{kept}: {held}.", "note")]


def _pictures(
    run: Run,
    posterior: Posterior,
    description: Mapping[str, Any],
    criterion: Criterion,
    pictures: Pictures,
) -> list[str]:
    """The figures of the scores."""
    threshold, gates = description["threshold"], description["gates"]
    site = "gate" if description["elements"] == "units" else "layer"
    counts = "; ".join(f"{g['gate']} keeps {g['kept']} of {g['total']}" for g in gates)
    drawn = [
        pictures(
            "snr",
            plots.snr_histograms,
            f"Histograms of the signal-to-noise ratio of every {site}; the threshold on the "
            f"{criterion.title} is {threshold:.3g}. {counts}.",
            posterior,
            threshold,
            criterion.name,
        )
    ]
    # Not every network has such gates. The page does not mention missing ones.
    if plots.pixel_scores(run, posterior) is not None:
        drawn.append(
            pictures(
                "pixels",
                plots.kept_pixels,
                "The signal-to-noise ratios of the pixels of the image, and which pixels are kept.",
                run,
                criterion.name,
            )
        )
    if any(value.ndim == 4 for value in posterior.weights.values()):
        drawn.append(
            pictures(
                "filters",
                plots.first_filters,
                "The kept filters of the first convolution, best first.",
                run,
                criterion.name,
            )
        )
    return drawn


def _waiting(description: Mapping[str, Any]) -> list[str]:
    """The gates that RBP has not trained yet."""
    if not description["waiting"]:
        return []
    words = f"Gates without a turn yet: {', '.join(description['waiting'])}."
    return [pages.paragraph(words, "soft")]


def _not_prunable(description: Mapping[str, Any]) -> list[str]:
    """The layers that are not prunable, and why."""
    left, shares = description["left_alone"], description["shares"]
    if not left:
        return []
    rows = [(name, with_share(why, shares.get(name))) for name, why in left.items()]
    return [
        pages.details(
            f"Not prunable: {len(left)} of the layers",
            [pages.table(("layer", "why"), rows, "Layers without a gate")],
        )
    ]
