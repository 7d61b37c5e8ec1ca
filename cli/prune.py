"""pyro-sbp prune: prune a finished run again, by another threshold or criterion or to a budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from pyro_sbp.architectures import find_architecture
from pyro_sbp.cli.common import (
    check_device,
    closing_table,
    criterion_option,
    find_run,
    read_request,
)
from pyro_sbp.cli.threads import threads_to_use
from pyro_sbp.datasets.sources import check_dataset
from pyro_sbp.errors import RequestError

__all__ = ["prune"]


@click.command()
@click.argument("run", required=False, type=click.Path(path_type=Path))
@criterion_option
@click.option(
    "--threshold",
    type=float,
    help="Keep units (with sparse-vd, weights) with at least this score: their signal-to-noise "
    "ratio, or that of another --criterion.",
)
@click.option("--macs-ratio", type=float, help="Reduce the MACs by at least this factor.")
@click.option(
    "--round-to",
    type=int,
    default=1,
    help="Make the kept and zeroed units of each gate together a multiple of this number.",
)
@click.option(
    "--min-units", type=int, default=1, help="Keep at least this many units in each gate."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def prune(
    run: Path | None,
    criterion: str | None,
    threshold: float | None,
    macs_ratio: float | None,
    round_to: int,
    min_units: int,
    as_json: bool,
) -> None:
    """Prune a finished run again with other settings.

    RUN is a run directory; by default the newest run. The network is written to RUN/pruned-… and is
    not fine-tuned.
    """
    run = find_run(run)
    if threshold is not None and macs_ratio is not None:
        raise RequestError("give --threshold or --macs-ratio, not both")
    if (criterion, threshold, macs_ratio, round_to, min_units) == (None, None, None, 1, 1):
        raise RequestError("give --criterion, --threshold, --macs-ratio, --round-to or --min-units")
    request = read_request(run)
    rule = request.recipe.rule(criterion)
    settings: dict[str, Any] = {"criterion": criterion, "round_to": round_to}
    settings["min_units"] = min_units
    name = "pruned" if criterion is None else f"pruned-{criterion}"
    if threshold is not None:
        settings["threshold"], name = threshold, f"{name}-threshold-{threshold:g}"
    if macs_ratio is not None:
        rule.criterion.check_budget()
        settings["macs_ratio"], name = macs_ratio, f"{name}-macs-{macs_ratio:g}"
    name += f"-round-{round_to}" if round_to != 1 else ""
    name += f"-min-{min_units}" if min_units != 1 else ""
    target = run / name
    if target.exists():
        raise RequestError(f"{target} already exists; delete it to prune again with these settings")
    architecture = find_architecture(request.arch)
    data_dir = Path(request.data_dir)
    check_dataset(request.dataset, data_dir)
    check_device(request.device)
    threads = threads_to_use()

    import torch

    from pyro_sbp.datasets.loading import load_dataset
    from pyro_sbp.training import again

    torch.set_num_threads(threads)
    size = request.image_size or architecture.image_size
    data = load_dataset(request.dataset, data_dir, size, device=request.device)
    summary = again.prune_again(request, data, run, target, **settings)
    if as_json:
        click.echo(json.dumps(summary.to_dict(), indent=2))
    else:
        weak = "under the threshold" if macs_ratio is None else "too weak for the budget"
        click.echo(closing_table(summary, weak=weak))
        click.echo(f"network: {target}")
