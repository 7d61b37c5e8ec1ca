"""The section of the training of a run: the end of every phase, and the curves."""

from __future__ import annotations

from pyro_sbp.reports import pages, plots
from pyro_sbp.reports.findings import Findings
from pyro_sbp.reports.pictures import Pictures

__all__ = ["training"]


def training(found: Findings, pictures: Pictures) -> list[str]:
    """The numbers at the end of every phase, and the training curves."""
    lines = found.run.metrics
    if not lines:
        return [pages.paragraph("No epoch has ended yet.", "soft")]
    last = {line["phase"]: line for line in lines}
    words = "; ".join(
        f"{name}: {line['epoch']} epochs, at the end loss {line['loss']:.4g}, test error "
        f"{pages.percent(line['error'])}, {sum(line['units'].values())} units"
        for name, line in last.items()
    )
    rows = [
        (
            name,
            line["epoch"],
            f"{line['loss']:.4g}",
            f"{line['nll']:.4g}",
            f"{line['kl']:.4g}",
            pages.percent(line["error"]),
            sum(line["units"].values()),
            f"{sum(one['seconds'] for one in lines if one['phase'] == name):.0f} s",
        )
        for name, line in last.items()
    ]
    head = ("phase", "epochs", "loss", "NLL", "KL", "test error", "units", "time")
    parts = [
        pages.table(head, rows, "The end of every phase; nats per example, KL without weights"),
        pictures(
            "training",
            plots.training_curves,
            f"Loss, NLL, KL, test error and remaining units by epoch. {words}.",
            found.run,
        ),
    ]
    return [pages.side(parts)]
