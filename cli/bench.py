"""pyro-sbp bench: measure the latency of the dense and the pruned network of a run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from pyro_sbp.architectures import find_architecture
from pyro_sbp.cli.common import find_network, read_network, result_in_words
from pyro_sbp.cli.threads import threads_to_use
from pyro_sbp.errors import RequestError
from pyro_sbp.machine import NOISY, cpu_governor
from pyro_sbp.text_tables import markdown_table, table
from pyro_sbp.training.files import write_json
from pyro_sbp.training.runs import read_request
from pyro_sbp.training.summary import Summary

__all__ = ["bench"]


@click.command()
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option(
    "--batch-size",
    "batch_sizes",
    type=click.IntRange(1),
    multiple=True,
    default=(1, 128),
    help="Examples per call; may be repeated.  [default: 1, 128]",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    multiple=True,
    help="Number of CPU threads; may be repeated.  [default: 1, and the number of free cores]",
)
@click.option(
    "--runtime",
    "runtimes",
    type=click.Choice(["eager", "compile", "onnxruntime", "int8"]),
    multiple=True,
    default=("eager",),
    help="Runtime: eager PyTorch, torch.compile, ONNX Runtime (CPU only), or int8, the network in "
    "8-bit integers in ONNX Runtime, calibrated on training images (CPU only); may be repeated.  "
    "[default: eager]",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=2.0,
    help="Seconds to measure each network in each setting.  [default: 2]",
)
@click.option("--channels-last", is_flag=True, help="Use the channels-last memory format.")
@click.option("--json", "as_json", is_flag=True, help="Print the latencies and MACs as JSON.")
@click.option("--markdown", is_flag=True, help="Print the tables as Markdown.")
def bench(
    run: Path | None,
    batch_sizes: tuple[int, ...],
    threads: tuple[int, ...],
    runtimes: tuple[str, ...],
    seconds: float,
    channels_last: bool,
    as_json: bool,
    markdown: bool,
) -> None:
    """Measure how much faster the pruned network is.

    RUN is a run directory, or a network that prune wrote into one (RUN/pruned-…); by default the
    newest run. The dense and the pruned network are measured in turn, on the CPU and, if there is
    one, on the GPU.
    """
    if as_json and markdown:
        raise RequestError("give one of --json and --markdown, not both")
    run, saved = find_network(run)
    request = read_request(run)
    architecture = find_architecture(request.arch)
    kwargs, shape = read_network(saved)
    # Networks that `prune` wrote have no summary.
    summary = Summary.read(run / "summary.json") if saved == run / "pruned" else None
    chosen = threads_to_use(max(threads, default=None))

    import torch

    from pyro_sbp.cli.quantized import calibration_batches, compare, comparison, run_data
    from pyro_sbp.deployment.benchmarking import benchmark, floor_network
    from pyro_sbp.deployment.memory import file_size, peak_memory
    from pyro_sbp.deployment.quantization import quantize
    from pyro_sbp.deployment.runtimes import ON_CPU, check_runtimes
    from pyro_sbp.deployment.saving import load

    runtimes = tuple(dict.fromkeys(("eager", *runtimes) if "int8" in runtimes else runtimes))
    check_runtimes(runtimes)
    constructor = architecture.resolve()
    try:
        pruned = load(saved, constructor)
    except ValueError as error:
        raise RequestError(str(error)) from error
    dense = constructor(**kwargs).eval()
    example = torch.rand(8, *shape)
    floor = floor_network(dense, example, architecture.input_features)
    data = run_data(request, architecture.image_size) if "int8" in runtimes else None
    calibration = [] if data is None else calibration_batches(data, request.seed)
    if channels_last:
        dense, pruned, floor = (
            net.to(memory_format=torch.channels_last) for net in (dense, pruned, floor)
        )
        example = example.to(memory_format=torch.channels_last)
    torch.set_num_threads(chosen)
    threads = threads or tuple(sorted({1, torch.get_num_threads()}))
    on_gpu = len(set(runtimes) - set(ON_CPU)) * torch.cuda.is_available()
    settings = len(batch_sizes) * (len(threads) * len(runtimes) + on_gpu)
    several = runtimes != ("eager",)
    words = ", plus the time to compile" if several else ""
    click.echo(f"measuring for about {3 * seconds * settings:.0f} s{words}", err=True)
    result = benchmark(
        dense,
        pruned,
        example,
        floor=floor,
        batch_sizes=batch_sizes,
        threads=threads,
        runtimes=runtimes,
        calibration=calibration,
        seconds=seconds,
    )
    nets, one = {"dense": dense, "pruned": pruned}, example[:1].clone()
    checks = {"dense": result.dense_check, "pruned": result.pruned_check}
    ptflops = {name: check and check.ptflops for name, check in checks.items()}
    counts = {
        "dense_macs": result.dense_macs,
        "pruned_macs": result.pruned_macs,
        "dense_macs_ptflops": ptflops["dense"],
        "pruned_macs_ptflops": ptflops["pruned"],
    }
    sizes = {f"{name}_file_bytes": file_size(net) for name, net in nets.items()}
    sizes |= {f"{name}_peak_bytes": peak_memory(net, one) for name, net in nets.items()}
    quantized = None if data is None else compare(pruned, quantize(pruned, calibration), data)
    more = {"governor": cpu_governor()} | counts | sizes
    more |= {} if quantized is None else asdict(quantized)
    rows = [asdict(latency) | more for latency in result.latencies]
    write_json((run if saved == run / "pruned" else saved) / "bench.json", rows)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    layout = markdown_table if markdown else table
    click.echo(result.latency_table(layout))
    if quantized is not None:
        dense_error = None if summary is None else summary.error.dense
        rows_of = comparison(quantized, dense_error, sizes, result.latencies)
        click.echo(f"\n{layout(*rows_of)}\n")
    if any(latency.spread > NOISY for latency in result.latencies):
        click.echo(f"a spread is over {NOISY:.0%}: the machine was busy; measure again")
    click.echo(
        "ms per call, median of blocks of calls in turn; speed-up: median ratio in groups of "
        "blocks, with its confidence interval; spread: half the interquartile range; floor: one "
        "unit in every gate\n"
        f"CPU governor: {more['governor'] or 'not readable'}\n"
        f"MACs {result.dense_macs:,} -> {result.pruned_macs:,} ({result.macs_ratio:.2f}x), "
        f"parameters {result.dense_parameters:,} -> {result.pruned_parameters:,}\n"
        f"file {sizes['dense_file_bytes'] / 1e3:,.1f} -> {sizes['pruned_file_bytes'] / 1e3:,.1f} "
        f"kB, peak memory of a call with one image {sizes['dense_peak_bytes'] / 1e3:,.1f} -> "
        f"{sizes['pruned_peak_bytes'] / 1e3:,.1f} kB"
    )
    texts = ["none" if count is None else f"{count:,}" for count in ptflops.values()]
    click.echo(f"ptflops: MACs {' -> '.join(texts)}")
    for name, check in checks.items():
        explanation = check and check.explanation(name)
        if explanation:
            click.echo(explanation)
    speedups = [f"{latency.speedup:.1f}" for latency in result.latencies]
    slowest, fastest = (choose(speedups, key=float) for choose in (min, max))
    words = fastest if slowest == fastest else f"{slowest} to {fastest}"
    click.echo(f"\nThe pruned network is {words} times as fast as the dense network.")
    if summary is not None:
        click.echo(result_in_words(summary))
    click.echo(
        f"next: `pyro-sbp report {run}` writes a page with plots, and `pyro-sbp train --arch "
        "package.module:callable` prunes your own network"
    )
