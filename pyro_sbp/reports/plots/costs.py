"""Plots of the costs of a network: thresholds, MACs, parameters, latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_sbp.errors import RequestError
from pyro_sbp.recipes.criteria import CRITERIA, find_criterion
from pyro_sbp.reports.plots.style import (
    MOST_LAYERS,
    color_cycle,
    draw_bars,
    drawing,
    minor_ticks,
    most_shown,
    new_figure,
    plain_ticks,
    run_of,
)
from pyro_sbp.reports.plots.training import error_axis
from pyro_sbp.training.runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


__all__ = ["error_against_macs", "error_against_threshold", "latency", "layer_costs"]


@drawing
def error_against_threshold(rows: Sequence[Mapping[str, Any]], threshold: float = 1.0) -> Figure:
    """Plot the error at other thresholds, on the images on which the sweep was measured.

    Args:
        rows: from `sweep`.
        threshold: the threshold of the run, which is marked.
    """
    figure, axes = new_figure(3.2)
    ax = axes[0, 0]
    criterion = find_criterion(rows[0].get("criterion", "snr")) if rows else CRITERIA["snr"]
    positive = criterion.least >= 0
    if positive:  # a logarithmic axis cannot show zero
        rows = [row for row in rows if row["threshold"] > 0]
    _sweep_line(ax, rows, "threshold", threshold)
    ax.set(xscale="log" if positive else "symlog", xlabel=f"threshold on the {criterion.title}")
    if positive:
        plain_ticks(ax.xaxis)
        minor_ticks(ax.xaxis)
    return figure


@drawing
def error_against_macs(rows: Sequence[Mapping[str, Any]], threshold: float = 1.0) -> Figure:
    """Plot the error against the MACs ratio at other thresholds.

    Args:
        rows, threshold: as for `error_against_threshold`.
    """
    figure, axes = new_figure(3.2)
    ax = axes[0, 0]
    _sweep_line(ax, rows, "ratio", threshold)
    ax.set(xscale="log", xlabel="times fewer MACs")
    plain_ticks(ax.xaxis)
    minor_ticks(ax.xaxis)
    return figure


def _sweep_line(
    ax: Any, rows: Sequence[Mapping[str, Any]], quantity: str, threshold: float
) -> None:
    if not rows:
        raise RequestError("the sweep has no threshold that can be drawn")
    ax.plot([row[quantity] for row in rows], [row["error"] for row in rows], marker="o")
    mine = [row for row in rows if row["threshold"] == threshold]
    if mine:
        label = f"threshold {threshold:g}"
        ax.plot(
            mine[0][quantity],
            mine[0]["error"],
            "D",
            color=color_cycle()[1],
            markersize=9,
            label=label,
        )
        ax.legend(fontsize=9)
    error_axis(ax, [row["error"] for row in rows])
    ax.set_ylabel(f"{rows[0]['split']} error, %")


@drawing
def layer_costs(source: Run | str | Path, costs: Mapping[str, Any] | None = None) -> Figure:
    """Plot MACs and parameters of every layer with MACs, before and after, on logarithmic axes.

    Args:
        source: a finished run or its directory.
        costs: the costs from `costs_of`; computed if not given.
    """
    from pyro_sbp.reports.findings import costs_of

    costs = costs_of(run_of(source)) if costs is None else costs
    # Normalization layers have no MACs and few parameters.
    costs = {name: cost for name, cost in costs.items() if cost["dense"][0]}
    names = sorted(costs, key=lambda name: -costs[name]["dense"][0])[:MOST_LAYERS]
    names = [name for name in costs if name in names]
    figure, axes = new_figure(1.6 + 0.75 * len(names), 2, sharey=True)
    for index, (ax, label) in enumerate(zip(axes[:, 0], ("MACs", "parameters"), strict=True)):
        bars = {part: [costs[name][part][index] for name in names] for part in ("dense", "pruned")}
        draw_bars(ax, [name or "elsewhere" for name in names], bars)
        ax.set_xlabel(label)
    title = most_shown(len(names), len(costs), "layers")
    axes[0, 0].legend(fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, title=title)
    return figure


@drawing
def latency(source: Run | str | Path) -> Figure:
    """Plot the latency of the dense and of the pruned network in seconds, from `bench.json`."""
    run = run_of(source)
    if not run.bench:
        raise RequestError(
            f"{run.directory} has no bench.json; create it with pyro-sbp bench {run.directory}"
        )
    rows = run.bench
    several = any(row["runtime"] != "eager" for row in rows)
    names = [
        f"{'GPU' if row['device'].startswith('cuda') else 'CPU'}, batch {row['batch_size']}"
        + ("" if row["device"].startswith("cuda") else f",\n{_threads(row['threads'])}")
        + (f",\n{row['runtime']}" if several else "")
        for row in rows
    ]
    bars = {
        "dense": [row["dense_ms"] / 1e3 for row in rows],
        "pruned": [row["pruned_ms"] / 1e3 for row in rows],
    }
    floors = [row.get("floor_ms") or 0.0 for row in rows]
    if all(floors):
        bars["one unit per gate"] = [floor / 1e3 for floor in floors]
    figure, axes = new_figure(1.1 + 0.7 * len(rows))
    draw_bars(axes[0, 0], names, bars, unit="s")
    axes[0, 0].set_xlabel("time of a call, median")
    axes[0, 0].legend(fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    return figure


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"
