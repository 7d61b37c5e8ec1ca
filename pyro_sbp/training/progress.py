"""The progress of a run: what is passed to its caller, and what is written to its metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyro_sbp.methods.phase import Standing

__all__ = ["Progress", "ignore", "metrics_line"]


@dataclass(frozen=True)
class Progress:
    """The progress of a run, passed to `watch` of `train` after every epoch and every 50 steps.

    Attributes:
        phase, epoch, epochs, step, steps: the phase, and the position within it.
        loss, nll, weighted_kl: per example; the loss is the sum of the other two.
        error: after an epoch, the test error in percent.
        standing: after an epoch, the units that remain.
    """

    phase: str
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    nll: float
    weighted_kl: float
    error: float | None = None
    standing: Standing | None = None


def ignore(progress: object) -> None:
    """Do nothing with a report of progress, of any kind."""


def metrics_line(progress: Progress, kl: float, seconds: float) -> dict[str, Any]:
    """The line of `metrics.jsonl` for an epoch.

    Args:
        progress: the progress after the epoch.
        kl: the KL divergence without weights, per example.
        seconds: the time of the epoch.
    """
    standing = progress.standing
    assert standing is not None, "the epoch has not ended"
    return {
        "phase": progress.phase,
        "epoch": progress.epoch,
        "loss": progress.loss,
        "nll": progress.nll,
        "kl": kl,
        "weighted_kl": progress.weighted_kl,
        "error": progress.error,
        "units": dict(standing.units),
        "held": list(standing.held),
        **({} if standing.macs is None else {"macs": standing.macs}),
        **({} if standing.control is None else {"control": dict(standing.control)}),
        "seconds": round(seconds, 3),
    }
