"""pyro-sbp prune: prune a finished run again, with another threshold, criterion or budget."""

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
    error_advice,
    find_run,
)
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
    help="Keep units (with sparse-vd, weights) with at least this score: their signal-to-noise "
    "ratio, or that of another --criterion.",
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
    help="Return the smallest network whose error is at most this many percentage points over "
    "that of the dense network, measured before fine-tuning on the images that the run reserves "
    "for validation (the setting holdout).",
)
@click.option(
    "--round-to",
    type=Multiple(),
    default=1,
    help="Make the kept and zeroed units of each gate together a multiple of this number. 'auto' "
    "is the largest multiple that does not make the network slower, by the latencies that a run "
    "with the setting cost=latency has measured.",
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
def prune(
    run: Path | None,
    criterion: str | None,
    threshold: float | None,
    macs_ratio: float | None,
    parameters_ratio: float | None,
    speedup: float | None,
    batch_size: int | None,
    runtime: str | None,
    max_error_increase: float | None,
    round_to: int | str,
    min_units: int,
    finetune_epochs: int,
    distill: float | None,
    as_json: bool,
) -> None:
    """Prune a finished run again with other settings.

    RUN is a run directory; by default the newest run. The network is written to RUN/pruned-…. At
    most one of --threshold, --macs-ratio, --parameters-ratio, --speedup and --max-error-increase
    says how much is removed.
    """
    run = find_run(run)
    budgets = {
        "threshold": threshold,
        "macs-ratio": macs_ratio,
        "parameters-ratio": parameters_ratio,
        "speedup": speedup,
        "max-error-increase": max_error_increase,
    }
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) > 1:
        raise RequestError(f"give one of {', '.join(f'--{name}' for name in given)}, not several")
    if speedup is None and (batch_size is not None or runtime is not None):
        option = "--batch-size" if batch_size is not None else "--runtime"
        raise RequestError(f"{option} applies to --speedup only")
    if distill is not None and not finetune_epochs:
        raise RequestError("--distill applies to --finetune-epochs only")
    if not given and (criterion, round_to, min_units, finetune_epochs) == (None, 1, 1, 0):
        options = ", ".join(f"--{name}" for name in budgets)
        raise RequestError(
            f"give {options}, --criterion, --round-to, --min-units or --finetune-epochs"
        )
    request = read_request(run)
    rule = request.recipe.rule(criterion)
    settings: dict[str, Any] = {"criterion": criterion, "round_to": round_to}
    settings |= {"min_units": min_units, "finetune_epochs": finetune_epochs, "distill": distill}
    name = "pruned" if criterion is None else f"pruned-{criterion}"
    for option, value in given.items():
        name = f"{name}-{option.removesuffix('-ratio')}-{value:g}"
    if given and threshold is None:
        rule.criterion.check_budget()
    if speedup is not None:
        name += f"-batch-{batch_size or 1}-{runtime or 'eager'}"
    name += f"-round-{round_to}" if round_to != 1 else ""
    name += f"-min-{min_units}" if min_units != 1 else ""
    name += f"-finetuned-{finetune_epochs}" if finetune_epochs else ""
    name += f"-distill-{distill:g}" if distill is not None else ""
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
    from pyro_sbp.deployment.runtimes import check_runtimes
    from pyro_sbp.deployment.speedup import Speedup
    from pyro_sbp.pruning.budgets import ratio_budget
    from pyro_sbp.training import again
    from pyro_sbp.training.latency_file import read_unit_latency

    torch.set_num_threads(threads)
    if round_to == "auto":
        settings["round_to"] = read_unit_latency(run).round_to()
        click.echo(f"units are rounded to multiples of {settings['round_to']}", err=True)
    size = request.image_size or architecture.image_size
    data = load_dataset(request.dataset, data_dir, size, device=request.device)
    try:
        budget = ratio_budget(macs_ratio, parameters_ratio)
        if speedup is not None:
            check_runtimes([runtime or "eager"])
            budget = Speedup(
                speedup,
                batch_size=batch_size or 1,
                runtime=runtime or "eager",
                threads=threads,
                device=request.device,
            )
    except ValueError as error:
        raise RequestError(str(error)) from error
    summary = again.prune_again(
        request,
        data,
        run,
        target,
        budget=budget,
        threshold=threshold,
        max_error_increase=max_error_increase,
        tell=lambda line: click.echo(line, err=True),
        **settings,
    )
    if as_json:
        click.echo(json.dumps(summary.to_dict(), indent=2))
    else:
        by_threshold = not given or threshold is not None
        weak = "under the threshold" if by_threshold else "too weak for the budget"
        click.echo(closing_table(summary, weak=weak))
        if advice := error_advice(summary):
            click.echo(advice)
        click.echo(f"network: {target}")
