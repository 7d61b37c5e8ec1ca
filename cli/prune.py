"""pyro-sbp prune: prune a finished run again, with another threshold, criterion or budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from pyro_sbp.architectures import find_architecture
from pyro_sbp.cli.common import (
    check_device,
    check_torch_device,
    closing_table,
    criterion_option,
    error_advice,
    find_run,
)
from pyro_sbp.cli.prune_request import Options
from pyro_sbp.cli.threads import threads_to_use
from pyro_sbp.datasets.sources import check_dataset
from pyro_sbp.errors import RequestError
from pyro_sbp.training.runs import read_request

__all__ = ["prune"]


class Multiple(click.ParamType):
    """An integer, or "auto"."""

    name = "integer|auto"

    def convert(self, value: Any, parameter: Any, context: Any) -> int | str:
        if value == "auto":
            return "auto"
        return click.INT.convert(value, parameter, context)


@click.command()
@click.argument("run", required=False, type=click.Path(path_type=Path))
@criterion_option
@click.option(
    "--threshold",
    type=float,
    help="Keep the units whose score is at least this number (with sparse-vd, the weights). The "
    "score is the signal-to-noise ratio, or that of another --criterion.",
)
@click.option("--macs-ratio", type=float, help="Reduce the MACs by at least this factor.")
@click.option(
    "--parameters-ratio", type=float, help="Reduce the parameters by at least this factor."
)
@click.option(
    "--speedup",
    type=float,
    help="Make the network at least this many times faster on this machine. Candidates are "
    "measured in turn with the dense network.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    help="Examples per call for --speedup.  [default: 1]",
)
@click.option(
    "--runtime",
    type=click.Choice(["eager", "compile", "onnxruntime"]),
    help="Runtime for --speedup, as for bench.  [default: eager]",
)
@click.option(
    "--max-error-increase",
    type=float,
    help="Return the smallest network whose error is at most this many percentage points higher "
    "than that of the dense network. The error is measured before fine-tuning, on the images that "
    "the run reserved for validation (setting holdout).",
)
@click.option(
    "--round-to",
    type=Multiple(),
    default=1,
    help="Round the number of units of each gate (kept and zeroed) to a multiple of this number. "
    "'auto' is the largest multiple that does not make the network slower; it needs a run with the "
    "setting cost=latency, which measures latencies.",
)
@click.option(
    "--min-units", type=int, default=1, help="Keep at least this many units in each gate."
)
@click.option(
    "--finetune-epochs",
    type=click.IntRange(0),
    default=0,
    help="Fine-tune the pruned network for this many epochs.",
)
@click.option(
    "--distill",
    type=click.FloatRange(0),
    help="Temperature of the soft labels for --finetune-epochs; 0 uses the labels of the data.  "
    "[default: that of the recipe]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def prune(run: Path | None, as_json: bool, **options: Any) -> None:
    """Prune a finished run again with other settings.

    RUN is a run directory; by default the newest run. The network is written to RUN/pruned-….
    To set how much is removed, give one of --threshold, --macs-ratio, --parameters-ratio, --speedup
    and --max-error-increase. Without these, the settings of the run apply.
    """
    run = find_run(run)
    asked = Options(**options)
    request = read_request(run)
    rule = request.recipe.rule(asked.criterion)
    if not asked.by_threshold:
        rule.criterion.check_budget()
    target = run / asked.directory_name()
    if target.exists():
        raise RequestError(f"{target} already exists; delete it to prune again with these settings")
    find_architecture(request.arch)  # raises for one that is unknown
    check_dataset(request.dataset, Path(request.data_dir))
    check_device(request.device, run)
    threads = threads_to_use()

    from pyro_sbp.cli.prune_run import prune_run  # imports torch

    check_torch_device(request.device, run)
    summary = prune_run(request, run, target, asked, threads)
    if as_json:
        click.echo(json.dumps(summary.to_dict(), indent=2))
        return
    weak = "under the threshold" if asked.by_threshold else "too weak for the budget"
    click.echo(closing_table(summary, weak=weak))
    if advice := error_advice(summary):
        click.echo(advice)
    click.echo(f"network: {target}")
