"""pyro-sbp bench: measure the latency of the dense and the pruned network of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from pyro_sbp.architectures import find_architecture
from pyro_sbp.cli.common import find_network, read_network, result_in_words
from pyro_sbp.cli.threads import threads_to_use
from pyro_sbp.errors import RequestError
from pyro_sbp.text_tables import markdown_table, table
from pyro_sbp.training.files import write_json
from pyro_sbp.training.runs import read_request
from pyro_sbp.training.summary import Summary

__all__ = ["bench"]


def _once(context: click.Context, parameter: click.Parameter, values: tuple[Any, ...]) -> Any:
    """The values of an option that may be repeated, each of them once."""
    return tuple(dict.fromkeys(values))


@click.command()
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option(
    "--batch-size",
    "batch_sizes",
    type=click.IntRange(1),
    multiple=True,
    callback=_once,
    default=(1, 128),
    help="Examples per call; may be repeated.  [default: 1, 128]",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    multiple=True,
    callback=_once,
    help="Number of CPU threads; may be repeated.  [default: 1, and the number of free cores]",
)
@click.option(
    "--runtime",
    "runtimes",
    type=click.Choice(["eager", "compile", "onnxruntime", "int8"]),
    multiple=True,
    callback=_once,
    default=("eager",),
    help="Runtime: PyTorch without compilation (eager), torch.compile (compile), ONNX Runtime on "
    "the CPU (onnxruntime), or ONNX Runtime with 8-bit integers that are calibrated on training "
    "images (int8); may be repeated.  "
    "[default: eager]",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=2.0,
    help="Seconds of measurement for each network, batch size, number of threads and runtime.  "
    "[default: 2]",
)
@click.option("--channels-last", is_flag=True, help="Use the channels-last memory format.")
@click.option("--json", "as_json", is_flag=True, help="Print the latencies and MACs as JSON.")
@click.option("--markdown", is_flag=True, help="Print the tables as Markdown.")
def bench(run: Path | None, as_json: bool, markdown: bool, **settings: Any) -> None:
    """Measure how much faster the pruned network is.

    RUN is a run directory, or a network that prune wrote into one (RUN/pruned-…); by default the
    newest run. The dense and the pruned network are measured in turn, on the CPU and, if there is
    one, on the GPU.
    """
    if as_json and markdown:
        raise RequestError("give one of --json and --markdown, not both")
    run, saved = find_network(run)
    request = read_request(run)
    find_architecture(request.arch)  # raises for one that is unknown
    kwargs, shape = read_network(saved)
    # Networks that `prune` wrote have no summary.
    summary = Summary.read(run / "summary.json") if saved == run / "pruned" else None
    threads = threads_to_use(max(settings["threads"], default=None))

    from pyro_sbp.cli.bench_run import Settings, measure_run  # imports torch
    from pyro_sbp.cli.bench_text import bench_text

    measured = measure_run(request, saved, kwargs, shape, Settings(**settings), threads)
    rows = measured.rows()
    write_json((run if saved == run / "pruned" else saved) / "bench.json", rows)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    dense_error = None if summary is None else summary.error.dense
    click.echo(bench_text(measured, dense_error, markdown_table if markdown else table))
    if summary is not None:
        click.echo(result_in_words(summary))
    click.echo(
        f"next: `pyro-sbp report {run}` writes a page with plots, and `pyro-sbp train --arch "
        "package.module:callable` prunes your own network"
    )
