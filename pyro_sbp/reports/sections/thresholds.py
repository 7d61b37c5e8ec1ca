"""The section of the errors of a run at other thresholds."""

from __future__ import annotations

from pyro_sbp.reports import pages, plots
from pyro_sbp.reports.findings import Findings
from pyro_sbp.reports.pictures import Pictures

__all__ = ["thresholds"]


def thresholds(found: Findings, pictures: Pictures) -> list[str]:
    """The errors and sizes of the network at other thresholds."""
    if found.run.summary is None:
        return []
    if found.sweep is None:
        return [pages.paragraph(f"Not measured: {found.missing['sweep']}.", "soft")]
    recipe, (criterion, threshold) = found.run.request.recipe, found.rule
    kind, own = found.sweep[0]["split"], recipe.rule() == found.rule
    gates = list(found.sweep[0]["units"])
    # For a network with many gates, the table has only the sums.
    shown = gates if len(gates) <= 6 else []
    rows = [
        (
            f"{row['threshold']:.3g}"
            + (" (recipe)" if own and row["threshold"] == threshold else ""),
            pages.percent(row["error"]),
            f"{row['nll']:.4f}",
            pages.percent(row["ece"]),
            f"{row['macs']:,}",
            f"{row['ratio']:.2f}x",
            *([_compression(row["compression"])] if "compression" in row else []),
            *([row["units"][gate] for gate in shown] or [sum(row["units"].values())]),
            ", ".join(row["held"]) or "-",
        )
        for row in found.sweep
    ]
    head = (
        "threshold",
        f"{kind} error",
        "NLL",
        "ECE",
        "MACs",
        "ratio",
        *(["weights"] if "compression" in found.sweep[0] else []),
        *(shown or ["units"]),
        "only the best unit kept",
    )
    words = "; ".join(
        f"{row['threshold']:.3g}: {pages.percent(row['error'])} at {row['ratio']:.1f} times"
        for row in found.sweep
    )
    drawn = [
        pictures(
            "error-threshold",
            plots.error_against_threshold,
            f"{kind.capitalize()} error against the threshold. {words}.",
            found.sweep,
            threshold,
        ),
        pictures(
            "error-macs",
            plots.error_against_macs,
            f"{kind.capitalize()} error against the MACs ratio, by threshold. {words}.",
            found.sweep,
            threshold,
        ),
    ]
    return [
        pages.paragraph(_meaning(criterion.title, recipe.holdout)),
        pages.table(head, rows, "Thresholds, errors and units kept"),
        pages.side(drawn),
    ]


def _meaning(title: str, holdout: int) -> str:
    """How the errors were measured, and what they may be used for."""
    network = f"The network at other thresholds on the {title}, without fine-tuning. "
    if holdout:
        return network + (
            f"Errors are measured on the {holdout:,} training images that are reserved for "
            "validation, so a threshold can be chosen with them. The error of the choice is then "
            "measured on the test images."
        )
    return network + (
        "Errors are measured on the test images, as pyro-sbp prune --threshold does, because no "
        "training images were reserved for validation. Do not use them to choose a threshold: the "
        "error of the choice would have to be measured on other images."
    )


def _compression(ratio: float | None) -> str:
    return "none left" if ratio is None else f"{ratio:.1f}x"
