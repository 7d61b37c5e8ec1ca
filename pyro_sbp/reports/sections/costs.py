"""The sections of the costs of the networks of a run: MACs, parameters and latency."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyro_sbp.machine import NOISY
from pyro_sbp.reports import pages, plots
from pyro_sbp.reports.findings import Findings
from pyro_sbp.reports.pictures import Pictures

__all__ = ["latency", "layers"]


def layers(found: Findings, pictures: Pictures) -> list[str]:
    """The MACs and the parameters of every layer."""
    if found.run.summary is None:
        return []
    if found.costs is None:
        return [pages.paragraph(f"Not counted: {found.missing['costs']}.", "soft")]
    rows = [
        (
            name or "elsewhere",
            *(f"{cost[part][0]:,}" for part in ("dense", "pruned")),
            *(f"{cost[part][1]:,}" for part in ("dense", "pruned")),
        )
        for name, cost in found.costs.items()
    ]
    head = ("layer", "MACs, dense", "pruned", "parameters, dense", "pruned")
    whole = pages.table(head, rows, "MACs of one image, and parameters, by layer")
    words = "; ".join(
        f"{name or 'elsewhere'}: {cost['dense'][0]:,} to {cost['pruned'][0]:,} MACs"
        for name, cost in list(found.costs.items())[:12]
    )
    parts = [
        whole if len(rows) <= 20 else pages.details(f"All {len(rows)} layers", [whole]),
        pictures(
            "layers",
            plots.layer_costs,
            f"MACs and parameters of every layer, dense and pruned. {words}.",
            found.run,
            found.costs,
        ),
    ]
    return [pages.side(parts)]


def latency(found: Findings, pictures: Pictures) -> list[str]:
    """The latency of both networks, from `bench.json`."""
    run = found.run
    if run.summary is None:
        return []
    if not run.bench:
        return [
            pages.paragraph(f"Not measured: pyro-sbp bench {run.directory} measures it.", "soft")
        ]
    # The column is omitted if all rows have the same runtime.
    several = any(row["runtime"] != "eager" for row in run.bench)
    # Earlier versions measured no confidence interval.
    intervals = any(row.get("speedup_low") is not None for row in run.bench)
    rows = [
        {
            "device": row["device"],
            **({"runtime": row["runtime"]} if several else {}),
            "threads": row["threads"],
            "batch": row["batch_size"],
            "dense, ms": f"{row['dense_ms']:.3f}",
            "pruned, ms": f"{row['pruned_ms']:.3f}",
            "speed-up": f"{row['speedup']:.2f}x",
            **({"95 % interval": _interval(row)} if intervals else {}),
            "spread": f"{row['spread']:.0%}",
        }
        for row in run.bench
    ]
    noisy = []
    if any(row["spread"] > NOISY for row in run.bench):
        words = f"A spread is over {NOISY:.0%}: the machine was busy. Measure again."
        noisy = [pages.paragraph(words, "note")]
    words = "; ".join(
        f"{row['device']}, {row['runtime'] + ', ' if several else ''}batch {row['batch_size']}, "
        f"{row['threads']} threads: {row['speedup']:.2f}x"
        for row in run.bench
    )
    parts = [
        pages.table(
            list(rows[0]),
            [list(row.values()) for row in rows],
            "Milliseconds per call, median; spread: half the interquartile range",
        ),
        pictures(
            "latency", plots.latency, f"Milliseconds per call of both networks. {words}.", run
        ),
    ]
    return [*noisy, pages.side(parts)]


def _interval(row: Mapping[str, Any]) -> str:
    """The confidence interval of a speed-up."""
    low, high = row.get("speedup_low"), row.get("speedup_high")
    return "-" if low is None or high is None else f"{low:.2f} to {high:.2f}"
