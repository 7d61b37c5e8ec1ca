"""Plots of the training of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_sbp.errors import RequestError
from pyro_sbp.reports.plots.style import (
    LIGHT_CYCLE,
    drawing,
    minor_ticks,
    most_shown,
    new_figure,
    plain_ticks,
    run_of,
)
from pyro_sbp.training.runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


__all__ = ["training_curves"]


@drawing
def training_curves(source: Run | str | Path) -> Figure:
    """Plot loss, NLL and KL, test error, and the share of kept units over the epochs of all
    phases."""
    run = run_of(source)
    if not run.metrics:
        raise RequestError(f"{run.directory} has no epoch in metrics.jsonl yet")
    lines, epochs = run.metrics, range(1, len(run.metrics) + 1)
    figure, axes = new_figure(6.2, 3, sharex=True)
    loss, error, units = axes[:, 0]
    marker = "." if len(lines) < 40 else ""
    kl = [line.get("weighted_kl", line["kl"]) for line in lines]
    for label, values, style in (
        ("loss", [line["loss"] for line in lines], "-"),
        ("NLL", [line["nll"] for line in lines], "--"),
        ("weighted KL", kl, ":"),
    ):
        positive = [value if value > 0 else math.nan for value in values]
        if not all(map(math.isnan, positive)):
            loss.plot(epochs, positive, style, label=label, marker=marker)
    loss.set_ylabel("nats per example")
    if loss.lines:
        loss.set_yscale("log")
        plain_ticks(loss.yaxis)
        loss.legend(fontsize=9)
    error.plot(epochs, [line["error"] for line in lines], marker=marker)
    error_axis(error, [line["error"] for line in lines])
    totals = _totals(run)
    names = sorted(totals, key=lambda name: -totals[name])[: len(LIGHT_CYCLE) * 2]
    for index, name in enumerate(name for name in totals if name in names):
        share = [100 * line["units"].get(name, math.nan) / totals[name] for line in lines]
        style = "-" if index < len(LIGHT_CYCLE) else "--"
        units.plot(epochs, share, style, label=name, marker=marker)
    units.set(ylabel="units left, %", xlabel="epoch", ylim=(0, 105))
    if names:
        units.legend(fontsize=9, ncols=2, title=most_shown(len(names), len(totals), "gates"))
    units.set_xlim(0.5 - 0.02 * len(lines), len(lines) + 0.5)
    units.xaxis.get_major_locator().set_params(integer=True)
    start = 0
    phases = dict.fromkeys(line["phase"] for line in lines)
    tilt = 30 if len(phases) > 4 else 0  # RBP has many turns with long names
    place: dict[str, Any] = {"transform": loss.get_xaxis_transform(), "fontsize": 9}
    for phase in phases:
        count = sum(line["phase"] == phase for line in lines)
        loss.text(start + 0.6, 1.02, phase, rotation=tilt, **place)
        for ax in axes[:, 0] if start else ():
            ax.axvline(start + 0.5, color="gray", linewidth=0.8, linestyle=":")
        start += count
    return figure


def error_axis(ax: Any, errors: Sequence[float]) -> None:
    """Label an axis of errors, and make it logarithmic if they differ by more than a factor of
    5."""
    if min(errors) > 0 and max(errors) > 5 * min(errors):
        ax.set_yscale("log")
        plain_ticks(ax.yaxis)
        minor_ticks(ax.yaxis)
    ax.set_ylabel("test error, %")


def _totals(run: Run) -> dict[str, int]:
    """The number of units of every gate at the start."""
    if run.summary is not None:
        return {unit.gate: unit.total for unit in run.summary.units}
    # The largest number in any epoch. If a run started with noise, this misses the units that were
    # removed in its first epoch.
    totals: dict[str, int] = {}
    for line in run.metrics:
        for name, count in line["units"].items():
            totals[name] = max(totals.get(name, 1), count)
    return totals
